"""The training objective: clean tokens -> noised windows -> weighted loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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
      arXiv:2411.00776): before `first` every image's tokens come in an order of
      their own, after `last` none's. None: always raster.
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
  """The share of images whose tokens come in a random order at a step."""
  first, last = config.random_order
  return jnp.clip(1 - (step - first) / (last - first), 0, 1)


def draw_order(
  rng: Key, shape: tuple[int, int], rate: Float[Array, ""]
) -> Int[Array, "B T"]:
  """A random order of T tokens for a share `rate` of B images, else raster."""
  rng_rate, rng_order = jax.random.split(rng)
  raster = jnp.broadcast_to(jnp.arange(shape[1]), shape)
  order = jax.random.permutation(rng_order, raster, axis=1, independent=True)
  random = jax.random.bernoulli(rng_rate, rate, (shape[0], 1))
  return jnp.where(random, order, raster)


def corrupt(
  model: TensorAR,
  cond: Cond,
  inputs: Int[Array, "B M k F"],
  valid: Bool[Array, "M k"],
  rng: Key,
  config: NoiseConfig,
) -> tuple[Int[Array, "B M k F"], Float[Array, "B M k D"] | None]:
  """(noised input windows, noise to add to their embeddings or None)."""
  if model.window == 1 or config.kind == "none":
    return inputs, None
  if config.kind == "gaussian":
    shape = (*inputs.shape[:-1], model.backbone.width)
    return inputs, noising.gaussian(rng, shape)
  beta = noising.beta(config.schedule, model.window, config.schedule_start)
  rates = jnp.asarray(beta[:-1], jnp.float32)
  if config.kind == "codebook":
    if len(model.vocab_sizes) != 1:
      raise ValueError(
        f"noise kind 'codebook' with {len(model.vocab_sizes)} sub-tokens: a"
        " factorised vocabulary has no table of codes. Use 'categorical'."
      )
    codes = jnp.arange(model.vocab_sizes[0])[:, None]
    codes = jax.lax.stop_gradient(model.backbone.embed(codes))
    return noising.codebook(rng, inputs, rates, codes), None
  rng, rng_draft, rng_source = jax.random.split(rng, 3)
  noised = noising.categorical(rng, inputs, rates, model.vocab_sizes)
  if config.kind == "categorical":
    return noised, None
  drafts = draw_drafts(model, cond, noised, valid, inputs, rng_draft)
  shape = inputs.shape[:-1]
  own = jax.random.bernoulli(rng_source, config.draft_fraction, shape)
  # The same key gives the same mask: only resampled tokens become drafts.
  own = own[..., None] & noising.resampled(rng, inputs.shape, rates)
  return jnp.where(own, drafts, noised), None


def draw_drafts(
  model: TensorAR,
  cond: Cond,
  noised: Int[Array, "B M k F"],
  valid: Bool[Array, "M k"],
  clean: Int[Array, "B M k F"],
  rng: Key,
) -> Int[Array, "B M k F"]:
  """What the model itself predicts: slot (t, j) is a sample of logits[t, j].

  Slot 0 stays clean. No gradient flows, no dropout applies.
  """
  model = jax.lax.stop_gradient(model)
  hidden = model(cond, noised[:, :-1], valid[:-1])  # [B, M, k, D]
  slots = [clean[:, :, 0]]
  for j in range(1, model.window):
    tokens = jnp.zeros_like(clean[:, :, j])
    for f in range(len(model.vocab_sizes)):
      rng, rng_draw = jax.random.split(rng)
      logits = model.logits(hidden[:, :, j], tokens)[f]
      sample = jax.random.categorical(rng_draw, logits)
      tokens = tokens.at[..., f].set(sample.astype(tokens.dtype))
    slots.append(tokens)
  return jnp.stack(slots, axis=2)


def tensorar_loss(
  model: TensorAR,
  cond: Cond,
  tokens: Int[Array, "B T F"],
  rng: Key | None,
  noise: NoiseConfig,
  loss: LossConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """(loss, metrics) of a batch of clean tokens.

  `cond` has been dropped already; its "is_valid" says which images count.
  `rng` decides noise and dropout; None, for evaluation, fixes the noise and
  switches the dropout off.
  """
  rng_noise, rng_dropout, rng_head = jax.random.key(0), None, None
  if rng is not None:
    rng_noise, rng_dropout, rng_head = jax.random.split(rng, 3)
  targets, valid = windows.unfold(tokens, model.window)
  noised, extra = corrupt(
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
  if window == 1:  # nothing is noised, whatever the schedule
    return np.ones(1)
  beta = noising.beta(noise.schedule, window, noise.schedule_start)
  return losses.slot_weights(loss.weights, beta)
