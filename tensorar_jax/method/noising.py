"""The noise on input windows in training: schedules and kinds.

Slot j >= 1 of an input window is noised, by most kinds with probability
beta(j); slot 0 never is. See docs/method.md, section 4; papers: P2 eq. 4
(categorical), P1 alg. 2 (codebook).

To add a kind of noise, write one function with the arguments of `corrupt` that
returns what `corrupt` returns, and enter it in `KINDS` at the end of this file;
`noise.kind` finds it by that name. An option of its own is a field of
`NoiseConfig`. `tests/method/noising_test.py` then checks that it leaves slot 0
alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tensorar_jax.interfaces import Cond, Key
from tensorar_jax.method.tensorar import TensorAR

SCHEDULES = {
  "linear": lambda j, k: j / k,
  "sine": lambda j, k: math.sin(math.pi * j / (2 * k)),
  "sqrt": lambda j, k: math.sqrt(j / k),
  "exponential": lambda j, k: j ** (1 / k) / 2,
  "root": lambda j, k: (j / k) ** (1 / (2 * k)),
}
GAUSSIAN_VARIANCE = 0.1  # P1, ablation of the noise
_CHUNK = 1024  # tokens whose similarities to all V codes exist at one time


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
  """Kind and strength of the noise.

  Attributes:
    kind: a name of `KINDS`.
    schedule: a name of `SCHEDULES`, or a list of k probabilities with 0 first.
    schedule_start: 1 lets slot j take beta(j + 1) of a named schedule.
    draft_fraction: the share of resampled tokens that come from the model
      itself (kind "drafts").
  """

  kind: str = "categorical"
  schedule: str | Sequence[float | int] = "exponential"
  schedule_start: int = 0
  draft_fraction: float = 0.5

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f"noise kind={self.kind!r}: choose one of {tuple(KINDS)}."
      )
    if self.schedule_start not in (0, 1):
      raise ValueError(f"schedule_start={self.schedule_start}: choose 0 or 1.")
    if not 0.0 <= self.draft_fraction <= 1.0:
      raise ValueError(
        f"draft_fraction={self.draft_fraction}: expected a share in [0, 1]."
      )
    if not isinstance(self.schedule, str):
      object.__setattr__(self, "schedule", tuple(self.schedule))
    elif self.schedule not in SCHEDULES:
      raise ValueError(
        f"schedule={self.schedule!r}: choose one of {sorted(SCHEDULES)} or give"
        " a list of k probabilities."
      )

  def rates(self, window: int) -> Float[Array, "{window}"]:
    """beta(0), ..., beta(k - 1): how often each slot is resampled."""
    edges = beta(self.schedule, window, self.schedule_start)
    return jnp.asarray(edges[:-1], jnp.float32)


def corrupt(
  model: TensorAR,
  cond: Cond,
  inputs: Int[Array, "B M k F"],
  valid: Bool[Array, "M k"],
  rng: Key,
  config: NoiseConfig,
) -> tuple[Int[Array, "B M k F"], Float[Array, "B M k D"] | None]:
  """Noises the input windows of a training step.

  Args:
    model: it tells sizes; kinds that need predictions or embeddings ask it.
    cond: the condition of each image.
    inputs: clean windows.
    valid: which of their slots are not PAD.
    rng: decides all of the noise.
    config: the kind and its options.

  Returns:
    (noised windows, noise to add to their embeddings or None).
  """
  if model.window == 1:  # slot 0 is never noised
    return inputs, None
  return KINDS[config.kind](model, cond, inputs, valid, rng, config)


def beta(
  schedule: str | Sequence[float | int], window: int, start: int = 0
) -> Float[np.ndarray, "{window}+1"]:
  """beta(0) = 0, beta(1), ..., beta(k - 1), and beta(k) = 1 by definition."""
  if isinstance(schedule, str):
    values = [SCHEDULES[schedule](j + start, window) for j in range(1, window)]
    values = [0.0, *values]
  else:
    values = [float(v) for v in schedule]
    if len(values) != window or values[0] != 0.0:
      raise ValueError(
        f"schedule={list(schedule)}: a list gives beta for each of the"
        f" {window} slots, and slot 0 is never noised (beta 0)."
      )
  if start and isinstance(schedule, str) and window > 1:
    values[-1] = 1.0  # beta(k) := 1
  if not all(0.0 <= v <= 1.0 for v in values):
    raise ValueError(f"schedule={values}: probabilities lie in [0, 1].")
  return np.asarray([*values, 1.0])


@functools.partial(jax.jit, static_argnames="vocab_sizes")
def categorical(
  rng: Key,
  windows: Int[Array, "B n k F"],
  rates: Float[Array, "k"],
  vocab_sizes: tuple[int, ...],
) -> Int[Array, "B n k F"]:
  """Windows whose slot j is resampled uniformly with probability rates[j]."""
  uniform = uniform_tokens(rng, windows.shape, vocab_sizes)
  return jnp.where(resampled(rng, windows.shape, rates), uniform, windows)


@functools.partial(jax.jit, static_argnames="shape")
def resampled(
  rng: Key, shape: tuple[int, ...], rates: Float[Array, "k"]
) -> Bool[Array, "B n k 1"]:
  """Which tokens are resampled, one key per sample."""
  keys = jax.random.split(jax.random.fold_in(rng, 0), shape[0])
  draw = jax.vmap(lambda key: jax.random.bernoulli(key, rates, shape[1:3]))
  return draw(keys)[..., None]


@functools.partial(jax.jit, static_argnames=("shape", "vocab_sizes"))
def uniform_tokens(
  rng: Key, shape: tuple[int, ...], vocab_sizes: tuple[int, ...]
) -> Int[Array, "B n k F"]:
  """Uniform tokens, one key per sample, all sub-tokens drawn afresh."""
  keys = jax.random.split(jax.random.fold_in(rng, 1), shape[0])
  sizes = jnp.asarray(vocab_sizes)

  def draw(key):
    return jax.random.randint(key, shape[1:], 0, sizes, dtype=jnp.int32)

  return jax.vmap(draw)(keys)


@jax.jit
def codebook(
  rng: Key,
  windows: Int[Array, "B n k 1"],
  rates: Float[Array, "k"],
  codes: Float[Array, "V D"],
) -> Int[Array, "B n k 1"]:
  """The code nearest in angle to (1 - beta) W[x] + beta W[uniform code].

  `codes` is W, the embedding of every code. Slots with beta 0 stay as they are.
  """
  other = uniform_tokens(rng, windows.shape, (codes.shape[0],))
  codes = codes.astype(jnp.float32)
  norm = jnp.linalg.norm(codes, axis=-1, keepdims=True)
  directions = codes / jnp.maximum(norm, 1e-12)
  count = windows.size
  pad = -count % min(_CHUNK, count)
  flat = [
    jnp.pad(a.reshape(-1), (0, pad))
    for a in (windows, other, jnp.broadcast_to(rates[:, None], windows.shape))
  ]

  def nearest(chunk):
    token, other, rate = chunk
    mixed = (1 - rate[:, None]) * codes[token] + rate[:, None] * codes[other]
    return jnp.argmax(mixed @ directions.T, axis=-1).astype(jnp.int32)

  chunks = [a.reshape(-1, min(_CHUNK, count)) for a in flat]
  replaced = jax.lax.map(nearest, tuple(chunks)).reshape(-1)[:count]
  return jnp.where(rates[:, None] > 0, replaced.reshape(windows.shape), windows)


@functools.partial(jax.jit, static_argnames="shape")
def gaussian(rng: Key, shape: tuple[int, ...]) -> Float[Array, "B n k D"]:
  """Noise N(0, 0.1) (variance) for the embeddings of slots >= 1."""
  keys = jax.random.split(rng, shape[0])
  draw = jax.vmap(lambda key: jax.random.normal(key, shape[1:]))
  scale = jnp.where(jnp.arange(shape[2]) > 0, GAUSSIAN_VARIANCE**0.5, 0.0)
  return draw(keys) * scale[:, None]


def draw_drafts(
  model: TensorAR,
  cond: Cond,
  noised: Int[Array, "B M k F"],
  valid: Bool[Array, "M k"],
  clean: Int[Array, "B M k F"],
  rng: Key,
) -> Int[Array, "B M k F"]:
  """Samples what the model itself predicts: slot (t, j) from logits[t, j].

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


# --- kinds: the arguments and results of `corrupt` ---------------------------


def add_none(model, cond, inputs, valid, rng, config):
  """Leaves the windows clean, which shows the leak that noise prevents."""
  del model, cond, valid, rng, config
  return inputs, None


def add_categorical(model, cond, inputs, valid, rng, config):
  """Replaces tokens by uniform ones."""
  del cond, valid
  rng, _, _ = jax.random.split(rng, 3)
  rates = config.rates(model.window)
  return categorical(rng, inputs, rates, model.vocab_sizes), None


def add_codebook(model, cond, inputs, valid, rng, config):
  """Moves tokens towards uniform ones in the space of the embeddings."""
  del cond, valid
  if len(model.vocab_sizes) != 1:
    raise ValueError(
      f"noise kind 'codebook' with {len(model.vocab_sizes)} sub-tokens: a"
      " factorised vocabulary has no table of codes. Use 'categorical'."
    )
  codes = jnp.arange(model.vocab_sizes[0])[:, None]
  codes = jax.lax.stop_gradient(model.backbone.embed(codes))
  return codebook(rng, inputs, config.rates(model.window), codes), None


def add_gaussian(model, cond, inputs, valid, rng, config):
  """Leaves the tokens and adds noise to their embeddings."""
  del cond, valid, config
  shape = (*inputs.shape[:-1], model.backbone.width)
  return inputs, gaussian(rng, shape)


def add_drafts(model, cond, inputs, valid, rng, config):
  """Replaces tokens by uniform ones and by the model's own drafts."""
  rng, rng_draft, rng_source = jax.random.split(rng, 3)
  rates = config.rates(model.window)
  noised = categorical(rng, inputs, rates, model.vocab_sizes)
  drafts = draw_drafts(model, cond, noised, valid, inputs, rng_draft)
  is_draft = jax.random.bernoulli(
    rng_source, config.draft_fraction, inputs.shape[:-1]
  )
  # The same key gives the same mask: only resampled tokens become drafts.
  is_draft = is_draft[..., None] & resampled(rng, inputs.shape, rates)
  return jnp.where(is_draft, drafts, noised), None


KINDS: dict[str, Callable] = {
  "categorical": add_categorical,
  "codebook": add_codebook,
  "gaussian": add_gaussian,
  "none": add_none,
  "drafts": add_drafts,
}
