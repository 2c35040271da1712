"""The lookup-free tokenizer of Open-MAGVIT2: a token is the signs of a latent.

An encoder halves the image `len(channel_multipliers) - 1` times and leaves
d = sum(bits) numbers x at each position. Their signs are the code, and those of
the channels of each group f, lowest bit first, are one sub-token:

  code_c = +1 if x_c > 0 else -1,      token_f = sum_{c in f} 2^c [x_c > 0]

(c counts from 0 in each group). The 2^d corners of the cube are the codebook,
so nothing is looked up or learnt. The decoder widens its image by depth to
space, and at every level the statistics of the whole code set gain and offset
of a group norm. Source: TencentARC/SEED-Voken (arXiv:2409.04410); the
quantiser is that of MAGVIT-v2 (arXiv:2310.05737).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tensorar_jax.interfaces import CONV, LINEAR, Batch, Key, Rule
from tensorar_jax.nn import checks
from tensorar_jax.nn.convolutions import (
  HIGHEST,
  Conv,
  GroupNorm,
  residual_blocks,
)
from tensorar_jax.nn.image_bytes import from_uint8
from tensorar_jax.nn.image_tokenizer import (
  Images,
  ImageTokenizer,
  Latents,
  Levels,
  Scalar,
  check_norm_groups,
)

ENTROPY_TEMPERATURE = 0.01
MAX_BITS = 30  # of one sub-token: it is an int32
# Which weights of a published file to read -> (the prefix of their names, the
# names to skip). "ema" is the moving average, which the published results are
# for, "raw" the weights that the optimiser trained, and "first_stage" the
# tokenizer inside the checkpoint of an autoregressive model.
WEIGHTS = {
  "ema": (
    r"model_ema\.",
    (r"(encoder|decoder|loss)\..*", r"model_ema\.(decay|num_updates|loss.*)"),
  ),
  "raw": ("", (r"(loss|model_ema)\..*",)),
  "first_stage": (r"first_stage_model\.", (r"transformer\..*",)),
}

Bits = tuple[int, ...]  # of each sub-token
Steps = Iterator[tuple[str, Callable[[Array], Array]]]


@dataclasses.dataclass(frozen=True)
class Config(Levels):
  """Sizes of the network; the defaults are the published ones for 256 x 256.

  `bits` are those of each sub-token, that is the channels of its group.
  `image_size` (height, width) only sets `grid`; the weights fit other sizes.
  `weights`, a key of WEIGHTS, says which ones `import_rules` are for.
  """

  channels: int = 128
  channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 4
  bits: Bits = (6, 12)
  norm_groups: int = 32
  image_channels: int = 3
  image_size: tuple[int, int] = (256, 256)
  commitment_weight: float = 0.25
  entropy_weight: float = 0.1
  weights: str = "ema"
  dtype: str = "float32"

  def __post_init__(self):
    self.check()
    widths = (self.channels, *self.widths)
    check_norm_groups(self.norm_groups, widths)
    weights = ("commitment_weight", "entropy_weight")
    checks.numbers(self, checks.NOT_NEGATIVE, *weights)
    if not self.bits or not all(0 < b <= MAX_BITS for b in self.bits):
      raise ValueError(
        f"bits={self.bits}: expected 1 to {MAX_BITS} for each sub-token; split"
        " the latent channels into such groups, for example (6, 12)."
      )
    if self.weights not in WEIGHTS:
      raise ValueError(
        f"weights={self.weights!r}: choose one of {tuple(WEIGHTS)}."
      )


VARIANTS = {"imagenet_256": Config()}
SOURCES: dict[str, str] = {"imagenet_256_L.ckpt": "imagenet_256"}


# --- quantiser -------------------------------------------------------------


def codes_of(latents: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
  """+1 where a latent is positive, else -1: also for 0 and -0."""
  return jnp.where(latents > 0, 1.0, -1.0)


def tokens_of(latents: Float[Array, "*n d"], bits: Bits) -> Int[Array, "*n F"]:
  """The sub-tokens of latents, or of codes; sum(bits) = d."""
  powers = jnp.asarray([2**c for b in bits for c in range(b)], jnp.int32)
  values = jnp.where(latents > 0, powers, 0)
  groups = jnp.split(values, list(itertools.accumulate(bits))[:-1], axis=-1)
  return jnp.stack([group.sum(-1) for group in groups], axis=-1)


def lookup(tokens: Int[Array, "*n F"], bits: Bits) -> Float[Array, "*n d"]:
  """The codes of tokens; NaN for a sub-token beyond its vocabulary."""
  groups = []
  for f, b in enumerate(bits):
    token = tokens[..., f, None]
    code = 2.0 * (token >> jnp.arange(b) & 1) - 1.0
    groups.append(jnp.where(token >> b == 0, code, jnp.nan))
  return jnp.concatenate(groups, axis=-1)


def quantize(latents: Latents) -> tuple[Latents, dict[str, Scalar]]:
  """Codes with straight-through gradient, and the terms that train latents.

  commitment        mean (x - code)^2
  entropy           mean_x H(p(c|x))    low when every x is sure of its code
  codebook_entropy  H(mean_x p(c|x))    high when all codes are used alike

  The means are over the whole batch; the published ones were each device's.
  """
  codes = codes_of(latents)
  entropy, codebook_entropy = _entropies(latents)
  terms = {"entropy": entropy, "codebook_entropy": codebook_entropy}
  terms["commitment"] = jnp.mean((latents - codes) ** 2)
  return latents + jax.lax.stop_gradient(codes - latents), terms


def _entropies(latents: Latents) -> tuple[Scalar, Scalar]:
  """Both entropies, in nats, of p(c|x) = softmax_c(2 x c / temperature).

  Over the corners of a cube p is a product, of sigmoid(4 x_i c_i / temperature)
  for each channel i. So the entropy of p is a sum over channels, and the mean
  of p a matrix product between the two halves of the channels: of the table
  [positions, 2^d] only the factors [positions, 2^(d/2)] ever exist.
  """
  logits = latents.reshape(-1, latents.shape[-1]) * (4 / ENTROPY_TEMPERATURE)
  signed = jnp.stack([-logits, logits], axis=-1)  # [positions, d, 2]
  p, log_p = jax.nn.sigmoid(signed), jax.nn.log_sigmoid(signed)
  halves = jnp.split(p, [p.shape[1] // 2], axis=1)
  left, right = map(_joint, halves)
  mean_p = jnp.einsum("xi,xj->ij", left, right, precision=HIGHEST) / len(p)
  codebook_entropy = -jnp.sum(mean_p * jnp.log(mean_p + 1e-5))
  return -(p * log_p).sum((1, 2)).mean(), codebook_entropy


def _joint(p: Float[Array, "x m 2"]) -> Float[Array, "x _"]:
  """The joint distribution of m independent bits: [x, 2^m]."""
  joint = jnp.ones((len(p), 1))
  for bit in p.swapaxes(0, 1):
    joint = (joint[:, :, None] * bit[:, None]).reshape(len(p), -1)
  return joint


# --- network ---------------------------------------------------------------


def _blocks(widths: Sequence[int], config: Config, rngs: nnx.Rngs) -> nnx.List:
  """Residual blocks without biases."""
  return residual_blocks(
    widths,
    norm_groups=config.norm_groups,
    dtype=config.dtype,
    rngs=rngs,
    use_bias=False,
  )


class AdaptiveNorm(nnx.Module):
  """A group norm; the code of the whole image sets its gain and offset."""

  def __init__(self, width: int, config: Config, rngs: nnx.Rngs):
    def uniform(key, shape, dtype, bound=sum(config.bits) ** -0.5):
      return jax.random.uniform(key, shape, dtype, -bound, bound)

    init = {"kernel_init": uniform, "bias_init": uniform, "rngs": rngs}
    linear = functools.partial(nnx.Linear, precision=HIGHEST, **init)
    plain = {"use_bias": False, "use_scale": False, "rngs": rngs}
    self.norm = GroupNorm(width, config.norm_groups, **plain)
    self.gamma = linear(sum(config.bits), width)
    self.beta = linear(sum(config.bits), width)

  def __call__(self, x: Array, codes: Latents) -> Array:
    mean = codes.mean((1, 2), keepdims=True)  # [B, 1, 1, d]
    variance = codes.var((1, 2), ddof=1, keepdims=True)
    gain = self.gamma(jnp.sqrt(variance + 1e-6))
    return (self.norm(x) * gain + self.beta(mean)).astype(x.dtype)


def depth_to_space(x: Float[Array, "B r c d"]) -> Float[Array, "B R S e"]:
  """Twice the rows and columns, each 2 x 2 from the four quarters of d."""
  b, r, c, d = x.shape
  x = x.reshape(b, r, c, 2, 2, d // 4)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * r, 2 * c, d // 4)


class Level(nnx.Module):
  """The blocks of one resolution and the convolution that leads to the next.

  A decoder's has an adaptive norm in front, and depth to space at the end.
  """

  def __init__(self, config: Config, decoder: bool, rngs: nnx.Rngs, i: int):
    widths, depth = config.widths, config.num_res_blocks
    if decoder:
      inputs = (*widths[1:], widths[-1])[i]
    else:
      inputs = (config.channels, *widths)[i]
    self.blocks = _blocks([inputs] + [widths[i]] * depth, config, rngs)
    conv = functools.partial(Conv, widths[i], dtype=config.dtype, rngs=rngs)
    self.norm = AdaptiveNorm(inputs, config, rngs) if decoder else None
    if i == (0 if decoder else len(widths) - 1):
      self.resample = None
    elif decoder:
      self.resample = conv(4 * widths[i], 3)
    else:
      self.resample = conv(widths[i], 3, strides=2, padding=1)

  def steps(self, codes: Latents | None) -> Steps:
    if self.norm is not None:
      if codes is None:
        raise ValueError("the norms of a decoder read codes: steps(codes).")
      yield "norm", functools.partial(self.norm, codes=codes)
    for i, block in enumerate(self.blocks):
      yield f"blocks/{i}", block
    if self.resample is not None:
      yield "resample", self.resample
      if self.norm is not None:
        yield "depth_to_space", depth_to_space


class Stack(nnx.Module):
  """The encoder, or its mirror image, the decoder.

  Encoder: levels down, `mid`. Decoder: `mid`, levels up. In both `levels[0]` is
  the highest resolution.
  """

  def __init__(self, config: Config, decoder: bool, rngs: nnx.Rngs):
    conv = functools.partial(Conv, dtype=config.dtype, rngs=rngs)
    pixel, latent = config.image_channels, sum(config.bits)
    highest, lowest = config.widths[0], config.widths[-1]
    self.decoder = decoder
    if decoder:
      self.conv_in = conv(latent, lowest, 3)
      self.conv_out = conv(highest, pixel, 3)
    else:
      self.conv_in = conv(pixel, config.channels, 3, use_bias=False)
      self.conv_out = conv(lowest, latent, 1)
    level = functools.partial(Level, config, decoder, rngs)
    self.levels = nnx.List(map(level, range(len(config.widths))))
    self.mid = _blocks([lowest] * (config.num_res_blocks + 1), config, rngs)
    width = highest if decoder else lowest
    self.norm_out = GroupNorm(width, config.norm_groups, rngs=rngs)

  def steps(self, codes: Latents | None = None) -> Steps:
    """Every layer in order, named by its path, for `__call__` and for taps.

    `codes` are those that the adaptive norms of a decoder read.
    """
    mid = [(f"mid/{i}", block) for i, block in enumerate(self.mid)]
    levels = list(enumerate(self.levels))
    yield "conv_in", self.conv_in
    yield from mid if self.decoder else ()
    for i, level in levels[::-1] if self.decoder else levels:
      for name, step in level.steps(codes):
        yield f"levels/{i}/{name}", step
    yield from () if self.decoder else mid
    yield "norm_out", self.norm_out
    yield "conv_out", lambda x: self.conv_out(nnx.swish(x))

  def __call__(self, x: Array) -> Array:
    for _, step in self.steps(codes=x if self.decoder else None):
      x = step(x)
    return x


class Model(ImageTokenizer):
  """The tokenizer; see `interfaces.Tokenizer` and `interfaces.Trainable`."""

  uint8_offset = 127.5  # bytes are truncated, not rounded

  config: Config

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.grid = config.grid_of(*config.image_size)
    self.vocab_sizes = tuple(2**b for b in config.bits)
    self.encoder = Stack(config, decoder=False, rngs=rngs)
    self.decoder = Stack(config, decoder=True, rngs=rngs)

  def latents(self, images: Images) -> Latents:
    """The latents of images, whose signs are the code: float32."""
    self.check_images(images)
    return self.encoder(images).astype(jnp.float32)

  def pixels(self, codes: Latents) -> Images:
    """The image of codes: float32, not clipped."""
    if codes.shape[1] * codes.shape[2] < 2:
      raise ValueError(
        "a grid of 1x1 tokens: adaptive norms need two; take larger images."
      )
    return self.decoder(codes).astype(jnp.float32)

  def quantize(self, latents: Latents) -> Int[Array, "B r c F"]:
    return tokens_of(latents, self.config.bits)

  def lookup(self, tokens: Int[Array, "B r c F"]) -> Latents:
    return lookup(tokens, self.config.bits)

  def loss(self, batch: Batch, rng: Key) -> tuple[Scalar, dict[str, Scalar]]:
    """Mean absolute error plus the quantiser's terms, of uint8 images.

    The published training adds a perceptual and an adversarial term.
    """
    del rng  # No dropout: the published models train without it.
    images = from_uint8(batch["image"])
    codes, terms = quantize(self.latents(images))
    l1 = jnp.mean(jnp.abs(self.pixels(codes) - images))
    spread = terms["entropy"] - terms["codebook_entropy"]
    loss = l1 + self.config.entropy_weight * spread
    loss += self.config.commitment_weight * terms["commitment"]
    return loss, terms | {"l1": l1}


def import_rules(config: Config) -> list[Rule]:
  """Published names -> paths of `Model`, for the files of `config.weights`."""
  side, level = r"(?P<side>encoder|decoder)", r"(?P<level>\d+)"
  norm, conv, linear = ("scale", ()), ("kernel", CONV), ("kernel", LINEAR)
  down, up = rf"encoder\.down\.{level}\.", rf"decoder\.up\.{level}\."
  adaptive = rf"decoder\.adaptive\.{level}\.(?P<part>gamma|beta)"
  table = [  # module, its path, and the name and the axes of its weight
    (rf"{side}\.norm_out", "{side}/norm_out", *norm),
    (rf"{side}\.(?P<end>conv_in|conv_out)", "{side}/{end}", *conv),
    (rf"{down}downsample", "encoder/levels/{level}/resample", *conv),
    (rf"{up}upsample\.conv1", "decoder/levels/{level}/resample", *conv),
    (adaptive, "decoder/levels/{level}/norm/{part}", *linear),
  ]
  for source, target in (
    (rf"{down}block\.", "encoder/levels/{level}/blocks/{n}/"),
    (rf"{up}block\.", "decoder/levels/{level}/blocks/{n}/"),
    (rf"{side}\.mid_block\.", "{side}/mid/{n}/"),
  ):
    source += r"(?P<n>\d+)\."
    table += [
      (source + r"(?P<part>norm[12])", target + "{part}", *norm),
      (source + r"(?P<part>conv[12])", target + "{part}", *conv),
      (source + "nin_shortcut", target + "shortcut", *conv),
    ]
  prefix, unused = WEIGHTS[config.weights]
  rules = [Rule(source, None) for source in unused]
  for source, target, leaf, axes in table:
    # The names of the average have no dots. The patterns stay unique without
    # them, since in none of them one number follows another.
    dot = "" if config.weights == "ema" else r"\."
    source = prefix + source.replace(r"\.", dot) + dot
    rules.append(Rule(source + "weight", f"{target}/{leaf}", axes))
    rules.append(Rule(source + "bias", f"{target}/bias"))
  return rules
