"""Reads and writes `marginals.npz`, from which the parallel decoder guesses."""

from __future__ import annotations

import pathlib

import numpy as np
from jaxtyping import Int

from tensorar_jax.checkpoints import files
from tensorar_jax.method import marginals
from tensorar_jax.method.marginals import Marginals
from tensorar_jax.method.sampling_config import SamplingConfig

NAME = "marginals.npz"
# One table for each class needs room on the device; with more entries than
# this, one table serves all images.
MAX_ENTRIES = 2**24


def load(folder: pathlib.Path, config: SamplingConfig) -> Marginals | None:
  """Reads the marginals of a stage, if its sampler guesses by them."""
  if config.decoder != "parallel" or config.first_guess != "marginals":
    return None
  path = folder / NAME
  if not path.exists():
    raise ValueError(
      f"first_guess='marginals' needs {path}, which evaluation writes: run"
      " --mode=evaluate with the stage among evaluation.models, or choose"
      " another first_guess."
    )
  remedy = "Remove it and evaluate the stage again."
  tables = files.read_arrays(path, remedy=remedy)
  return Marginals(tuple(tables[f"f{f}"] for f in range(len(tables))))


def save(
  folder: pathlib.Path,
  tokens: Int[np.ndarray, "n T F"],
  vocab_sizes: tuple[int, ...],
  labels: Int[np.ndarray, "n"] | None = None,
  num_classes: int = 1,
) -> Marginals:
  """Counts tokens at each position and writes them into a stage's folder.

  Args:
    folder: of the stage.
    tokens: of images like those to be drawn.
    vocab_sizes: the size of each sub-token's vocabulary.
    labels: their classes, for a table of each class; None for one of all.
    num_classes: how many classes there are.
  """
  entries = num_classes * tokens.shape[1] * sum(vocab_sizes)
  if entries > MAX_ENTRIES:
    labels = None
  table = marginals.measure(tokens, vocab_sizes, labels, num_classes)
  arrays = {f"f{f}": np.asarray(a) for f, a in enumerate(table.logits)}
  files.write_arrays(folder / NAME, **arrays)
  return table
