"""From logits to tokens: guidance, filters, and the rules that draw.

    logits -> guidance -> rule -> token

Both rules here apply temperature, top-k and top-p, and draw from the same
distribution. `InverseCDF`, the default, inverts the CDF at one uniform number.
`GumbelMax` takes the largest of logits + noise, with a number for every entry
of the vocabulary: it costs more, but two distributions that are near each other
mostly give the same token, which the parallel decoder lives on.

To add a rule, write a small frozen dataclass with what `DrawingRule` lists and
enter an instance in `RULES` at the end of this file; the option `sampling.draw`
finds it by that name. From Python an instance will do:
`SamplingConfig(draw=Mine(0.5))`. A rule is a pure function of what `draw` is
given; the sampler keeps the earlier looks that it asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from tensorar_jax.interfaces import Key

Guidance = float | tuple[float, ...]  # a scale, or one for each sub-token


@dataclasses.dataclass(frozen=True)
class TokenConfig:
  """How one sub-token is drawn; see `SamplingConfig`, which is for all."""

  temperature: float = 1.0
  draft_temperature: float | None = None
  top_k: int = 0
  top_p: float = 1.0


# --- guidance ----------------------------------------------------------------


def parse_guidance(text: str) -> Guidance:
  """Reads the scale of "1.5", or one for each sub-token of "4:6"."""
  try:
    scales = tuple(map(float, text.split(":")))
  except ValueError as error:
    raise ValueError(
      f"guidance {text!r}: expected a scale, such as 1.5, or one for each"
      " sub-token, such as 4:6."
    ) from error
  return scales[0] if len(scales) == 1 else scales


def guidance_text(scale: Guidance) -> str:
  """Writes a scale as `parse_guidance` reads it."""
  return ":".join(f"{number:g}" for number in np.atleast_1d(scale))


def guide(
  logits: Float[Array, "both *n V"], scale: Float[Array | np.ndarray, "..."]
) -> Float[Array, "half *n V"]:
  """Returns uncond + scale (cond - uncond) of a [cond | uncond] batch.

  At scale 1 that is cond, to the last bit.
  """
  cond, uncond = jnp.split(logits, 2)
  return jnp.where(scale == 1, cond, uncond + scale * (cond - uncond))


# --- filters -----------------------------------------------------------------


def filter_logits(
  logits: Float[Array, "*n V"], config: TokenConfig
) -> Float[Array, "*n V"]:
  """Sets to -inf what top-k and top-p remove, without sorting anything."""
  vocab = logits.shape[-1]
  if 0 < config.top_k < vocab:
    ranks = _ranks(logits)
    count = lambda least: jnp.sum(ranks >= least, axis=-1, keepdims=True)
    least = _largest(lambda least: count(least) >= config.top_k, logits)
    logits = jnp.where(ranks < least, -jnp.inf, logits)
  if config.top_p < 1:
    ranks, probs = _ranks(logits), jax.nn.softmax(logits, axis=-1)

    def mass(least):
      return jnp.sum(jnp.where(ranks >= least, probs, 0), -1, keepdims=True)

    least = _largest(lambda least: mass(least) > config.top_p, logits)
    # Of equal ones the first stay, as many as it takes.
    tied = ranks == least
    before = mass(least + 1) + (jnp.cumsum(tied, axis=-1) - 1) * probs
    keep = (ranks > least) | tied & (before <= config.top_p)
    logits = jnp.where(keep, logits, -jnp.inf)
  return logits


def _ranks(x: Float[Array, "*n V"]) -> UInt32[Array, "*n V"]:
  """Returns whole numbers in the order of x: its bits, flipped if negative."""
  x = jnp.where(x == 0, 0.0, x).astype(jnp.float32)  # -0.0 is as large as 0.0
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  top = jnp.uint32(1 << 31)
  return jnp.where(bits >= top, ~bits, bits | top)


def _largest(holds: Callable, x: Array) -> UInt32[Array, "*n 1"]:
  """Finds the largest number for which `holds`, bit by bit.

  `holds` takes a number for each row of x; if it holds for one, it holds for
  every smaller one.
  """

  def body(i, number):
    higher = number | (jnp.uint32(1 << 31) >> i)
    return jnp.where(holds(higher), higher, number)

  start = jnp.zeros((*x.shape[:-1], 1), jnp.uint32)
  return jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32), body, start)


def token_probs(
  logits: Float[Array, "*n V"], temperature: float, config: TokenConfig
) -> Float[Array, "*n V"]:
  """The probabilities after temperature (not 0), top-k and top-p."""
  logits = filter_logits(logits / max(temperature, 1e-5), config)
  return jax.nn.softmax(logits, axis=-1)


# --- random numbers ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Noise:
  """The random numbers of one sub-token in some windows.

  They come from (image, step, slot, sub-token) alone: the same in any batch, on
  any number of devices, and however many windows are drawn at once.

  Attributes:
    keys: the key of each window's image, [R].
    steps: the step that draws each window.
    slots: how many slots a window has.
    factors: how many sub-tokens a token has.
    f: which sub-token.
  """

  keys: Key
  steps: Int[Array, "R"]
  slots: int
  factors: int
  f: int

  def uniform(self) -> Float[Array, "R k"]:
    """A number in [0, 1) for each slot."""
    draw = lambda key: jax.random.uniform(key, (self.factors,))
    return jax.vmap(jax.vmap(draw))(self._slot_keys())[..., self.f]

  def gumbel(self, vocab: int) -> Float[Array, "R k {vocab}"]:
    """Standard Gumbel numbers for each slot, one for each of `vocab` tokens."""
    fold = lambda key: jax.random.fold_in(key, self.f)
    draw = lambda key: jax.random.gumbel(fold(key), (vocab,))
    return jax.vmap(jax.vmap(draw))(self._slot_keys())

  def _slot_keys(self) -> Key:
    """The key of every slot, [R, k]; slot 0's does not depend on k."""
    keys = jax.vmap(jax.random.fold_in)(self.keys, self.steps)
    slots = jnp.arange(self.slots)
    return jax.vmap(
      lambda key: jax.vmap(lambda j: jax.random.fold_in(key, j))(slots)
    )(keys)


# --- drawing -----------------------------------------------------------------


def invert_cdf(
  uniform: Float[Array, "*n"],
  logits: Float[Array, "*n V"],
  temperature: float,
  config: TokenConfig,
) -> Int[Array, "*n"]:
  """Draws one token of each distribution by inverting its CDF at `uniform`."""
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  probs = token_probs(logits, temperature, config)
  # A float32 cumulative sum may rise where a removed token adds nothing.
  cdf = jnp.where(probs > 0, jnp.cumsum(probs, axis=-1), 0.0)
  total = jnp.max(cdf, axis=-1, keepdims=True)
  reached = cdf > uniform[..., None] * total
  return jnp.argmax(reached, axis=-1).astype(jnp.int32)


def gumbel_max(
  gumbel: Float[Array, "*n V"],
  logits: Float[Array, "*n V"],
  temperature: float,
  config: TokenConfig,
) -> Int[Array, "*n"]:
  """Draws one token of each distribution: the largest of logits + noise."""
  if temperature > 0:
    logits = filter_logits(logits / max(temperature, 1e-5), config) + gumbel
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw_slots(
  draw_one: Callable,
  noise: Array,
  logits: Float[Array, "R k V"],
  config: TokenConfig,
) -> Int[Array, "R k"]:
  """Draws a token for every slot, drafts at a temperature of their own.

  Args:
    draw_one: `invert_cdf` or `gumbel_max`.
    noise: what it draws from, with the leading axes [R, k].
    logits: guided ones.
    config: temperatures and filters.
  """
  temperature, draft = config.temperature, config.draft_temperature
  if draft in (None, temperature) or logits.shape[1] == 1:
    return draw_one(noise, logits, temperature, config)
  first = draw_one(noise[:, :1], logits[:, :1], temperature, config)
  rest = draw_one(noise[:, 1:], logits[:, 1:], draft, config)
  return jnp.concatenate([first, rest], axis=1)


# --- rules -------------------------------------------------------------------


@runtime_checkable
class Earlier(Protocol):
  """Logits that earlier steps have predicted for the present positions."""

  def __call__(
    self, f: int, tokens: Int[Array, "R m F"], look: int = 1
  ) -> Float[Array, "R m _"]:
    """Logits of sub-token f at the first m slots, as of `look` steps ago.

    The position of slot j was slot j + look then. `tokens` are those of the m
    slots, of which the head reads the sub-tokens < f. The logits are guided
    with the scale of the present step, so they are directly comparable. Where a
    position was not in the window `look` steps ago, they are the present ones,
    and a difference of both is 0.
    """
    ...


@runtime_checkable
class DrawingRule(Protocol):
  """How tokens are drawn from guided logits, one sub-token at a time.

  A rule is hashable (a frozen dataclass with its options), and `draw` a pure
  function. All that it reads of earlier steps comes through `earlier`. The
  sampler keeps one entry of earlier looks for each image and position, which
  depends on the image's random numbers and its committed tokens before that
  position alone: a decoder may try positions, discard them, and write their
  entries again.
  """

  # How many steps back it asks `earlier` for, at the most. With 0 the sampler
  # keeps nothing.
  looks: ClassVar[int]

  def draw(
    self,
    f: int,
    noise: Noise,
    logits: Float[Array, "R k V"],
    tokens: Int[Array, "R k F"],
    earlier: Earlier,
    config: TokenConfig,
  ) -> Int[Array, "R k"]:
    """Draws sub-token f of every slot of R windows.

    The windows may be of different images or of different steps of one image;
    each is drawn by itself.

    Args:
      f: which sub-token.
      noise: random numbers, determined by image, step, slot and f.
      logits: the present, guided ones.
      tokens: the sub-tokens < f as drawn; the others are 0.
      earlier: logits that earlier steps have predicted for these positions.
      config: temperatures and filters of sub-token f.
    """
    ...


@dataclasses.dataclass(frozen=True)
class InverseCDF:
  """Temperature, top-k, top-p, then the CDF inverted at a uniform number."""

  looks: ClassVar[int] = 0

  def draw(self, f, noise, logits, tokens, earlier, config):
    del f, tokens, earlier
    return draw_slots(invert_cdf, noise.uniform(), logits, config)


@dataclasses.dataclass(frozen=True)
class GumbelMax:
  """Temperature, top-k, top-p, then the largest of logits + Gumbel noise."""

  looks: ClassVar[int] = 0

  def draw(self, f, noise, logits, tokens, earlier, config):
    del f, tokens, earlier
    gumbel = noise.gumbel(logits.shape[-1])
    return draw_slots(gumbel_max, gumbel, logits, config)


RULES: dict[str, DrawingRule] = {
  "inverse_cdf": InverseCDF(),
  "gumbel": GumbelMax(),
}


def find_rule(rule: str | DrawingRule) -> DrawingRule:
  """Returns the rule of a name of RULES; a rule itself is returned as it is."""
  if not isinstance(rule, str):
    return rule
  if rule not in RULES:
    raise ValueError(
      f"sampling draw={rule!r}: choose one of {tuple(RULES)}, or pass a"
      " DrawingRule."
    )
  return RULES[rule]
