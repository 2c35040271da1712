"""The VQ tokenizer of LlamaGen and Janus: a convolutional VQGAN, codes of unit norm.

An encoder halves the image `len(channel_multipliers) - 1` times, a 1x1
convolution brings each position down to `code_dim` numbers z, and the token of
the position is the nearest row of the codebook W once both have unit length:

  token = argmin_k |z/|z| - W_k/|W_k||^2,     latent = W_token / |W_token|

The decoder mirrors the encoder. Training adds, to the reconstruction error, the
codebook, commitment and entropy losses of `Quantizer.__call__`.

Source: FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py
(arXiv:2406.06525); Janus uses the same network and weights layout. The network
is that of taming-transformers (arXiv:2012.09841).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from tensorar_jax.interfaces import CONV, Batch, Key, Rule

# float32 has to mean float32 on TPUs and on GPUs with TF32 too: tokens computed
# with rounded products are not the published ones.
HIGHEST = jax.lax.Precision.HIGHEST
# Of the softmax over codes in the entropy loss.
ENTROPY_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the network; the defaults are LlamaGen's VQ-16.

  The width of level i is `channels * channel_multipliers[i]`, from the highest
  resolution to the lowest. `image_size` (height, width) only sets `grid`: the
  weights fit any size that the down-sampling divides. `entropy_weight` (0 in
  the published models) is the remedy against a codebook that collapses.
  """

  channels: int = 128
  channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2
  latent_channels: int = 256
  code_dim: int = 8
  codebook_size: int = 16384
  norm_groups: int = 32
  image_channels: int = 3
  image_size: tuple[int, int] = (256, 256)
  commitment_weight: float = 0.25
  entropy_weight: float = 0.0
  dtype: str = "float32"

  def __post_init__(self):
    if not self.channel_multipliers:
      raise ValueError(
        "channel_multipliers is empty; expected one per resolution, for"
        " example (1, 2, 2)."
      )
    for width in self.widths:
      if width % self.norm_groups:
        raise ValueError(
          f"norm_groups={self.norm_groups} does not divide the level width"
          f" {width} (channels={self.channels}, channel_multipliers="
          f"{self.channel_multipliers}); choose a divisor of every width, for"
          f" example {math.gcd(*self.widths)}."
        )
    _grid_of(self.image_size, self.downsampling)

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of every level, from the highest resolution to the lowest."""
    return tuple(self.channels * m for m in self.channel_multipliers)

  @property
  def downsampling(self) -> int:
    """Side of the square of pixels behind one token."""
    return 2 ** (len(self.channel_multipliers) - 1)


VARIANTS: dict[str, Config] = {
  "vq16": Config(),
  "vq8": Config(channel_multipliers=(1, 2, 2, 4)),
}

# Name of the release -> (published file, variant).
SOURCES: dict[str, tuple[str, str]] = {
  "vq_ds16_c2i": ("vq_ds16_c2i.pt", "vq16"),
  "vq_ds16_t2i": ("vq_ds16_t2i.pt", "vq16"),
  "vq_ds8_c2i": ("vq_ds8_c2i.pt", "vq8"),
}


def _grid_of(image_size: tuple[int, int], downsampling: int) -> tuple[int, int]:
  height, width = image_size
  if height < 1 or width < 1 or height % downsampling or width % downsampling:
    raise ValueError(
      f"image size {height}x{width} is not divisible by the down-sampling"
      f" {downsampling}; crop or resize the images to multiples of"
      f" {downsampling}, or change the number of channel_multipliers."
    )
  return height // downsampling, width // downsampling


class Conv(nnx.Conv):
  """A convolution with PyTorch's default initialisation, U(+-fan_in^-1/2)."""

  def __init__(
    self, inputs: int, outputs: int, size: int, config: Config, rngs, **kwargs
  ):
    bound = (inputs * size * size) ** -0.5

    def uniform(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, -bound, bound)

    super().__init__(
      inputs,
      outputs,
      (size, size),
      dtype=jnp.dtype(config.dtype),
      precision=HIGHEST,
      kernel_init=uniform,
      bias_init=uniform,
      rngs=rngs,
      **kwargs,
    )


class Upsample(Conv):
  """Nearest-neighbour doubling, then the convolution."""

  def __call__(self, x: Array) -> Array:
    return super().__call__(x.repeat(2, axis=1).repeat(2, axis=2))


def _norm(width: int, config: Config, rngs: nnx.Rngs) -> nnx.GroupNorm:
  # The fast variance, E[x^2] - E[x]^2, cancels digits where the mean is large.
  return nnx.GroupNorm(
    width,
    config.norm_groups,
    epsilon=1e-6,
    dtype=jnp.float32,
    use_fast_variance=False,
    rngs=rngs,
  )


class ResidualBlock(nnx.Module):
  """Two (norm, swish, 3x3) around a skip, 1x1 where the width changes."""

  def __init__(self, inputs: int, outputs: int, config: Config, rngs):
    self.norm1 = _norm(inputs, config, rngs)
    self.conv1 = Conv(inputs, outputs, 3, config, rngs)
    self.norm2 = _norm(outputs, config, rngs)
    self.conv2 = Conv(outputs, outputs, 3, config, rngs)
    self.shortcut = (
      None if inputs == outputs else Conv(inputs, outputs, 1, config, rngs)
    )

  def __call__(self, x: Array) -> Array:
    h = self.conv1(nnx.swish(self.norm1(x)))
    h = self.conv2(nnx.swish(self.norm2(h)))
    return h + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
  """Single-head attention among all positions of the grid, with a skip."""

  def __init__(self, width: int, config: Config, rngs: nnx.Rngs):
    self.norm = _norm(width, config, rngs)
    self.q = Conv(width, width, 1, config, rngs)
    self.k = Conv(width, width, 1, config, rngs)
    self.v = Conv(width, width, 1, config, rngs)
    self.out = Conv(width, width, 1, config, rngs)

  def __call__(self, x: Array) -> Array:
    batch, rows, cols, width = x.shape
    h = self.norm(x)
    q, k, v = (
      f(h).reshape(batch, rows * cols, width) for f in (self.q, self.k, self.v)
    )
    scores = jnp.einsum(
      "bqd,bkd->bqk",
      q,
      k,
      precision=HIGHEST,
      preferred_element_type=jnp.float32,
    )
    weights = jax.nn.softmax(scores * width**-0.5, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bqk,bkd->bqd", weights, v, precision=HIGHEST)
    return x + self.out(mixed.reshape(x.shape))


class Level(nnx.Module):
  """One resolution: residual blocks, attention after each or none, resample."""

  def __init__(
    self,
    widths: list[int],
    attend: bool,
    resample: Conv | None,
    config: Config,
    rngs: nnx.Rngs,
  ):
    """`widths` starts with the input's; one residual block leads to each next."""
    self.residuals = nnx.List(
      ResidualBlock(a, b, config, rngs) for a, b in zip(widths, widths[1:])
    )
    self.attentions = nnx.List(
      AttentionBlock(w, config, rngs) for w in widths[1:] if attend
    )
    self.resample = resample

  def activations(self, x: Array) -> Iterator[tuple[str, Array]]:
    for i, residual in enumerate(self.residuals):
      x = residual(x)
      yield f"residuals/{i}", x
      if self.attentions:
        x = self.attentions[i](x)
        yield f"attentions/{i}", x
    if self.resample is not None:
      yield "resample", self.resample(x)


def _mid(width: int, config: Config, rngs: nnx.Rngs) -> nnx.List:
  return nnx.List(
    [
      ResidualBlock(width, width, config, rngs),
      AttentionBlock(width, config, rngs),
      ResidualBlock(width, width, config, rngs),
    ]
  )


class Stack(nnx.Module):
  """What encoder and decoder share: a walk through named activations.

  Each name is the path of the module that has just been applied, so that a test
  or a figure can pick any of them; under jit the unused ones cost nothing.
  """

  mid_first: bool

  def activations(self, x: Array) -> Iterator[tuple[str, Array]]:
    """Yields (path, activation) in order; the last one is the output."""
    x = self.conv_in(x)
    yield "conv_in", x
    walks = (self._through_mid, self._through_levels)
    for walk in walks if self.mid_first else reversed(walks):
      for name, x in walk(x):
        yield name, x
    x = self.norm_out(x)
    yield "norm_out", x
    yield "conv_out", self.conv_out(nnx.swish(x))

  def __call__(self, x: Array) -> Array:
    for _, x in self.activations(x):
      pass
    return x

  def _through_mid(self, x: Array) -> Iterator[tuple[str, Array]]:
    for i, block in enumerate(self.mid):
      x = block(x)
      yield f"mid/{i}", x

  def _through_levels(self, x: Array) -> Iterator[tuple[str, Array]]:
    for i, level in enumerate(self.levels):
      for name, x in level.activations(x):
        yield f"levels/{i}/{name}", x


class Encoder(Stack):
  """Image -> latent channels, from the highest resolution to the lowest."""

  mid_first = False

  def __init__(self, config: Config, rngs: nnx.Rngs):
    width = config.channels
    self.conv_in = Conv(config.image_channels, width, 3, config, rngs)
    self.levels = nnx.List()
    for i, level_width in enumerate(config.widths):
      lowest = i == len(config.widths) - 1
      path = [width] + [level_width] * config.num_res_blocks
      width = path[-1]
      # Padding at the bottom and right only, as in the published network.
      down = dict(strides=2, padding=((0, 1), (0, 1)))
      resample = None if lowest else Conv(width, width, 3, config, rngs, **down)
      self.levels.append(Level(path, lowest, resample, config, rngs))
    self.mid = _mid(width, config, rngs)
    self.norm_out = _norm(width, config, rngs)
    self.conv_out = Conv(width, config.latent_channels, 3, config, rngs)


class Decoder(Stack):
  """Latent channels -> image; its level 0 is the lowest resolution.

  Each level has one residual block more than the encoder's.
  """

  mid_first = True

  def __init__(self, config: Config, rngs: nnx.Rngs):
    width = config.widths[-1]
    self.conv_in = Conv(config.latent_channels, width, 3, config, rngs)
    self.mid = _mid(width, config, rngs)
    self.levels = nnx.List()
    for i, level_width in enumerate(reversed(config.widths)):
      highest = i == len(config.widths) - 1
      path = [width] + [level_width] * (config.num_res_blocks + 1)
      width = path[-1]
      resample = None if highest else Upsample(width, width, 3, config, rngs)
      self.levels.append(Level(path, i == 0, resample, config, rngs))
    self.norm_out = _norm(width, config, rngs)
    self.conv_out = Conv(width, config.image_channels, 3, config, rngs)


def _unit(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
  """Rows of unit length; a zero row stays zero and has a zero gradient."""
  return x / jnp.sqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), 1e-24))


@struct.dataclass
class Quantized:
  """A grid of codes, their latents, and the losses, weights included.

  `latents` has the value of the codebook rows and passes its gradient straight
  through to the normalised input.
  """

  codes: Int[Array, "B r c"]
  latents: Float[Array, "B r c d"]
  codebook_loss: Float[Array, ""]
  commitment_loss: Float[Array, ""]
  entropy_loss: Float[Array, ""]


class Quantizer(nnx.Module):
  """The codebook: nearest row, look-up, and the losses that train both sides."""

  def __init__(self, config: Config, rngs: nnx.Rngs):
    shape = (config.codebook_size, config.code_dim)
    rows = jax.random.uniform(rngs.params(), shape, minval=-1.0)
    self.codebook = nnx.Param(_unit(rows))
    self.commitment_weight = config.commitment_weight
    self.entropy_weight = config.entropy_weight

  def lookup(self, codes: Int[Array, "*n"]) -> Float[Array, "*n d"]:
    """The unit rows of codes; a code outside the codebook gives NaN."""
    return _unit(jnp.take(self.codebook[...], codes, axis=0, mode="fill"))

  def nearest(self, unit: Float[Array, "B r c d"]) -> Int[Array, "B r c"]:
    """The code of the row nearest to each unit vector.

    One row of the grid at a time, so that of the B x r x c x K distances only
    1/r are alive; the batch axis, which may be sharded, is left alone.
    """
    table = _unit(self.codebook[...])
    lengths = jnp.sum(table**2, axis=-1)

    def nearest_in_row(row):
      dots = jnp.einsum("bcd,kd->bck", row, table, precision=HIGHEST)
      return jnp.argmin(lengths - 2 * dots, axis=-1).astype(jnp.int32)

    codes = jax.lax.map(nearest_in_row, unit.swapaxes(0, 1))
    return codes.swapaxes(0, 1)

  def __call__(self, latents: Float[Array, "B r c d"]) -> Quantized:
    """Quantises latents of any length; gradients cross the normalisation.

    codebook    mean |W_k - sg z|^2      (all z and W_k of unit length)
    commitment  mean |sg W_k - z|^2      times commitment_weight
    entropy     mean_z H(p(k|z)) - H(mean_z p(k|z))      times entropy_weight
    """
    stop = jax.lax.stop_gradient
    unit = _unit(latents)
    codes = self.nearest(stop(unit))
    rows = self.lookup(codes)
    commitment = jnp.mean((stop(rows) - unit) ** 2)
    entropy = self._entropy(unit) if self.entropy_weight else jnp.zeros(())
    return Quantized(
      codes=codes,
      latents=unit + stop(rows - unit),
      codebook_loss=jnp.mean((rows - stop(unit)) ** 2),
      commitment_loss=self.commitment_weight * commitment,
      entropy_loss=self.entropy_weight * entropy,
    )

  def _entropy(self, unit: Float[Array, "B r c d"]) -> Float[Array, ""]:
    """Low when every z is sure of its code and all codes are used alike."""
    table = _unit(self.codebook[...])
    dots = jnp.einsum("brcd,kd->brck", unit, table, precision=HIGHEST)
    lengths = jnp.sum(unit**2, -1, keepdims=True) + jnp.sum(table**2, -1)
    log_p = jax.nn.log_softmax((2 * dots - lengths) / ENTROPY_TEMPERATURE)
    p = jnp.exp(log_p)
    mean_p = jnp.mean(p, axis=(0, 1, 2))
    per_position = -jnp.mean(jnp.sum(p * log_p, axis=-1))
    return per_position + jnp.sum(mean_p * jnp.log(mean_p + 1e-5))


class Model(nnx.Module):
  """The tokenizer; see `interfaces.Tokenizer` and `interfaces.Trainable`."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.grid = _grid_of(config.image_size, config.downsampling)
    self.vocab_sizes = (config.codebook_size,)
    self.encoder = Encoder(config, rngs)
    self.to_code = Conv(
      config.latent_channels, config.code_dim, 1, config, rngs
    )
    self.quantizer = Quantizer(config, rngs)
    self.from_code = Conv(
      config.code_dim, config.latent_channels, 1, config, rngs
    )
    self.decoder = Decoder(config, rngs)

  def latents(self, images: Float[Array, "B h w C"]) -> Float[Array, "B r c d"]:
    """What the quantiser sees, before normalisation, in float32."""
    _grid_of(images.shape[1:3], self.config.downsampling)
    if images.shape[-1] != self.config.image_channels:
      raise ValueError(
        f"images have {images.shape[-1]} channels (shape {images.shape}), the"
        f" tokenizer expects {self.config.image_channels}; convert the images"
        " or set image_channels."
      )
    return self.to_code(self.encoder(images)).astype(jnp.float32)

  def pixels(self, latents: Float[Array, "B r c d"]) -> Float[Array, "B h w C"]:
    """The image behind quantised latents, in float32, not clipped."""
    return self.decoder(self.from_code(latents)).astype(jnp.float32)

  def encode(self, images: Float[Array, "B h w C"]) -> Int[Array, "B T 1"]:
    """Tokens of images in [-1, 1], of any size the down-sampling divides."""
    codes = self.quantizer.nearest(_unit(self.latents(images)))
    return codes.reshape(images.shape[0], -1, 1)

  def decode(
    self, tokens: Int[Array, "B T 1"], grid: tuple[int, int] | None = None
  ) -> Float[Array, "B h w C"]:
    """Images, not clipped; `grid` (rows, cols) where it is not `self.grid`."""
    rows, cols = grid = grid or self.grid
    if tokens.shape[1] != rows * cols:
      raise ValueError(
        f"{tokens.shape[1]} tokens per image do not fill the grid {grid};"
        " pass the grid (rows, cols) that encoded them."
      )
    codes = tokens.reshape(tokens.shape[0], rows, cols)
    return self.pixels(self.quantizer.lookup(codes))

  def loss(
    self, batch: Batch, rng: Key
  ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Squared error of the reconstruction plus the quantiser's losses.

    batch["image"] is uint8 [B, h, w, C]. `codebook_usage` is the fraction of
    the codes that occur in this batch.
    """
    del rng  # No dropout: the published models train without it.
    images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
    quantized = self.quantizer(self.latents(images))
    mse = jnp.mean((self.pixels(quantized.latents) - images) ** 2)
    loss = mse + quantized.codebook_loss + quantized.commitment_loss
    loss += quantized.entropy_loss
    counts = jnp.bincount(
      quantized.codes.ravel(), length=self.config.codebook_size
    )
    return loss, {
      "mse": mse,
      "codebook_usage": jnp.mean(counts > 0, dtype=jnp.float32),
      "commitment": quantized.commitment_loss,
    }


def _conv_rules(source: str, target: str) -> list[Rule]:
  return [
    Rule(rf"{source}\.weight", f"{target}/kernel", CONV),
    Rule(rf"{source}\.bias", f"{target}/bias"),
  ]


def _norm_rules(source: str, target: str) -> list[Rule]:
  return [
    Rule(rf"{source}\.weight", f"{target}/scale"),
    Rule(rf"{source}\.bias", f"{target}/bias"),
  ]


def _residual_rules(source: str, target: str) -> list[Rule]:
  return [
    *_norm_rules(rf"{source}\.norm(?P<n>[12])", f"{target}/norm{{n}}"),
    *_conv_rules(rf"{source}\.conv(?P<n>[12])", f"{target}/conv{{n}}"),
    *_conv_rules(rf"{source}\.nin_shortcut", f"{target}/shortcut"),
  ]


def _attention_rules(source: str, target: str) -> list[Rule]:
  return [
    *_norm_rules(rf"{source}\.norm", f"{target}/norm"),
    *_conv_rules(rf"{source}\.(?P<name>[qkv])", f"{target}/{{name}}"),
    *_conv_rules(rf"{source}\.proj_out", f"{target}/out"),
  ]


def import_rules(config: Config) -> list[Rule]:
  """Published names -> paths of `Model`; one table serves every size."""
  del config
  side = r"(?P<side>encoder|decoder)"
  level = rf"{side}\.conv_blocks\.(?P<level>\d+)"
  block, ours = r"(?P<block>\d+)", "{side}/levels/{level}"
  return [
    *_conv_rules(rf"{side}\.conv_(?P<end>in|out)", "{side}/conv_{end}"),
    *_residual_rules(rf"{level}\.res\.{block}", f"{ours}/residuals/{{block}}"),
    *_attention_rules(
      rf"{level}\.attn\.{block}", f"{ours}/attentions/{{block}}"
    ),
    *_conv_rules(rf"{level}\.(?:down|up)sample\.conv", f"{ours}/resample"),
    *_residual_rules(rf"{side}\.mid\.(?P<block>[02])", "{side}/mid/{block}"),
    *_attention_rules(rf"{side}\.mid\.1", "{side}/mid/1"),
    *_norm_rules(rf"{side}\.norm_out", "{side}/norm_out"),
    *_conv_rules("quant_conv", "to_code"),
    *_conv_rules("post_quant_conv", "from_code"),
    Rule(r"quantize\.embedding\.weight", "quantizer/codebook"),
    # A queue of recently used codes, kept for a statistic only.
    Rule(r"quantize\.codebook_used", None),
  ]
