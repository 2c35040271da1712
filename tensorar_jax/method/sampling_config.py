"""The settings of the sampler: temperature, guidance, filters, drawing rule."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from tensorar_jax.method import drawing
from tensorar_jax.method.drawing import DrawingRule, TokenConfig

DECODERS = ("window", "parallel")
GUESSES = ("last_row", "left", "above", "marginals")
_PER_SUB_TOKEN = {  # and the type of each
  "temperature": float,
  "draft_temperature": float,
  "guidance": float,
  "top_k": int,
  "top_p": float,
}


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How tokens are drawn.

  The starred attributes are one value, or one for each sub-token.

  Attributes:
    temperature*: divides the logits; 0 means argmax.
    draft_temperature*: the same for the slots >= 1; None: as the committed one.
    guidance*: scale s of uncond + s (cond - uncond): 1 is no guidance, 0 draws
      without the condition. Published settings may mean something else by small
      scales; see `unguided_scale`.
    guidance_power: p; the scale of token n of T is
      1 + (s - 1) (1 - cos(pi (n / T)^p)) / 2. 0 is s everywhere.
    guidance_interval: (first, end): only tokens first <= n < end are guided,
      the others see the conditional logits alone. None guides all.
    top_k*: keeps logits not below the k-th largest; 0 keeps all. Ties survive.
    top_p*: keeps the fewest tokens whose probability reaches p; 1 keeps all.
      Applied to what top-k left, the token that crosses p included.
    draw: how tokens are drawn from guided logits, a name of `drawing.RULES` or
      a `DrawingRule`.
    decoder: "window" takes a step of the backbone for each token; "parallel"
      guesses ahead and needs fewer, for the same tokens. It guesses best with
      draw="gumbel".
    rows: how many steps of an image the parallel decoder tries at once.
    first_guess: where its first guess of a token comes from: "last_row" draws
      from the newest prediction, "marginals" from how often each token occurs
      at that position, "left" and "above" repeat a neighbour.
    return_logits: whether `Samples.logits` is filled.
    unguided_scale: scales up to it stand for no guidance, as 1 does. None: no
      other scale does.
  """

  temperature: float | tuple[float, ...] = 1.0
  draft_temperature: float | tuple[float, ...] | None = None
  guidance: float | tuple[float, ...] = 1.0
  guidance_power: float = 0.0
  guidance_interval: tuple[int, int] | None = None
  top_k: int | tuple[int, ...] = 0
  top_p: float | tuple[float, ...] = 1.0
  draw: str | DrawingRule = "inverse_cdf"
  decoder: str = "window"
  rows: int = 16
  first_guess: str = "last_row"
  return_logits: bool = False
  unguided_scale: float | None = None

  def __post_init__(self):
    self._expect("temperature", lambda t: 0 <= t < np.inf, "0 (argmax) or more")
    self._expect(
      "draft_temperature", lambda t: 0 <= t < np.inf, "0 (argmax) or more"
    )
    whole = lambda k: k >= 0 and k % 1 == 0
    self._expect("top_k", whole, "a whole number, 0 (keep all) or more")
    self._expect("top_p", lambda p: 0 < p <= 1, "0 < top_p <= 1")
    self._expect("guidance", np.isfinite, "a finite scale")
    self._expect("unguided_scale", np.isfinite, "a finite scale, or None")
    self._expect("guidance_power", lambda p: 0 <= p < np.inf, "0 or more")
    # Plain numbers and tuples can be hashed, and equal ones are equal.
    for name, number in _PER_SUB_TOKEN.items():
      if (value := getattr(self, name)) is not None:
        many = np.ndim(value) > 0
        plain = tuple(map(number, value)) if many else number(value)
        object.__setattr__(self, name, plain)
    if self.guidance_interval is not None:
      first, end = self.guidance_interval
      if not 0 <= first <= end < np.inf or first % 1 or end % 1:
        raise ValueError(
          f"guidance_interval={self.guidance_interval}: expected whole numbers,"
          " 0 <= first <= end, the half-open range of guided tokens."
        )
      object.__setattr__(self, "guidance_interval", (int(first), int(end)))
    drawing.find_rule(self.draw)
    for name, choices in (("decoder", DECODERS), ("first_guess", GUESSES)):
      if getattr(self, name) not in choices:
        raise ValueError(
          f"sampling {name}={getattr(self, name)!r}: choose one of {choices}."
        )
    if self.rows < 1:
      raise ValueError(f"sampling rows={self.rows}: expected 1 or more.")

  def _expect(self, name, is_right, words):
    value = getattr(self, name)
    if value is not None and not all(map(is_right, np.atleast_1d(value))):
      raise ValueError(f"{name}={value}: expected {words}.")

  def check(self, factors: int) -> None:
    """Raises ValueError if a tuple has not one value for each sub-token."""
    for name in _PER_SUB_TOKEN:
      value = getattr(self, name)
      if isinstance(value, tuple) and len(value) != factors:
        raise ValueError(
          f"{name}={value}: this model has {factors} sub-tokens. Give one"
          " number, or one for each of them."
        )

  def sub_token(self, f: int) -> TokenConfig:
    """The settings of sub-token f alone."""

    def of_sub_token(value):
      return value[f] if isinstance(value, tuple) else value

    return TokenConfig(
      temperature=of_sub_token(self.temperature),
      draft_temperature=of_sub_token(self.draft_temperature),
      top_k=of_sub_token(self.top_k),
      top_p=of_sub_token(self.top_p),
    )

  @property
  def guided(self) -> bool:
    """Whether any sub-token has a guidance scale other than 1."""
    return bool((self._scale() != 1).any())

  def _scale(self) -> Float[np.ndarray, "..."]:
    """The scale, or one for each sub-token; 1 where it means no guidance."""
    scale, unguided = np.asarray(self.guidance), self.unguided_scale
    return scale if unguided is None else np.where(scale <= unguided, 1, scale)

  def guidance_scales(
    self, num_tokens: int, factors: int = 1
  ) -> Float[np.ndarray, "{num_tokens} {factors}"]:
    """The guidance scale of each sub-token; 1 where it is unguided.

    With the power-cosine rise (Yu et al., arXiv:2411.00776) the first token is
    unguided, and the last nearly has the whole scale.
    """
    token = np.arange(num_tokens)
    rise = (token / num_tokens) ** self.guidance_power  # 0^0 is 1: constant
    rise = (1 - np.cos(np.pi * rise)) / 2
    scale = np.broadcast_to(self._scale(), (factors,))
    scales = 1 + (scale - 1) * rise[:, None]
    if self.guidance_interval is not None:
      first, end = self.guidance_interval
      scales[(token < first) | (token >= end)] = 1.0
    return scales.astype(np.float32)
