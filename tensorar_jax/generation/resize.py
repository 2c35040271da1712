"""Bicubic resizing as PyTorch's `interpolate` does it, for evaluation.

Output pixel i lies at x = (i + 1/2) in / out - 1/2 of the input and mixes the
four pixels around x with Keys' kernel, a = -3/4, at any scale: shrinking does
not smooth, and edge pixels are repeated outwards. `jax.image.resize` has
a = -1/2, leaves out pixels beyond the edge, and smooths. Published numbers at
384 pixels were measured on images resized in this way.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

A = -0.75


def resize_bicubic(
  images: Float[Array, "B h w C"], size: tuple[int, int]
) -> Float[Array, "B H W C"]:
  """Resizes images to `size` (height, width), without clipping values."""
  if min(*size, *images.shape[1:3]) < 1:
    raise ValueError(
      f"cannot resize images {images.shape} to {size}; expected positive sizes"
    )
  highest = jax.lax.Precision.HIGHEST
  rows, cols = (_weights(*ends) for ends in zip(images.shape[1:3], size))
  images = jnp.einsum("Hh,bhwc->bHwc", rows, images, precision=highest)
  return jnp.einsum("Ww,bHwc->bHWc", cols, images, precision=highest)


def _weights(inputs: int, outputs: int) -> Float32[np.ndarray, "o i"]:
  """The share of every input pixel in every output pixel; rows sum to 1."""
  x = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
  first = np.floor(x).astype(int)
  weights = np.zeros((outputs, inputs))
  for offset in (-1, 0, 1, 2):
    pixel = np.clip(first + offset, 0, inputs - 1)
    np.add.at(
      weights, (np.arange(outputs), pixel), _kernel(x - (first + offset))
    )
  return weights.astype(np.float32)


def _kernel(distance: np.ndarray) -> np.ndarray:
  """Keys' cubic convolution kernel, zero from distance 2 on."""
  d = np.abs(distance)
  near = ((A + 2) * d - (A + 3)) * d**2 + 1
  far = A * (((d - 5) * d + 8) * d - 4)
  return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
