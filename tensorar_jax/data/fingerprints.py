"""What a model is trained on, as a digest that changes when it changes.

Images in memory count whole. Of files count all names, and of up to `SAMPLED`
of them, evenly spaced, the size and both ends: a data set of millions of files
is not read at every start. Where they lie does not count, so they may be moved.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from tensorar_jax.data.shards import MANIFEST

SAMPLED = 256  # files
END = 2**16  # bytes of a file's beginning and of its end
# Attributes of sources that say what they hold. Others, such as the vocabulary
# that a model expects, are not of the data.
_PLAIN = ("names", "captions", "name", "first", "end", "num_crops")
_ARRAYS = ("images", "labels", "ends", "places", "starts")


def of(source: Any) -> dict[str, Any]:
  """{"images": their number, "sha256": a digest} of any source."""
  digest = hashlib.sha256(type(source).__name__.encode())
  for name in _PLAIN:
    if (value := getattr(source, name, None)) is not None:
      digest.update(json.dumps([name, value]).encode())
  for name in _ARRAYS:
    if (value := getattr(source, name, None)) is not None:
      array = np.ascontiguousarray(value)
      digest.update(f"{name} {array.dtype} {array.shape}".encode())
      digest.update(array.data if array.size else b"")
  files = _files(source)
  chosen = np.linspace(0, len(files) - 1, min(len(files), SAMPLED))
  for position in np.unique(chosen.round().astype(int)):
    digest.update(_ends(files[position]))
  return {"images": len(source), "sha256": digest.hexdigest()}


def _files(source: Any) -> list[pathlib.Path]:
  """The files of a source, in an order of their own."""
  if folders := getattr(source, "folders", None):  # of pairs with 0.npy, ...
    numbers = range(len(source))
    return [f / f"{i}.npy" for pair in folders for f in pair for i in numbers]
  if files := getattr(source, "files", None):
    return list(files)
  if file := getattr(source, "file", None):
    return [file]
  folder = getattr(source, "folder", None)
  if folder is None:
    return []
  files = [folder / name for name in source.names]
  manifest = folder / MANIFEST
  return [manifest, *files] if manifest.is_file() else files


def _ends(file: pathlib.Path) -> bytes:
  """The digest of a file's size and both its ends; of a missing one, empty."""
  try:
    with file.open("rb") as opened:
      digest, size = hashlib.sha256(), opened.seek(0, 2)
      for start in (0, max(0, size - END)):
        opened.seek(start)
        digest.update(opened.read(END))
  except OSError:  # it is skipped, or an error, when it is its turn
    return b""
  digest.update(str(size).encode())
  return digest.digest()
