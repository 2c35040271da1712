"""How often each token occurs at each position: guesses for the decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from tensorar_jax.interfaces import Cond

SMOOTHING = 0.5  # is added to every count


@struct.dataclass
class Marginals:
  """Logarithms of how often tokens occur, in groups of images.

  A group is a class, if there is one for each class, or all images.

  Attributes:
    logits: [G, T, V_f] for each sub-token.
  """

  logits: tuple[Float[Array | np.ndarray, "G T _"], ...]

  def groups_of(self, cond: Cond) -> Int[Array, "B"]:
    """The group of the image of each condition."""
    count = self.logits[0].shape[0]
    if count == 1:
      return jnp.zeros(len(jax.tree.leaves(cond)[0]), jnp.int32)
    if "label" not in cond:
      raise ValueError(
        f"marginals of {count} classes: the conditions have no labels. Measure"
        " marginals of all images together."
      )
    return jnp.minimum(jnp.asarray(cond["label"], jnp.int32), count - 1)


def measure(
  tokens: Int[np.ndarray, "n T F"],
  vocab_sizes: tuple[int, ...],
  labels: Int[np.ndarray, "n"] | None = None,
  num_classes: int = 1,
) -> Marginals:
  """Counts tokens at each position, by class if there are labels."""
  groups = num_classes if labels is not None else 1
  index = np.zeros(len(tokens), int) if labels is None else np.asarray(labels)
  position = np.arange(tokens.shape[1])
  tables = []
  for f, vocab in enumerate(vocab_sizes):
    counts = np.full((groups, tokens.shape[1], vocab), SMOOTHING, np.float32)
    np.add.at(counts, (index[:, None], position, tokens[..., f]), 1)
    tables.append(np.log(counts / counts.sum(axis=-1, keepdims=True)))
  return Marginals(tuple(tables))
