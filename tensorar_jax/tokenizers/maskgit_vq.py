"""The MaskGIT-VQGAN tokenizer of RAR: a convolutional VQGAN, free codes.

An encoder of residual blocks halves the image `len(channel_multipliers) - 1`
times and gives each position `code_dim` numbers z. Its token is the nearest row
of the codebook W, neither normalised; the decoder mirrors the encoder:

  token = argmin_k | z - W_k |^2,     latent = W_token

There is no attention and no projection between the network and the codebook.
Source: bytedance/1d-tokenizer (arXiv:2411.00776), after MaskGIT
(arXiv:2202.04200).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tensorar_jax.interfaces import CONV, Batch, Key, Rule
from tensorar_jax.nn import convolutions
from tensorar_jax.nn.convolutions import Conv, Grid, GroupNorm

Images = Float[Array, "B h w C"]
Tokens = Int[Array, "B T 1"]
Codes = Int[Array, "B r c"]  # the same on the grid of r rows and c columns
Latents = Float[Array, "B r c d"]
Scalar = Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the network; the defaults are the published ones.

  Level i is `channels * channel_multipliers[i]` wide, highest resolution first.
  `num_res_blocks` is that of each level and of the middle. `image_size`
  (height, width) only sets `grid`; the weights fit other sizes.
  """

  channels: int = 128
  channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2
  code_dim: int = 256
  codebook_size: int = 1024
  norm_groups: int = 32
  image_channels: int = 3
  image_size: tuple[int, int] = (256, 256)
  codebook_weight: float = 0.25
  dtype: str = "float32"

  def __post_init__(self):
    widths = (self.channels, *self.widths)
    convolutions.check_norm_groups(self.norm_groups, widths)
    self.grid_of(*self.image_size)

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of every level, from the highest resolution to the lowest."""
    return tuple(self.channels * m for m in self.channel_multipliers)

  def grid_of(self, height: int, width: int) -> Grid:
    """Rows and columns of tokens; ValueError where the image does not fit."""
    side = 2 ** (len(self.channel_multipliers) - 1)
    return convolutions.token_grid(height, width, side)


VARIANTS: dict[str, Config] = {"f16": Config()}
SOURCES: dict[str, str] = {"maskgit-vqgan-imagenet-f16-256.bin": "f16"}


class ResidualBlock(nnx.Module):
  """Two (norm, swish, 3x3) and a skip.

  Where the width changes nothing skips: as published, the 1x1 `shortcut` sees
  the result of the branch and not the block's input.
  """

  def __init__(self, inputs: int, width: int, config: Config, rngs: nnx.Rngs):
    conv = functools.partial(
      Conv, use_bias=False, dtype=config.dtype, rngs=rngs
    )
    self.norm1 = GroupNorm(inputs, config.norm_groups, rngs=rngs)
    self.conv1 = conv(inputs, width, 3)
    self.norm2 = GroupNorm(width, config.norm_groups, rngs=rngs)
    self.conv2 = conv(width, width, 3)
    self.shortcut = conv(width, width, 1) if inputs != width else None

  def __call__(self, x: Array) -> Array:
    h = self.conv1(nnx.swish(self.norm1(x)))
    h = self.conv2(nnx.swish(self.norm2(h)))
    return h + (x if self.shortcut is None else self.shortcut(h))


def _blocks(widths, config, rngs) -> nnx.List:
  """One residual block from each width to the next."""
  pairs = itertools.pairwise(widths)
  return nnx.List(ResidualBlock(*pair, config, rngs) for pair in pairs)


class Level(nnx.Module):
  """Residual blocks of one resolution, and the way to the next one.

  `resample` "down" takes means of 2x2, "up" doubles and convolves.
  """

  def __init__(self, inputs, width, config, rngs, resample):
    widths = (inputs, *(width,) * config.num_res_blocks)
    self.blocks = _blocks(widths, config, rngs)
    self.down = resample == "down"
    up = functools.partial(Conv, upsample=True, dtype=config.dtype, rngs=rngs)
    self.upsample = up(width, width, 3) if resample == "up" else None

  def __call__(self, x: Array) -> Array:
    for block in self.blocks:
      x = block(x)
    x = nnx.avg_pool(x, (2, 2), (2, 2)) if self.down else x
    return x if self.upsample is None else self.upsample(x)


class Stack(nnx.Module):
  """The encoder, or its mirror image, the decoder.

  Encoder: levels 0 to the last, `mid`. Decoder: `mid`, levels from the last to
  0. Level 0 always has the resolution of the image.
  """

  def __init__(self, config: Config, decoder: bool, rngs: nnx.Rngs):
    widths, halvings = config.widths, len(config.widths) - 1
    conv = functools.partial(Conv, dtype=config.dtype, rngs=rngs)
    ends = config.image_channels, config.code_dim
    # A level starts from what the level before it, in its own order, ends with.
    if decoder:
      first, last = widths[-1], widths[0]
      inputs, resamples = (*widths[1:], first), ("", *("up",) * halvings)
    else:
      first, last = config.channels, widths[-1]
      inputs, resamples = (first, *widths[:-1]), (*("down",) * halvings, "")
    self.decoder = decoder
    self.conv_in = conv(ends[decoder], first, 3, use_bias=decoder)
    self.levels = nnx.List(
      Level(*sizes, config, rngs, resample)
      for *sizes, resample in zip(inputs, widths, resamples, strict=True)
    )
    self.mid = _blocks(
      (widths[-1],) * (config.num_res_blocks + 1), config, rngs
    )
    self.norm_out = GroupNorm(last, config.norm_groups, rngs=rngs)
    self.conv_out = conv(last, ends[not decoder], 3 if decoder else 1)

  def steps(self) -> Iterator[tuple[str, Callable[[Array], Array]]]:
    """Every part in order, named by its path; one by one they give taps."""
    levels = [(f"levels/{i}", level) for i, level in enumerate(self.levels)]
    mid = [(f"mid/{i}", block) for i, block in enumerate(self.mid)]
    yield "conv_in", self.conv_in
    yield from [*mid, *levels[::-1]] if self.decoder else [*levels, *mid]
    yield "conv_out", lambda x: self.conv_out(nnx.swish(self.norm_out(x)))

  def __call__(self, x: Array) -> Array:
    for _, step in self.steps():
      x = step(x)
    return x


class Quantizer(nnx.Module):
  """The codebook: nearest row, look-up, and the losses that train both sides.

  codebook    mean |W_k - sg z|^2     times codebook_weight
  commitment  mean |sg W_k - z|^2

  The published weight is on the codebook, where others have it on commitment.
  """

  def __init__(self, config: Config, rngs: nnx.Rngs):
    shape = (config.codebook_size, config.code_dim)
    bound = 1 / config.codebook_size
    self.codebook = nnx.Param(
      jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
    )
    self.config = config

  def lookup(self, codes: Int[Array, "*n"]) -> Float[Array, "*n d"]:
    """The rows of codes; one beyond the codebook gives NaN."""
    return jnp.take(self.codebook[...], codes, axis=0, mode="fill")

  def nearest(self, latents: Latents) -> Codes:
    """The code of each latent."""
    return convolutions.nearest_rows(latents, self.codebook[...])

  def __call__(self, latents: Latents) -> tuple[Codes, Latents, dict]:
    """Codes, rows with straight-through gradient, losses times weights."""
    stop = jax.lax.stop_gradient
    codes = self.nearest(stop(latents))
    rows = self.lookup(codes)
    codebook = jnp.mean((rows - stop(latents)) ** 2)
    losses = {"codebook": self.config.codebook_weight * codebook}
    losses["commitment"] = jnp.mean((stop(rows) - latents) ** 2)
    return codes, latents + stop(rows - latents), losses


class Model(nnx.Module):
  """The tokenizer; see `interfaces.Tokenizer` and `interfaces.Trainable`.

  The network itself works on [0, 1]; images come and go in [-1, 1].
  """

  uint8_offset = 127.5  # Bytes are cut off, not rounded, as published.

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.grid = config.grid_of(*config.image_size)
    self.vocab_sizes = (config.codebook_size,)
    self.encoder = Stack(config, decoder=False, rngs=rngs)
    self.quantizer = Quantizer(config, rngs)
    self.decoder = Stack(config, decoder=True, rngs=rngs)

  def latents(self, images: Images) -> Latents:
    """What the quantiser sees: float32."""
    self.config.grid_of(*images.shape[1:3])
    convolutions.check_channels(images, self.config.image_channels)
    return self.encoder((images + 1) / 2).astype(jnp.float32)

  def pixels(self, latents: Latents) -> Images:
    """The image behind quantised latents: float32, not clipped."""
    return 2 * self.decoder(latents).astype(jnp.float32) - 1

  def encode(self, images: Images) -> Tokens:
    """Tokens of images in [-1, 1], of every size the down-sampling divides."""
    codes = self.quantizer.nearest(self.latents(images))
    return codes.reshape(images.shape[0], -1, 1)

  def decode(self, tokens: Tokens, grid: Grid | None = None) -> Images:
    """Images, not clipped; `grid` is (rows, cols), by default `self.grid`."""
    grid = grid or self.grid
    convolutions.check_length(tokens, grid)
    return self.pixels(self.quantizer.lookup(tokens.reshape(-1, *grid)))

  def loss(self, batch: Batch, rng: Key) -> tuple[Scalar, dict[str, Scalar]]:
    """Mean squared error plus the quantiser's losses, of uint8 images."""
    del rng  # No dropout: the published model trains without it.
    images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
    _, latents, losses = self.quantizer(self.latents(images))
    mse = jnp.mean((self.pixels(latents) - images) ** 2)
    return mse + sum(losses.values()), losses | {"mse": mse}


def import_rules(config: Config) -> list[Rule]:
  """Published names -> paths of `Model`."""
  del config  # The names say level and block.
  side, n = r"(?P<side>encoder|decoder)", r"(?P<n>\d+)"
  level = r"(?P<level>\d+)"
  norms = {rf"{side}\.norm_out": "{side}/norm_out"}
  convs = {  # with a bias, but for the encoder's conv_in
    rf"{side}\.(?P<end>conv_in|conv_out)": "{side}/{end}",
    rf"decoder\.up\.{level}\.upsample_conv": "decoder/levels/{level}/upsample",
  }
  bare = {}  # convolutions without
  for source, target in (
    (rf"{side}\.mid\.{n}", "{side}/mid/{n}"),
    (
      rf"encoder\.down\.{level}\.block\.{n}",
      "encoder/levels/{level}/blocks/{n}",
    ),
    (rf"decoder\.up\.{level}\.block\.{n}", "decoder/levels/{level}/blocks/{n}"),
  ):
    norms[rf"{source}\.(?P<part>norm[12])"] = target + "/{part}"
    bare[rf"{source}\.(?P<part>conv[12])"] = target + "/{part}"
    bare[rf"{source}\.nin_shortcut"] = target + "/shortcut"
  kernels = convs | bare
  return [
    *(Rule(rf"{s}\.weight", f"{t}/scale") for s, t in norms.items()),
    *(Rule(rf"{s}\.weight", f"{t}/kernel", CONV) for s, t in kernels.items()),
    *(Rule(rf"{s}\.bias", f"{t}/bias") for s, t in (norms | convs).items()),
    Rule(r"quantize\.embedding\.weight", "quantizer/codebook"),
  ]
