"""What the tokenizers of images share: sizes, checks, encode, decode, loss.

A family has a network of its own; here is what surrounds it:

  images -> latents -> tokens       `encode`, in any size that the levels divide
  tokens -> latents -> images       `decode`

and, for those with a learnt codebook, the quantiser and the loss.
"""

from __future__ import annotations

import abc
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tensorar_jax.interfaces import Batch, Key
from tensorar_jax.nn import checks, convolutions
from tensorar_jax.nn.image_bytes import from_uint8

Grid = tuple[int, int]  # rows, columns
Images = Float[Array, "B h w C"]
Tokens = Int[Array, "B T F"]
Codes = Int[Array, "B r c"]  # one sub-token on a grid of r rows and c columns
Latents = Float[Array, "B r c d"]
Scalar = Float[Array, ""]


class Levels:
  """Sizes of a network that halves its image from level to level.

  A base of a family's `Config`. Level i is `channels * channel_multipliers[i]`
  wide, highest resolution first.
  """

  channels: int
  channel_multipliers: tuple[int, ...]
  num_res_blocks: int
  norm_groups: int
  image_channels: int
  image_size: tuple[int, int]

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of every level, from the highest resolution to the lowest."""
    return tuple(self.channels * m for m in self.channel_multipliers)

  def check(self, *sizes: str) -> None:
    """ValueError unless all sizes are at least 1 and an image fits.

    `sizes` are those of the family beside the ones here.
    """
    own = ("channels", "channel_multipliers", "num_res_blocks", "norm_groups")
    own += ("image_channels", "image_size")
    checks.numbers(self, checks.COUNT, *own, *sizes)
    if not self.channel_multipliers:
      raise ValueError("channel_multipliers=(): expected at least one level.")
    self.grid_of(*self.image_size)

  def grid_of(self, height: int, width: int) -> Grid:
    """Rows and columns of tokens; ValueError where the image does not fit."""
    side = 2 ** (len(self.channel_multipliers) - 1)
    return token_grid(height, width, side)


# --- checks ----------------------------------------------------------------


def token_grid(height: int, width: int, side: int) -> Grid:
  """Rows and columns of tokens, each of which stands for side x side pixels."""
  if min(height, width) < side or height % side or width % side:
    raise ValueError(
      f"image size {height}x{width}: expected multiples of {side}; crop or"
      " resize the images, or change the number of channel_multipliers."
    )
  return height // side, width // side


def check_norm_groups(norm_groups: int, widths: tuple[int, ...]) -> None:
  """ValueError unless `norm_groups` divides every width."""
  if bad := [width for width in widths if width % norm_groups]:
    raise ValueError(
      f"norm_groups={norm_groups} does not divide the level widths {bad}"
      f"; choose a divisor of all, for example {math.gcd(*widths)}."
    )


def check_length(tokens: Array, grid: Grid) -> None:
  """ValueError unless the tokens [B, T, F] fill the grid."""
  if tokens.shape[1] != math.prod(grid):
    raise ValueError(
      f"tokens {tokens.shape}: expected {math.prod(grid)} per image for the"
      f" grid {grid}; pass the grid (rows, cols) of the encoded images."
    )


# --- tokenizers ------------------------------------------------------------


class ImageTokenizer(nnx.Module):
  """Encodes and decodes by a family's network and quantiser.

  A family sets the attributes and has the four methods below.
  """

  config: Levels
  grid: Grid
  vocab_sizes: tuple[int, ...]

  @abc.abstractmethod
  def latents(self, images: Images) -> Latents:
    """What the quantiser sees: float32."""

  @abc.abstractmethod
  def pixels(self, latents: Latents) -> Images:
    """The image of quantised latents: float32, not clipped."""

  @abc.abstractmethod
  def quantize(self, latents: Latents) -> Int[Array, "B r c F"]:
    """The token of each latent."""

  @abc.abstractmethod
  def lookup(self, tokens: Int[Array, "B r c F"]) -> Latents:
    """The latent of each token."""

  def check_images(self, images: Images) -> None:
    """ValueError unless these are images that the network can read."""
    checks.images(images, self.config.image_channels)
    self.config.grid_of(*images.shape[1:3])

  def encode(self, images: Images) -> Tokens:
    """Tokens of images in [-1, 1], of every size the down-sampling divides.

    ValueError for other types, layouts and, outside of `jax.jit`, ranges.
    """
    tokens = self.quantize(self.latents(images))
    return tokens.reshape(images.shape[0], -1, tokens.shape[-1])

  def decode(self, tokens: Tokens, grid: Grid | None = None) -> Images:
    """Images, not clipped; `grid` is (rows, cols), by default `self.grid`.

    ValueError for tokens of another shape and, outside of `jax.jit`, for those
    beyond the codebook; inside, they become NaN.
    """
    grid = grid or self.grid
    checks.tokens(tokens, self.vocab_sizes, "B, T, F")
    check_length(tokens, grid)
    return self.pixels(self.lookup(tokens.reshape(-1, *grid, tokens.shape[-1])))


class Codebook(nnx.Module):
  """Learnt rows W_k: the nearest to a latent z, and the losses of both.

  codebook    mean |W_k - sg z|^2   times codebook_weight
  commitment  mean |sg W_k - z|^2   times commitment_weight

  sg stops the gradient. With `unit_length` rows and latents are first scaled
  to it, here and wherever they are compared.
  """

  def __init__(
    self,
    rows: Float[Array, "V d"],
    *,
    unit_length: bool = False,
    codebook_weight: float = 1.0,
    commitment_weight: float = 1.0,
  ):
    self.unit_length = unit_length
    self.codebook_weight = codebook_weight
    self.commitment_weight = commitment_weight
    self.codebook = nnx.Param(self.scaled(rows))

  def scaled(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """The vectors as they are compared."""
    return unit(x) if self.unit_length else x

  def lookup(self, codes: Int[Array, "*n"]) -> Float[Array, "*n d"]:
    """The rows of codes; one beyond the codebook gives NaN."""
    rows = jnp.take(self.codebook[...], codes, axis=0, mode="fill")
    return self.scaled(rows)

  def nearest(self, latents: Latents) -> Codes:
    """The code of each latent."""
    table = self.scaled(self.codebook[...])
    return convolutions.nearest_rows(self.scaled(latents), table)

  def __call__(
    self, latents: Latents
  ) -> tuple[Codes, Latents, dict[str, Scalar]]:
    """(codes, rows with straight-through gradient, losses times weights)."""
    stop = jax.lax.stop_gradient
    codes = self.nearest(stop(latents))
    z, rows = self.scaled(latents), self.lookup(codes)
    commitment = jnp.mean((stop(rows) - z) ** 2)
    codebook = jnp.mean((rows - stop(z)) ** 2)
    losses = {
      "commitment": self.commitment_weight * commitment,
      "codebook": self.codebook_weight * codebook,
      **self.further_losses(z),
    }
    return codes, z + stop(rows - z), losses

  def further_losses(self, z: Latents) -> dict[str, Scalar]:
    """Other losses of the scaled latents, times weights; here none."""
    del z
    return {}


def unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
  """Rows of unit length; a zero row stays zero and its gradient finite."""
  return x / jnp.sqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), 1e-24))


class CodebookTokenizer(ImageTokenizer):
  """A tokenizer whose `quantizer` is a `Codebook`: one sub-token each."""

  quantizer: Codebook

  def quantize(self, latents: Latents) -> Int[Array, "B r c 1"]:
    return self.quantizer.nearest(latents)[..., None]

  def lookup(self, tokens: Int[Array, "B r c 1"]) -> Latents:
    return self.quantizer.lookup(tokens[..., 0])

  def loss(self, batch: Batch, rng: Key) -> tuple[Scalar, dict[str, Scalar]]:
    """Mean squared error plus the quantiser's losses, of uint8 images."""
    del rng  # No dropout: the published models train without it.
    images = from_uint8(batch["image"])
    codes, latents, losses = self.quantizer(self.latents(images))
    mse = jnp.mean((self.pixels(latents) - images) ** 2)
    metrics = self.metrics(codes, losses) | {"mse": mse}
    return mse + sum(losses.values()), metrics

  def metrics(
    self, codes: Codes, losses: dict[str, Scalar]
  ) -> dict[str, Scalar]:
    """What to report of a batch's codes and of the quantiser's losses."""
    del codes
    return losses
