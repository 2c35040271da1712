"""The training loss: weighted cross-entropy over the slots of each prediction.

L = sum_n sum_j w(j) CE(logits[n, j], x[n + j]) over n + j < T, averaged over
predictions and images; images may be left out. See docs/method.md, section 5.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tensorar_jax.interfaces import Key

WEIGHTS = ("rdm", "paper", "uniform")


def slot_weights(
  kind: str, beta: Float[np.ndarray, "edges"]
) -> Float[np.ndarray, "k"]:
  """Returns w(0) = 1, w(1), ..., w(k - 1) for the result of `noising.beta`.

  * rdm: (beta(j+1) - beta(j)) / beta(j+1), the reparameterised
    discrete-diffusion weight.
  * paper: |beta(j-1) - beta(j)| / (1 - beta(j)), P2 appendix B without its
    sign, 0 where beta(j) = 1.
  * uniform: 1.
  """
  if kind not in WEIGHTS:
    raise ValueError(f"loss weights={kind!r}: choose one of {WEIGHTS}.")
  window = len(beta) - 1
  weights = np.ones(window)
  for j in range(1, window):
    if kind == "rdm":
      weights[j] = (beta[j + 1] - beta[j]) / max(beta[j + 1], 1e-12)
    elif kind == "paper":
      gap = 1 - beta[j]
      weights[j] = abs(beta[j - 1] - beta[j]) / gap if gap > 0 else 0.0
  if (weights < 0).any():
    raise ValueError(
      f"schedule={beta[:-1].tolist()} falls somewhere, which makes an 'rdm'"
      " weight negative. Use a rising schedule or weights='uniform'."
    )
  return weights


def cross_entropy(
  logits: tuple[Float[Array, "*n _"], ...], targets: Int[Array, "*n F"]
) -> tuple[Float[Array, "*n"], Bool[Array, "*n"]]:
  """Returns (CE summed over sub-tokens in nats, all their argmax correct)."""
  total, correct = jnp.zeros(()), jnp.ones((), bool)
  for f, scores in enumerate(logits):
    target = targets[..., f]
    scores = scores.astype(jnp.float32)
    picked = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]
    total += jax.nn.logsumexp(scores, axis=-1) - picked
    correct &= jnp.argmax(scores, axis=-1) == target
  return total, correct


def tensor_cross_entropy(
  logits: Callable,
  hidden: Float[Array, "B T k D"],
  targets: Int[Array, "B T k F"],
  valid: Bool[Array | np.ndarray, "*b T k"],
  weights: Float[np.ndarray, "k"],
  rng: Key | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Returns the loss and each slot's "ce/j" and "accuracy/j" on valid targets.

  `logits(hidden, tokens, rng=rng)` is the head. `valid` may differ from image
  to image; if none is left, the loss is 0. One slot at a time under checkpoint:
  the peak of the logits' memory is that of the base model.
  """

  @jax.checkpoint
  def slot(hidden, targets, valid, rng):
    ce, correct = cross_entropy(logits(hidden, targets, rng=rng), targets)
    return jnp.sum(ce * valid), jnp.sum(correct & valid)

  batch, length, window = targets.shape[:3]

  def count(j):
    if valid.ndim == 2:  # the same slots of every image: known beforehand
      return batch * (length - j)
    return jnp.maximum(jnp.sum(valid[..., j]), 1)

  loss, metrics = jnp.zeros(()), {}
  for j in range(window):
    ce, correct = slot(
      hidden[:, :, j],
      targets[:, :, j],
      valid[..., j],
      None if rng is None else jax.random.fold_in(rng, j),
    )
    loss += weights[j] * ce / count(0)
    metrics[f"ce/{j}"] = ce / count(j)
    metrics[f"accuracy/{j}"] = correct / count(j)
  return loss, metrics
