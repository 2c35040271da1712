"""From logits to tokens: how each one is drawn.

logits -> guidance -> temperature -> top-k -> top-p -> one uniform number
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

_PER_SUB_TOKEN = {  # and the type of each
  "temperature": float,
  "draft_temperature": float,
  "guidance": float,
  "top_k": int,
  "top_p": float,
}
Guidance = float | tuple[float, ...]  # a scale, or one for each sub-token


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How tokens are drawn.

  The starred attributes are one value, or one for each sub-token.

  Attributes:
    temperature*: divides the logits; 0 means argmax.
    draft_temperature*: the same for the slots >= 1; None: as the committed one.
    guidance*: scale s of uncond + s (cond - uncond); 1 is no guidance.
    guidance_power: p; the scale of token n of T is
      1 + (s - 1) (1 - cos(pi (n / T)^p)) / 2. 0 is s everywhere.
    guidance_interval: (first, end): only tokens first <= n < end are guided,
      the others see the conditional logits alone. None guides all.
    top_k*: keeps logits not below the k-th largest; 0 keeps all. Ties survive.
    top_p*: keeps the fewest tokens whose probability reaches p; 1 keeps all.
      Applied to what top-k left, the token that crosses p included.
    return_logits: whether `Samples.logits` is filled.
  """

  temperature: float | tuple[float, ...] = 1.0
  draft_temperature: float | tuple[float, ...] | None = None
  guidance: float | tuple[float, ...] = 1.0
  guidance_power: float = 0.0
  guidance_interval: tuple[int, int] | None = None
  top_k: int | tuple[int, ...] = 0
  top_p: float | tuple[float, ...] = 1.0
  return_logits: bool = False

  def __post_init__(self):
    # Plain numbers and tuples can be hashed, and equal ones are equal.
    for name, kind in _PER_SUB_TOKEN.items():
      if (value := getattr(self, name)) is not None:
        many = np.ndim(value) > 0
        plain = tuple(map(kind, value)) if many else kind(value)
        object.__setattr__(self, name, plain)
    self._expect("temperature", lambda t: t >= 0, "0 (argmax) or more")
    self._expect("draft_temperature", lambda t: t >= 0, "0 (argmax) or more")
    self._expect("top_k", lambda k: k >= 0, "0 (keep all) or more")
    self._expect("top_p", lambda p: 0 < p <= 1, "0 < top_p <= 1")
    self._expect("guidance", np.isfinite, "a finite scale")
    self._expect("guidance_power", lambda p: 0 <= p < np.inf, "0 or more")
    if self.guidance_interval is not None:
      first, end = self.guidance_interval
      if not 0 <= first <= end:
        raise ValueError(
          f"guidance_interval={self.guidance_interval}: expected 0 <= first <="
          " end, the half-open range of guided tokens."
        )
      object.__setattr__(self, "guidance_interval", (int(first), int(end)))

  def _expect(self, name, is_right, words):
    value = getattr(self, name)
    if value is not None and not all(map(is_right, np.atleast_1d(value))):
      raise ValueError(f"{name}={value}: expected {words}.")

  def check(self, factors: int) -> None:
    """ValueError if a tuple has not one value for each of the sub-tokens."""
    for name in _PER_SUB_TOKEN:
      value = getattr(self, name)
      if isinstance(value, tuple) and len(value) != factors:
        raise ValueError(
          f"{name}={value}: this model has {factors} sub-tokens. Give one"
          " number, or one for each of them."
        )

  def sub_token(self, f: int) -> SamplingConfig:
    """The settings of sub-token f alone."""
    values = {name: getattr(self, name) for name in _PER_SUB_TOKEN}
    own = {n: v[f] for n, v in values.items() if isinstance(v, tuple)}
    return dataclasses.replace(self, **own)

  @property
  def guided(self) -> bool:
    return bool((np.asarray(self.guidance) != 1).any())


def parse_guidance(text: str) -> Guidance:
  """The scale of "1.5", or one for each sub-token of "4:6"."""
  try:
    scales = tuple(map(float, text.split(":")))
  except ValueError as error:
    raise ValueError(
      f"guidance {text!r}: expected a scale, such as 1.5, or one for each"
      " sub-token, such as 4:6."
    ) from error
  return scales[0] if len(scales) == 1 else scales


def guidance_text(scale: Guidance) -> str:
  """What `parse_guidance` reads."""
  return ":".join(f"{one:g}" for one in np.atleast_1d(scale))


def guidance_scales(
  config: SamplingConfig, num_tokens: int, factors: int = 1
) -> Float[np.ndarray, "T F"]:
  """The guidance scale of each sub-token; 1 where it is unguided.

  With the power-cosine rise (Yu et al., arXiv:2411.00776) the first token is
  unguided, and the last nearly has the whole scale.
  """
  token = np.arange(num_tokens)
  rise = (token / num_tokens) ** config.guidance_power  # 0^0 is 1: constant
  rise = (1 - np.cos(np.pi * rise)) / 2
  scale = np.broadcast_to(np.asarray(config.guidance), (factors,))
  scales = 1 + (scale - 1) * rise[:, None]
  if config.guidance_interval is not None:
    first, end = config.guidance_interval
    scales[(token < first) | (token >= end)] = 1.0
  return scales.astype(np.float32)


def guide(
  logits: Float[Array, "both *n V"], scale: Float[Array, ""]
) -> Float[Array, "half *n V"]:
  """uncond + scale (cond - uncond) of a [cond | uncond] batch; cond at 1."""
  cond, uncond = jnp.split(logits, 2)
  return jnp.where(scale == 1, cond, uncond + scale * (cond - uncond))


def filter_logits(
  logits: Float[Array, "*n V"], config: SamplingConfig
) -> Float[Array, "*n V"]:
  """The logits with what top-k and top-p remove at -inf; nothing is sorted."""
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
  """Whole numbers in the order of x: its bits, those of negatives flipped."""
  x = jnp.where(x == 0, 0.0, x).astype(jnp.float32)  # -0.0 is as large as 0.0
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  top = jnp.uint32(1 << 31)
  return jnp.where(bits >= top, ~bits, bits | top)


def _largest(holds: Callable, x: Array) -> UInt32[Array, "*n 1"]:
  """The largest number for which `holds`, found bit by bit.

  `holds` takes one for each row of x, and what holds does so for all below.
  """

  def body(i, number):
    higher = number | (jnp.uint32(1 << 31) >> i)
    return jnp.where(holds(higher), higher, number)

  start = jnp.zeros((*x.shape[:-1], 1), jnp.uint32)
  return jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32), body, start)


def token_probs(
  logits: Float[Array, "*n V"], temperature: float, config: SamplingConfig
) -> Float[Array, "*n V"]:
  """What a token is drawn from, after temperature (not 0), top-k and top-p."""
  logits = filter_logits(logits / max(temperature, 1e-5), config)
  return jax.nn.softmax(logits, axis=-1)


def draw_token(
  uniform: Float[Array, "*n"],
  logits: Float[Array, "*n V"],
  temperature: float,
  config: SamplingConfig,
) -> Int[Array, "*n"]:
  """One token of each distribution by inverting its CDF at `uniform`.

  One uniform number a token: V Gumbel numbers would cost more than the head.
  """
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  probs = token_probs(logits, temperature, config)
  # A float32 cumulative sum may rise where a removed token adds nothing.
  cdf = jnp.where(probs > 0, jnp.cumsum(probs, axis=-1), 0.0)
  total = jnp.max(cdf, axis=-1, keepdims=True)
  reached = cdf > uniform[..., None] * total
  return jnp.argmax(reached, axis=-1).astype(jnp.int32)


def draw_slots(
  uniform: Float[Array, "B k"],
  logits: Float[Array, "B k V"],
  config: SamplingConfig,
) -> Int[Array, "B k"]:
  """A token for every slot [B, k], drafts at a temperature of their own."""
  temperature, draft = config.temperature, config.draft_temperature
  if draft in (None, temperature) or logits.shape[1] == 1:
    return draw_token(uniform, logits, temperature, config)
  first = draw_token(uniform[:, :1], logits[:, :1], temperature, config)
  rest = draw_token(uniform[:, 1:], logits[:, 1:], draft, config)
  return jnp.concatenate([first, rest], axis=1)
