"""Tiny images whose pixels are the tokens: a tokenizer without parameters.

A value x in [-1, 1] becomes the level round((x + 1) / 2 * (levels - 1)), and
each image channel is one sub-token. It makes whole runs possible, offline and
exactly reversible, on data such as 8x8 digits of 17 levels.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tensorar_jax.interfaces import Rule
from tensorar_jax.nn import checks
from tensorar_jax.nn.image_tokenizer import check_length


@dataclasses.dataclass(frozen=True)
class Config:
  """Size of the images (height, width), and the levels of each channel."""

  image_size: tuple[int, int] = (8, 8)
  image_channels: int = 1
  levels: int = 17

  def __post_init__(self):
    # More than 256 levels could not all be told apart in uint8 images.
    if not 2 <= self.levels <= 256:
      raise ValueError(
        f"levels={self.levels}; expected 2 to 256, for example 17 for digits."
      )
    checks.numbers(self, checks.COUNT, "image_size", "image_channels")


VARIANTS: dict[str, Config] = {"digits": Config()}
SOURCES: dict[str, str] = {}


def import_rules(config: Config) -> list[Rule]:
  """Empty: there is nothing to import."""
  del config
  return []


class Model(nnx.Module):
  """The tokenizer; see `interfaces.Tokenizer`."""

  uint8_offset = 128.0

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    del rngs  # No parameters.
    self.config = config
    self.grid = config.image_size
    self.vocab_sizes = (config.levels,) * config.image_channels

  def encode(self, images: Float[Array, "B h w C"]) -> Int[Array, "B T C"]:
    """The level of every pixel; small excursions from [-1, 1] are clipped."""
    channels = self.config.image_channels
    checks.images(images, channels)
    top = self.config.levels - 1
    levels = jnp.round((images.astype(jnp.float32) + 1.0) / 2.0 * top)
    levels = jnp.clip(levels, 0, top).astype(jnp.int32)
    return levels.reshape(images.shape[0], -1, channels)

  def decode(
    self, tokens: Int[Array, "B T C"], grid: tuple[int, int] | None = None
  ) -> Float[Array, "B h w C"]:
    """Images in [-1, 1]; `grid` (height, width) where not `self.grid`."""
    rows, cols = grid = grid or self.grid
    checks.tokens(tokens, self.vocab_sizes, "B, T, F")
    check_length(tokens, grid)
    levels = tokens.reshape(tokens.shape[0], rows, cols, tokens.shape[-1])
    return levels.astype(jnp.float32) / (self.config.levels - 1) * 2.0 - 1.0
