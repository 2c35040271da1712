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
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tensorar_jax.interfaces import CONV, Rule
from tensorar_jax.nn import checks
from tensorar_jax.nn.convolutions import Conv, GroupNorm, residual_blocks
from tensorar_jax.nn.image_tokenizer import (
  Codebook,
  CodebookTokenizer,
  Images,
  Latents,
  Levels,
  check_norm_groups,
)


@dataclasses.dataclass(frozen=True)
class Config(Levels):
  """Sizes of the network; the defaults are the published ones.

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
    self.check("code_dim", "codebook_size")
    widths = (self.channels, *self.widths)
    check_norm_groups(self.norm_groups, widths)
    checks.numbers(self, checks.NOT_NEGATIVE, "codebook_weight")


VARIANTS: dict[str, Config] = {"f16": Config()}
SOURCES: dict[str, str] = {"maskgit-vqgan-imagenet-f16-256.bin": "f16"}


def _blocks(widths: Sequence[int], config: Config, rngs: nnx.Rngs) -> nnx.List:
  """Residual blocks without biases; as published, they skip the branch."""
  return residual_blocks(
    widths,
    norm_groups=config.norm_groups,
    dtype=config.dtype,
    rngs=rngs,
    use_bias=False,
    skip_branch=True,
  )


class Level(nnx.Module):
  """Residual blocks of one resolution, and the way to the next one.

  `resample` "down" takes means of 2x2, "up" doubles and convolves, "" does
  nothing.
  """

  def __init__(
    self,
    inputs: int,
    width: int,
    resample: str,
    config: Config,
    rngs: nnx.Rngs,
  ):
    widths = [inputs] + [width] * config.num_res_blocks
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
    pixel, latent = config.image_channels, config.code_dim
    # A level starts from what the level before it, in its own order, ends with.
    if decoder:
      first, last = widths[-1], widths[0]
      inputs, resamples = [*widths[1:], first], [""] + ["up"] * halvings
      self.conv_in = conv(latent, first, 3)
    else:
      first, last = config.channels, widths[-1]
      inputs, resamples = [first, *widths[:-1]], ["down"] * halvings + [""]
      self.conv_in = conv(pixel, first, 3, use_bias=False)
    self.decoder = decoder
    self.levels = nnx.List(
      Level(old, new, resample, config, rngs)
      for old, new, resample in zip(inputs, widths, resamples, strict=True)
    )
    lowest = [widths[-1]] * (config.num_res_blocks + 1)
    self.mid = _blocks(lowest, config, rngs)
    self.norm_out = GroupNorm(last, config.norm_groups, rngs=rngs)
    outputs, size = (pixel, 3) if decoder else (latent, 1)
    self.conv_out = conv(last, outputs, size)

  def steps(self) -> Iterator[tuple[str, Callable[[Array], Array]]]:
    """Every part in order, named by its path, for `__call__` and for taps."""
    levels = [(f"levels/{i}", level) for i, level in enumerate(self.levels)]
    mid = [(f"mid/{i}", block) for i, block in enumerate(self.mid)]
    yield "conv_in", self.conv_in
    yield from [*mid, *levels[::-1]] if self.decoder else [*levels, *mid]
    yield "conv_out", lambda x: self.conv_out(nnx.swish(self.norm_out(x)))

  def __call__(self, x: Array) -> Array:
    for _, step in self.steps():
      x = step(x)
    return x


class Model(CodebookTokenizer):
  """The tokenizer; see `interfaces.Tokenizer` and `interfaces.Trainable`.

  The network itself works on [0, 1]; images come and go in [-1, 1].
  """

  uint8_offset = 127.5  # Bytes are truncated, not rounded, as published.

  config: Config

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.grid = config.grid_of(*config.image_size)
    self.vocab_sizes = (config.codebook_size,)
    self.encoder = Stack(config, decoder=False, rngs=rngs)
    shape = (config.codebook_size, config.code_dim)
    bound = 1 / config.codebook_size
    self.quantizer = Codebook(
      jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound),
      # The published weight is on the codebook; others have it on commitment.
      codebook_weight=config.codebook_weight,
    )
    self.decoder = Stack(config, decoder=True, rngs=rngs)

  def latents(self, images: Images) -> Latents:
    """The latents of images: float32."""
    self.check_images(images)
    return self.encoder((images + 1) / 2).astype(jnp.float32)

  def pixels(self, latents: Latents) -> Images:
    """The image of quantised latents: float32, not clipped."""
    return 2 * self.decoder(latents).astype(jnp.float32) - 1


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
  bare = {}  # convolutions without a bias
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
