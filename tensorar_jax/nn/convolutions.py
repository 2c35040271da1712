"""Parts of the convolutional tokenizers, and the checks that they share.

Convolution and group norm as PyTorch trains them, the nearest rows of a
codebook, and errors for images and tokens of the wrong shape.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST  # TF32 products would change tokens.
# The fast variance, E[x^2] - E[x]^2, cancels digits where the mean is big.
GroupNorm = functools.partial(
  nnx.GroupNorm, epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32
)
Grid = tuple[int, int]  # rows, columns


class Conv(nnx.Conv):
  """A `size` x `size` convolution, initialised as by PyTorch.

  That is U(-b, b) with b = fan_in^-1/2. `upsample` doubles the image first, to
  the nearest neighbour. `options` are those of `nnx.Conv`; by default the image
  keeps its size.
  """

  def __init__(self, inputs, outputs, size, *, rngs, upsample=False, **options):
    def uniform(key, shape, dtype, bound=(inputs * size * size) ** -0.5):
      return jax.random.uniform(key, shape, dtype, -bound, bound)

    options |= {"kernel_init": uniform, "bias_init": uniform}
    options |= {"precision": HIGHEST, "rngs": rngs}
    self.upsample = upsample
    super().__init__(inputs, outputs, (size, size), **options)

  def __call__(self, x: Array) -> Array:
    return super().__call__(x.repeat(2, 1).repeat(2, 2) if self.upsample else x)


def nearest_rows(
  latents: Float[Array, "B r c d"], table: Float[Array, "V d"]
) -> Int[Array, "B r c"]:
  """Returns for each latent the row of `table` at the least distance."""
  lengths = jnp.sum(table**2, axis=-1)

  def nearest(row):
    dots = jnp.einsum("bcd,kd->bck", row, table, precision=HIGHEST)
    return jnp.argmin(lengths - 2 * dots, axis=-1).astype(jnp.int32)

  # Only 1/r of the distances are alive at once, and the batch axis, which may
  # be sharded, is left alone.
  return jax.lax.map(nearest, latents.swapaxes(0, 1)).swapaxes(0, 1)


def token_grid(height: int, width: int, side: int) -> Grid:
  """Returns rows and columns of tokens of side x side pixels each."""
  if min(height, width) < side or height % side or width % side:
    raise ValueError(
      f"image size {height}x{width}: expected multiples of {side}; crop or"
      " resize the images, or change the number of channel_multipliers."
    )
  return height // side, width // side


def check_norm_groups(norm_groups: int, widths: tuple[int, ...]) -> None:
  """Raises ValueError unless `norm_groups` divides every width."""
  if bad := [width for width in widths if width % norm_groups]:
    raise ValueError(
      f"norm_groups={norm_groups} does not divide the level widths {bad}"
      f"; choose a divisor of all, for example {math.gcd(*widths)}."
    )


def check_channels(images: Array, channels: int) -> None:
  """Raises ValueError unless the images have `channels` channels."""
  if images.shape[-1] != channels:
    raise ValueError(
      f"images {images.shape}: expected {channels} channels in the last axis;"
      " convert them or set image_channels."
    )


def check_length(tokens: Array, grid: Grid) -> None:
  """Raises ValueError unless the tokens [B, T, F] fill the grid."""
  if tokens.shape[1] != math.prod(grid):
    raise ValueError(
      f"tokens {tokens.shape}: expected {math.prod(grid)} per image for the"
      f" grid {grid}; pass the grid (rows, cols) of the encoded images."
    )
