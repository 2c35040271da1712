"""Arrays that take long to compute, kept beside the data they come from."""

from __future__ import annotations

import pathlib
import uuid

import numpy as np
from absl import logging


def save(file: pathlib.PurePath, **arrays: np.ndarray) -> None:
  """Writes an .npz; where that fails, a warning says so, as nothing is lost.

  `file` has the methods of a Path, but need not be one: TFDS has its own.
  """
  # Renamed when complete: another process never sees half a file.
  partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}.partial")
  try:
    with partial.open("wb") as written:
      np.savez(written, **arrays)
    partial.replace(file)
  except OSError as error:  # a read-only or full disk costs time, not data
    logging.warning("%s will be computed again next time: %s", file, error)
    if partial.exists():
      partial.unlink()
