"""Sample files of the ADM evaluation suite, never as a whole in memory.

A sample file is an archive, not compressed, with arr_0, images uint8
[n, h, w, C], and arr_1, their classes int64 [n]: the bytes that
`np.savez(path, images, labels)` writes. It is joined from shards, .npy files of
consecutive images.

A reference batch is such a file, often with the mean and covariance of the
features of a larger set beside the images: mu and sigma of `pool`, mu_s and
sigma_s of `spatial`.
"""

from __future__ import annotations

import io
import math
import os
import pathlib
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import numpy as np
from jaxtyping import Int64, UInt8

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # of `pool`, of `spatial`
_IMAGES = "arr_0"
_BLOCK = 2**22  # bytes copied at once
_DAMAGED = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError)


def write_shard(
  out: io.BufferedIOBase,
  count: int,
  batches: Iterable[UInt8[np.ndarray, "_ h w C"]],
) -> None:
  """Writes the .npy file of `count` images that come in batches."""
  for i, images in enumerate(batches):
    if i == 0:
      _write_header(out, (count, *images.shape[1:]))
    out.write(np.ascontiguousarray(images).data)


def _write_header(
  out: io.BufferedIOBase | IO[bytes], shape: tuple[int, ...]
) -> None:
  header = {"descr": "|u1", "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(out, header)


def join_shards(
  path: pathlib.Path,
  shards: Sequence[pathlib.Path],
  labels: Int64[np.ndarray, "n"],
) -> tuple[int, ...]:
  """Writes shards, in this order, and labels to a sample file.

  Returns the shape of its images.
  """
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


def _no_file(path: pathlib.Path) -> str:
  """Says what to do about a path that is no file."""
  if not path.is_dir():
    return f"{path}: no such file; expected an .npz of images."
  if (inside := path / "samples.npz").is_file():
    return f"{path} is a folder; expected a file of images: take {inside}."
  return (
    f"{path} is a folder; expected an .npz of images. Of its PNGs make one in"
    " Python: numpy.savez('samples.npz', numpy.stack([numpy.asarray("
    f"PIL.Image.open(f).convert('RGB')) for f in sorted(glob.glob('{path}"
    "/*.png'))]))"
  )


class SampleFile:
  """The images of a sample file or reference batch, written by any program.

  ValueError if the file is neither that nor a file of statistics: it is no
  archive or cut off, has no `arr_0`, or its images are not uint8 [n, h, w, 3].

  Attributes:
    path: the file.
    shape: of the images, [n, h, w, C]; None if there are only statistics.
    statistics: {name: array} of STATISTICS, {} if it holds none of them.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise ValueError(_no_file(self.path))
    try:
      with zipfile.ZipFile(self.path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        self.statistics = self._statistics(names)
        self.shape, self._streams = None, False
        if _IMAGES in names:
          with archive.open(f"{_IMAGES}.npy") as member:
            self.shape, self._streams = self._header(member)
    except _DAMAGED as error:
      raise ValueError(
        f"{self.path} is not a sample file (.npz) or is damaged: {error}"
      ) from error
    if self.shape is None and not self.statistics:
      raise ValueError(
        f"{self.path} holds {sorted(names)}; expected {_IMAGES}, uint8 images"
        " [n, h, w, 3], as `numpy.savez(path, images)` writes it."
      )

  def __len__(self) -> int:
    return self.shape[0] if self.shape else 0

  def read(self, chosen: Iterable[range]) -> Iterator[UInt8[np.ndarray, "..."]]:
    """Yields the images of each range, one range in memory at a time.

    Ranges must be in rising order.
    """
    if self.shape is None or not self._streams:
      with np.load(self.path) as arrays:
        images = np.ascontiguousarray(arrays[_IMAGES])
      yield from (images[r.start : r.stop] for r in chosen)
      return
    size = math.prod(self.shape[1:])
    try:
      with (
        zipfile.ZipFile(self.path) as archive,
        archive.open(f"{_IMAGES}.npy") as member,
      ):
        self._header(member)
        start = member.tell()
        for r in chosen:
          member.seek(start + r.start * size)
          data = member.read(len(r) * size)
          if len(data) < len(r) * size:
            raise EOFError(f"it ends before image {r.stop}")
          yield np.frombuffer(data, np.uint8).reshape(-1, *self.shape[1:])
    except _DAMAGED as error:
      raise ValueError(f"{self.path} is damaged: {error}") from error

  def _header(self, member) -> tuple[tuple[int, ...], bool]:
    """The shape of the images, and whether they can be read in parts."""
    version = np.lib.format.read_magic(member)
    read_header = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header:
      shape, fortran, dtype = read_header(member)
    else:
      with np.load(self.path) as arrays:
        images = arrays[_IMAGES]
      shape, fortran, dtype = images.shape, True, images.dtype
    if dtype != np.uint8:
      raise ValueError(
        f"{_IMAGES} holds {dtype}; expected uint8 in 0..255: convert images in"
        " [-1, 1] by clip(127.5 x + 128, 0, 255)"
      )
    if len(shape) != 4 or 0 in shape[1:]:
      raise ValueError(f"{_IMAGES} has shape {shape}; expected [n, h, w, 3]")
    if not shape[0]:
      raise ValueError(f"{_IMAGES} holds no image; expected at least 2")
    return shape, not fortran

  def _statistics(self, names: set[str]) -> dict[str, np.ndarray]:
    if "mu" not in names:
      return {}
    missing = [name for name in STATISTICS if name not in names]
    if missing:
      raise ValueError(
        f"it holds mu without {missing}; expected all of {STATISTICS}, of the"
        " network and the resizing of the ADM suite"
      )
    with np.load(self.path) as arrays:
      return {name: np.asarray(arrays[name]) for name in STATISTICS}
