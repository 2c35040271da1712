"""Checks of what comes from outside: numbers, seeds, images and tokens.

Every rule has its one home here. Shapes and types are checked always, values
only of arrays that are there: under `jax.jit` nothing is known of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

MAX_SEED = 2**32 - 1  # JAX and NumPy make other streams of 32 bits alone
# Decoded images overshoot [-1, 1] a little; bytes and 16-bit values by far.
OVERSHOOT = 2.0


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a number of a config may be, in words and as a test."""

  words: str
  holds: Callable[[float], bool]


POSITIVE = Rule("a finite number > 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Rule("a finite number >= 0", lambda x: 0 <= x < math.inf)
SHARE = Rule("a share, 0 to 1", lambda x: 0 <= x <= 1)
RATE = Rule("0 to < 1", lambda x: 0 <= x < 1)
COUNT = Rule("at least 1", lambda x: x >= 1)
MAX_IMAGES = 10**7  # of a request; papers measure 50,000
MAX_SIDE = 4096  # pixels of a resized image


def numbers(config: Any, rule: Rule, *names: str, where: str = "") -> None:
  """ValueError unless these attributes keep the rule; tuples in every entry.

  None passes. `where` stands in front of a name in the message.
  """
  for name in names:
    value = getattr(config, name)
    entries = value if isinstance(value, tuple) else (value,)
    if not all(entry is None or rule.holds(entry) for entry in entries):
      raise ValueError(f"{where}{name}={value}: expected {rule.words}.")


def seed(value: Any) -> int:
  """The seed; ValueError unless it is one of the 2**32 that differ."""
  whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
  if not whole or not 0 <= value <= MAX_SEED:
    raise ValueError(
      f"seed={value!r}: expected a whole number from 0 to 2**32 - 1; random"
      " numbers do not tell others apart."
    )
  return int(value)


def images(images: Any, channels: int) -> None:
  """ValueError unless these are images in [-1, 1], channels last."""
  shape = _shape(images, "images")
  if len(shape) != 4:
    raise ValueError(
      f"images of shape {shape}: expected [B, h, w, {channels}]; a single image"
      " is images[None]."
    )
  if shape[-1] != channels:
    advice = "convert them or set image_channels"
    if shape[1] == channels:
      advice = "these have them first: pass images.transpose(0, 2, 3, 1)"
    raise ValueError(
      f"images {shape}: expected {channels} channels in the last axis;"
      f" {advice}."
    )
  if not _is(images, jnp.floating):
    raise ValueError(
      f"images are {images.dtype}: expected floating-point numbers in [-1, 1];"
      " of bytes these are images / 127.5 - 1."
    )
  low, high = _extremes(images)
  if not -OVERSHOOT <= low <= high <= OVERSHOOT:
    raise ValueError(
      f"images reach from {low:g} to {high:g}: expected [-1, 1]; of numbers up"
      " to 255 these are images / 127.5 - 1. Clip decoded images."
    )


def bytes_of(images: Any) -> None:
  """ValueError unless these are images of bytes, 0 to 255."""
  _shape(images, "images")
  if images.dtype != np.uint8:
    raise ValueError(
      f"images are {images.dtype}: expected uint8, 0 to 255; of numbers in"
      " [-1, 1] these are clip(127.5 x + 128, 0, 255)."
    )


def windows(windows: Any, window: int, vocab_sizes: Sequence[int]) -> None:
  """ValueError unless these are windows [..., k, F] of tokens, k = `window`."""
  tokens(windows, vocab_sizes, "..., k, F")
  if windows.shape[-2:-1] != (window,):
    raise ValueError(
      f"windows of shape {windows.shape}: expected k = {window} slots in the"
      " last axis but one, as of this model."
    )


def tokens(
  tokens: Any, vocab_sizes: Sequence[int], axes: str = "..., F"
) -> None:
  """ValueError unless these are tokens of the vocabularies, F last.

  `axes` are all of them, as in "B, T, F"; dots stand for any number.
  """
  shape, factors = _shape(tokens, "tokens"), len(vocab_sizes)
  if not _is(tokens, jnp.integer):
    raise ValueError(f"tokens are {tokens.dtype}: expected integers.")
  rank = None if "..." in axes else axes.count(",") + 1
  if shape[-1:] != (factors,) or rank not in (None, len(shape)):
    lacks_one = factors == 1 and rank in (None, len(shape) + 1)
    advice = "take tokens and model of the same sizes"
    raise ValueError(
      f"tokens of shape {shape}: expected [{axes}] with F = {factors}, the"
      f" sub-tokens of the vocabularies {tuple(vocab_sizes)};"
      f" {'pass tokens[..., None]' if lacks_one else advice}."
    )
  for f, size in enumerate(vocab_sizes):
    low, high = _extremes(tokens[..., f])
    if low < 0 or high >= size:
      raise ValueError(
        f"token {int(low if low < 0 else high)}: expected 0 to {size - 1}; the"
        " tokens are of another tokenizer, or damaged."
      )


def _shape(array: Any, what: str) -> tuple[int, ...]:
  if not isinstance(array, jax.Array | np.ndarray):
    raise ValueError(
      f"{what} are a {type(array).__name__}: expected an array of JAX or NumPy."
    )
  return tuple(array.shape)


def _is(array: Any, kind: Any) -> bool:
  return bool(jnp.issubdtype(array.dtype, kind))


def _extremes(array: Any) -> tuple[float, float]:
  """(least, largest) value, NaN if one is; of unknown values (0, 0)."""
  if isinstance(array, jax.core.Tracer) or not array.size:
    return 0.0, 0.0
  if not getattr(array, "is_fully_addressable", True):
    return 0.0, 0.0
  values = np.asarray(array)
  return float(values.min()), float(values.max())
