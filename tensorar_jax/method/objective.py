"""The training objective: clean tokens -> noised windows -> weighted loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tensorar_jax.interfaces import Cond, Key
from tensorar_jax.method import losses, noising, windows
from tensorar_jax.method.noising import NoiseConfig
from tensorar_jax.method.tensorar import TensorAR


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What is learned.

  Attributes:
    weights: of the slots, "rdm", "paper" or "uniform".
    condition_dropout: the share of conditions that turn to null.
    random_order: (first, last) step of an annealing for base models (Yu et al.,
      arXiv:2411.00776): before `first` the tokens of every image come in a
      random order of its own, after `last` all come in raster order. None:
      always raster.
  """

  weights: str = "rdm"
  condition_dropout: float = 0.1
  random_order: tuple[int, int] | None = None

  def __post_init__(self):
    if self.weights not in losses.WEIGHTS:
      raise ValueError(
        f"loss weights={self.weights!r}: choose one of {losses.WEIGHTS}."
      )
    if not 0 <= self.condition_dropout <= 1:
      raise ValueError(
        f"condition_dropout={self.condition_dropout}: expected a probability."
      )
    if (
      self.random_order and not 0 <= self.random_order[0] < self.random_order[1]
    ):
      raise ValueError(
        f"random_order={self.random_order}: expected two steps, the second"
        " after the first."
      )


def random_rate(
  config: LossConfig, step: Int[Array, ""] | Int[np.ndarray, "n"]
) -> Float[Array, "..."]:
  """Returns the share of images in random order at a step."""
  if config.random_order is None:
    return jnp.zeros(())
  first, last = config.random_order
  return jnp.clip(1 - (step - first) / (last - first), 0, 1)


def draw_order(
  rng: Key, shape: tuple[int, int], rate: Float[Array, ""]
) -> Int[Array, "B T"]:
  """Draws a random order of T tokens for a share `rate` of B images."""
  rng_rate, rng_order = jax.random.split(rng)
  raster = jnp.broadcast_to(jnp.arange(shape[1]), shape)
  order = jax.random.permutation(rng_order, raster, axis=1, independent=True)
  random = jax.random.bernoulli(rng_rate, rate, (shape[0], 1))
  return jnp.where(random, order, raster)


def tensorar_loss(
  model: TensorAR,
  cond: Cond,
  tokens: Int[Array, "B T F"],
  rng: Key | None,
  noise: NoiseConfig,
  loss: LossConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Returns (loss, metrics) of a batch of clean tokens.

  Args:
    model: with trained weights.
    cond: conditions, some of which have been turned to null already; its
      "is_valid" says which images count.
    tokens: clean tokens.
    rng: decides noise and dropout; None, for evaluation, fixes the noise and
      switches dropout off.
    noise: the noise on the input windows.
    loss: the weights of the slots.
  """
  rng_noise, rng_dropout, rng_head = jax.random.key(0), None, None
  if rng is not None:
    rng_noise, rng_dropout, rng_head = jax.random.split(rng, 3)
  targets, valid = windows.unfold(tokens, model.window)
  noised, extra = noising.corrupt(
    model, cond, targets[:, :-1], valid[:-1], rng_noise, noise
  )
  hidden = model(cond, noised, valid[:-1], noise=extra, rng=rng_dropout)
  if "is_valid" in cond:
    valid = cond["is_valid"][:, None, None] & valid  # [B, T, k]
  return losses.tensor_cross_entropy(
    model.logits,
    hidden,
    targets,
    valid,
    slot_weights(model.window, noise, loss),
    rng_head,
  )


def slot_weights(
  window: int, noise: NoiseConfig, loss: LossConfig
) -> Float[np.ndarray, "k"]:
  """The loss weight of each slot under this noise schedule."""
  if window == 1:  # nothing is noised, so the schedule does not matter
    return np.ones(1)
  beta = noising.beta(noise.schedule, window, noise.schedule_start)
  return losses.slot_weights(loss.weights, beta)
