"""What convolutional tokenizers are made of.

Convolution and group norm as PyTorch trains them, the residual block, and the
nearest rows of a codebook.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST  # TF32 products would change tokens.
# The fast variance, E[x^2] - E[x]^2, cancels digits where the mean is big.
GroupNorm = functools.partial(
  nnx.GroupNorm, epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32
)


class Conv(nnx.Conv):
  """`size` x `size`, with PyTorch's initialisation, U(-b, b), b = fan_in^-1/2.

  `upsample` doubles the image first, to the nearest neighbour. `options` are
  those of `nnx.Conv`; unless they say otherwise the image keeps its size.
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
  """For each latent the row of `table` at the least Euclidean distance."""
  lengths = jnp.sum(table**2, axis=-1)

  def nearest(row):
    dots = jnp.einsum("bcd,kd->bck", row, table, precision=HIGHEST)
    return jnp.argmin(lengths - 2 * dots, axis=-1).astype(jnp.int32)

  # Only 1/r of the distances are alive at once, and the batch axis, which may
  # be sharded, is left alone.
  return jax.lax.map(nearest, latents.swapaxes(0, 1)).swapaxes(0, 1)


class ResidualBlock(nnx.Module):
  """Two (norm, swish, 3x3) and a skip, by a 1x1 where the width changes.

  The 1x1 reads the block's input or, with `skip_branch`, the result of the
  branch, so that nothing skips there.
  """

  def __init__(
    self,
    inputs: int,
    width: int,
    *,
    norm_groups: int,
    dtype: str,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    skip_branch: bool = False,
  ):
    conv = functools.partial(Conv, use_bias=use_bias, dtype=dtype, rngs=rngs)
    self.norm1 = GroupNorm(inputs, norm_groups, rngs=rngs)
    self.conv1 = conv(inputs, width, 3)
    self.norm2 = GroupNorm(width, norm_groups, rngs=rngs)
    self.conv2 = conv(width, width, 3)
    self.skip_branch = skip_branch
    skipped = width if skip_branch else inputs
    widens = inputs != width
    self.shortcut = conv(skipped, width, 1) if widens else None

  def __call__(self, x: Array) -> Array:
    h = self.conv1(nnx.swish(self.norm1(x)))
    h = self.conv2(nnx.swish(self.norm2(h)))
    if self.shortcut is not None:
      x = self.shortcut(h if self.skip_branch else x)
    return h + x


def residual_blocks(
  widths: Sequence[int],
  *,
  norm_groups: int,
  dtype: str,
  rngs: nnx.Rngs,
  use_bias: bool = True,
  skip_branch: bool = False,
) -> nnx.List:
  """One residual block from each of the widths to the next."""
  return nnx.List(
    ResidualBlock(
      inputs,
      width,
      norm_groups=norm_groups,
      dtype=dtype,
      rngs=rngs,
      use_bias=use_bias,
      skip_branch=skip_branch,
    )
    for inputs, width in itertools.pairwise(widths)
  )
