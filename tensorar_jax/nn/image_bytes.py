"""Images as bytes and as numbers in [-1, 1], and the way from one to the other.

There are two ways from bytes, which differ in the last bit of some values. Each
belongs to what was trained, or to tokens that were made, with it.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from tensorar_jax.nn import checks


def from_uint8(
  images: UInt8[Array | np.ndarray, "*n h w C"],
) -> Float32[Array, "*n h w C"]:
  """Bytes -> [-1, 1] as x / 127.5 - 1: what is trained here."""
  checks.bytes_of(images)
  return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def normalise(
  images: UInt8[Array | np.ndarray, "*n h w C"],
) -> Float32[Array | np.ndarray, "*n h w C"]:
  """Bytes -> [-1, 1] as (x / 255 - 0.5) / 0.5: what published codes tokenize.

  An array on the host stays there.
  """
  checks.bytes_of(images)
  return (images.astype(np.float32) / 255 - 0.5) / 0.5


def to_uint8(
  images: Float[Array, "B h w C"], offset: float
) -> UInt8[Array, "B h w C"]:
  """[-1, 1] -> bytes: 127.5 x + offset, clipped, truncated.

  An offset of 128 rounds, 127.5 truncates. Published codes differ, and so do
  `Tokenizer`s in their `uint8_offset`.
  """
  return jnp.clip(127.5 * images + offset, 0, 255).astype(jnp.uint8)
