"""Sample files of the ADM evaluation suite, never as a whole in memory.

An archive, not compressed, with arr_0, the images uint8 [n, h, w, C], and
arr_1, their classes int64 [n]: what `np.savez(path, images, labels)` writes, to
the byte. It is put together from shards, .npy files of consecutive images.
"""

from __future__ import annotations

import io
import math
import pathlib
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int64, UInt8

_BLOCK = 2**22  # bytes copied at once


def write_shard(
  out: io.BufferedIOBase,
  count: int,
  batches: Iterable[UInt8[np.ndarray, "_ h w C"]],
) -> None:
  """The .npy file of `count` images that come in batches."""
  for i, images in enumerate(batches):
    if i == 0:
      _write_header(out, (count, *images.shape[1:]))
    out.write(np.ascontiguousarray(images))


def _write_header(out: io.BufferedIOBase, shape: tuple[int, ...]) -> None:
  header = {"descr": "|u1", "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(out, header)


def join(
  path: pathlib.Path,
  shards: Sequence[pathlib.Path],
  labels: Int64[np.ndarray, "n"],
) -> tuple[int, ...]:
  """Shards, in this order, and labels -> a sample file; its images' shape."""
  shape = (len(labels), *_open(shards[0]).shape[1:])
  with zipfile.ZipFile(path, "w") as archive:
    with archive.open("arr_0.npy", "w", force_zip64=True) as member:
      _write_header(member, shape)
      for file in shards:
        offset = _open(file).offset
        with file.open("rb") as data:
          data.seek(offset)
          shutil.copyfileobj(data, member, _BLOCK)
    with archive.open("arr_1.npy", "w", force_zip64=True) as member:
      np.lib.format.write_array(member, labels)
  return shape


def _open(shard: pathlib.Path) -> np.memmap:
  try:
    return np.load(shard, mmap_mode="r")
  except ValueError as error:
    raise ValueError(
      f"{shard} is damaged ({error}): delete it and sample again."
    ) from error


def read_images(
  path: pathlib.Path, batch_size: int = 100
) -> Iterator[UInt8[np.ndarray, "_ h w C"]]:
  """The images of a sample file that `join` made, a batch at a time."""
  with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
    np.lib.format.read_magic(member)
    (count, *shape), _, _ = np.lib.format.read_array_header_1_0(member)
    for start in range(0, count, batch_size):
      data = member.read(min(batch_size, count - start) * math.prod(shape))
      yield np.frombuffer(data, np.uint8).reshape(-1, *shape)
