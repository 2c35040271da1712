"""Keeps arrays that take long to compute beside the data they come from."""

from __future__ import annotations

import pathlib

import numpy as np
from absl import logging

from tensorar_jax.checkpoints import files


def save(file: pathlib.PurePath, **arrays: np.ndarray) -> None:
  """Writes an .npz file; a failure is only a warning, since nothing is lost.

  `file` has the methods of a Path, but need not be one: TFDS has its own.
  """
  try:
    with files.replacing(file) as partial, partial.open("wb") as opened:
      np.savez(opened, **arrays)
  except OSError as error:  # a read-only or full disk costs time, not data
    logging.warning("%s will be computed again next time: %s", file, error)
