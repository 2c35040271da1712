"""Keeps arrays that take long to compute beside the data they come from."""

from __future__ import annotations

import pathlib

import numpy as np
from absl import logging

from tensorar_jax.checkpoints import files


def save(file: files.AnyPath, **arrays: np.ndarray) -> None:
  """Writes an .npz file; a failure is only a warning, since nothing is lost."""
  try:
    if isinstance(file, pathlib.Path):
      files.remove_leftovers_of(file)
    with files.replacing(file) as partial, partial.open("wb") as opened:
      np.savez(opened, allow_pickle=False, **arrays)
  except OSError as error:  # a read-only or full disk costs time, not data
    logging.warning("%s will be computed again next time: %s", file, error)
