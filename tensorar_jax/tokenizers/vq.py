"""The VQ tokenizer of LlamaGen and Janus: a convolutional VQGAN, unit codes.

An encoder halves the image `len(channel_multipliers) - 1` times, a 1x1
convolution brings each position down to `code_dim` numbers z, and the token of
the position is the nearest row of the codebook W once both have unit length:

  token = argmin_k | z/|z| - W_k/|W_k| |^2,     latent = W_token / |W_token|

The decoder mirrors the encoder. Source: FoundationVision/LlamaGen,
tokenizer/tokenizer_image/vq_model.py (arXiv:2406.06525), also used by Janus.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from tensorar_jax.interfaces import CONV, Rule
from tensorar_jax.nn import checks
from tensorar_jax.nn.convolutions import (
  HIGHEST,
  Conv,
  GroupNorm,
  residual_blocks,
)
from tensorar_jax.nn.image_tokenizer import (
  Codebook,
  CodebookTokenizer,
  Codes,
  Images,
  Latents,
  Levels,
  Scalar,
  check_norm_groups,
)

ENTROPY_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True)
class Names:
  """The names of the parts of the network in a layout of published files."""

  prefix: str = ""
  down: str = "conv_blocks"
  up: str = "conv_blocks"
  residual: str = "res"
  mid: tuple[str, ...] = ("0", "1", "2")


# What a file holds -> the layouts it may have; export writes the first. A file
# holds the tokenizer alone, or a model that makes images with it, as its
# authors published it or converted for transformers.
WEIGHTS: dict[str, tuple[Names, ...]] = {"tokenizer": (Names(),)}
WEIGHTS["model"] = (
  Names(prefix=r"gen_vision_model\."),
  Names(
    prefix=r"model\.vqmodel\.",
    down="down",
    up="up",
    residual="block",
    mid=("block_1", "attn_1", "block_2"),
  ),
  Names(),
)


@dataclasses.dataclass(frozen=True)
class Config(Levels):
  """Sizes of the network; the defaults are LlamaGen's VQ-16.

  `image_size` (height, width) only sets `grid`; the weights fit other sizes.
  About 0.01 of `entropy_weight` keeps a small codebook in use. `weights` is a
  key of WEIGHTS, the kind of file; `uint8_offset` is that of `Tokenizer`.
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
  weights: str = "tokenizer"
  uint8_offset: float = 128.0
  dtype: str = "float32"

  def __post_init__(self):
    if self.weights not in WEIGHTS:
      raise ValueError(
        f"weights={self.weights!r}: expected one of {tuple(WEIGHTS)}, the"
        " kinds of published files."
      )
    self.check("latent_channels", "code_dim", "codebook_size")
    check_norm_groups(self.norm_groups, self.widths)
    weights = ("commitment_weight", "entropy_weight")
    checks.numbers(self, checks.NOT_NEGATIVE, *weights)


VARIANTS = {
  "vq16": Config(),
  "vq8": Config(channel_multipliers=(1, 2, 2, 4)),
  # The same network, in the files of that model. It does not round its bytes.
  "janus": Config(image_size=(384, 384), weights="model", uint8_offset=127.5),
}
SOURCES: dict[str, str] = {  # published file -> variant
  "vq_ds16_c2i.pt": "vq16",
  "vq_ds16_t2i.pt": "vq16",
  "vq_ds8_c2i.pt": "vq8",
}


class AttentionBlock(nnx.Module):
  """Single-head attention among all positions of the grid, and a skip."""

  def __init__(self, width: int, config: Config, rngs: nnx.Rngs):
    self.norm = GroupNorm(width, config.norm_groups, rngs=rngs)
    conv = functools.partial(Conv, width, width, 1, dtype=config.dtype)
    self.q = conv(rngs=rngs)
    self.k = conv(rngs=rngs)
    self.v = conv(rngs=rngs)
    self.proj_out = conv(rngs=rngs)

  def __call__(self, x: Array) -> Array:
    h = self.norm(x)
    q, k, v = self.q(h), self.k(h), self.v(h)
    einsum = functools.partial(jnp.einsum, precision=HIGHEST)
    scores = einsum("bijd,bmnd->bijmn", q, k, preferred_element_type="float32")
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=(-2, -1))
    mixed = einsum("bijmn,bmnd->bijd", weights.astype(v.dtype), v)
    return x + self.proj_out(mixed)


class Stack(nnx.Module):
  """The encoder, or its mirror image, the decoder.

  Encoder: levels down, `mid`. Decoder: `mid`, levels up, each with one residual
  block more. At the lowest resolution attention follows each of these.
  """

  def __init__(self, config: Config, decoder: bool, rngs: nnx.Rngs):
    widths = config.widths[::-1] if decoder else config.widths
    lowest, depth = config.widths[-1], config.num_res_blocks + decoder
    width = lowest if decoder else config.channels
    made = {"dtype": config.dtype, "rngs": rngs}
    blocks = functools.partial(
      residual_blocks, norm_groups=config.norm_groups, **made
    )
    conv = functools.partial(Conv, **made)
    # As published, halving convolutions pad at the bottom and the right only.
    halve = {"strides": 2, "padding": ((0, 1), (0, 1))}
    resample = {"upsample": True} if decoder else halve
    inputs, outputs = config.image_channels, config.latent_channels
    if decoder:
      inputs, outputs = outputs, inputs
    self.decoder = decoder
    self.conv_in = conv(inputs, width, 3)
    self.levels, self.resamples = nnx.List(), nnx.List()
    for i, level_width in enumerate(widths):
      self.levels.append(blocks([width] + [level_width] * depth))
      width = level_width
      if i < len(widths) - 1:
        self.resamples.append(conv(width, width, 3, **resample))
    attention = functools.partial(AttentionBlock, lowest, config, rngs)
    self.attentions = nnx.List(attention() for _ in range(depth))
    same = [lowest, lowest]
    self.mid = nnx.List([*blocks(same), attention(), *blocks(same)])
    self.norm_out = GroupNorm(width, config.norm_groups, rngs=rngs)
    self.conv_out = conv(width, outputs, 3)

  def steps(self) -> Iterator[tuple[str, Callable[[Array], Array]]]:
    """Every layer in order, named by its path, for `__call__` and for taps."""
    mid = [(f"mid/{i}", block) for i, block in enumerate(self.mid)]
    lowest = 0 if self.decoder else len(self.levels) - 1
    yield "conv_in", self.conv_in
    yield from mid if self.decoder else ()
    for i, level in enumerate(self.levels):
      for j, block in enumerate(level):
        yield f"levels/{i}/{j}", block
        if i == lowest:
          yield f"attentions/{j}", self.attentions[j]
      if i < len(self.resamples):
        yield f"resamples/{i}", self.resamples[i]
    yield from () if self.decoder else mid
    yield "norm_out", self.norm_out
    yield "conv_out", lambda x: self.conv_out(nnx.swish(x))

  def __call__(self, x: Array) -> Array:
    for _, step in self.steps():
      x = step(x)
    return x


class Quantizer(Codebook):
  """A codebook of unit rows, with a third loss that keeps all in use.

  entropy   mean_z H(p(k|z)) - H(mean_z p(k|z))   times entropy_weight
  """

  def __init__(self, config: Config, rngs: nnx.Rngs):
    shape = (config.codebook_size, config.code_dim)
    super().__init__(
      jax.random.uniform(rngs.params(), shape, minval=-1.0),
      unit_length=True,
      commitment_weight=config.commitment_weight,
    )
    self.entropy_weight = config.entropy_weight

  def further_losses(self, z: Latents) -> dict[str, Scalar]:
    if not self.entropy_weight:
      return {}
    return {"entropy": self.entropy_weight * self._entropy(z)}

  def _entropy(self, z: Latents) -> Scalar:
    """Low when every z is sure of its code and all codes are used alike."""
    table = self.scaled(self.codebook[...])
    dots = jnp.einsum("brcd,kd->brck", z, table, precision=HIGHEST)
    # Of -|z - W_k|^2 = 2 z W_k - 2, the softmax does not see the constant.
    log_p = jax.nn.log_softmax(2 * dots / ENTROPY_TEMPERATURE)
    p = jnp.exp(log_p)
    mean_p = p.mean((0, 1, 2))
    return jnp.sum(mean_p * jnp.log(mean_p + 1e-5)) - (p * log_p).sum(-1).mean()


class Model(CodebookTokenizer):
  """The tokenizer; see `interfaces.Tokenizer` and `interfaces.Trainable`."""

  config: Config

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.uint8_offset = config.uint8_offset
    self.grid = config.grid_of(*config.image_size)
    self.vocab_sizes = (config.codebook_size,)
    made = {"dtype": config.dtype, "rngs": rngs}
    self.encoder = Stack(config, decoder=False, rngs=rngs)
    self.to_code = Conv(config.latent_channels, config.code_dim, 1, **made)
    self.quantizer = Quantizer(config, rngs)
    self.from_code = Conv(config.code_dim, config.latent_channels, 1, **made)
    self.decoder = Stack(config, decoder=True, rngs=rngs)

  def latents(self, images: Images) -> Latents:
    """The latents of images: float32, not yet normalised."""
    self.check_images(images)
    return self.to_code(self.encoder(images)).astype(jnp.float32)

  def pixels(self, latents: Latents) -> Images:
    """The image of quantised latents: float32, not clipped."""
    return self.decoder(self.from_code(latents)).astype(jnp.float32)

  def metrics(
    self, codes: Codes, losses: dict[str, Scalar]
  ) -> dict[str, Scalar]:
    used = jnp.bincount(codes.ravel(), length=self.config.codebook_size) > 0
    return {
      "commitment": losses["commitment"],
      "codebook_usage": used.mean(),
    }


def import_rules(config: Config) -> list[Rule]:
  """Published names -> paths of `Model`, for the files of `config.weights`."""
  last = len(config.channel_multipliers) - 1
  first, *others = WEIGHTS[config.weights]
  aliases = [rule for names in others for rule in _rules(names, last)]
  rules = [
    *_rules(first, last),
    *(dataclasses.replace(rule, is_alias=True) for rule in aliases),
  ]
  if config.weights == "model":
    rest = r"language_model|vision_model|aligner|generation_\w+"
    rest = rf"(lm_head|gen_(embed|aligner|head)|(model\.)?({rest}))\..*"
    rules.append(Rule(rest, None))
  return rules


def _rules(names: Names, last: int) -> list[Rule]:
  """The rules of one layout; `last` is the level of the lowest resolution."""
  n, res = r"(?P<n>\d+)", rf"{names.residual}\."
  norms: dict[str, str] = {}
  convs = {"quant_conv": "to_code", "post_quant_conv": "from_code"}
  sides = {
    "encoder": (names.down, "downsample", last),
    "decoder": (names.up, "upsample", 0),
  }
  for side, (blocks, resample, lowest) in sides.items():
    blocks = rf"{side}\.{blocks}\."
    level = blocks + r"(?P<level>\d+)\."
    norms[rf"{side}\.norm_out"] = f"{side}/norm_out"
    convs[rf"{side}\.(?P<end>conv_in|conv_out)"] = f"{side}/{{end}}"
    convs[rf"{level}{resample}\.conv"] = f"{side}/resamples/{{level}}"
    path = f"{side}/levels/{{level}}/{{n}}"
    convs[rf"{level}{res}{n}\.nin_shortcut"] = f"{path}/shortcut"
    parts = {
      rf"{level}{res}{n}": path,
      rf"{blocks}{lowest}\.attn\.{n}": f"{side}/attentions/{{n}}",
    }
    for i, name in enumerate(names.mid):
      parts[rf"{side}\.mid\.{name}"] = f"{side}/mid/{i}"
    for source, target in parts.items():
      norms[rf"{source}\.(?P<part>norm[12]?)"] = target + "/{part}"
      convs[rf"{source}\.(?P<part>conv[12]|[qkv]|proj_out)"] = (
        target + "/{part}"
      )
  weight, bias = (rf"\.{leaf}" for leaf in ("weight", "bias"))
  rules = [
    *(Rule(s + weight, f"{t}/scale") for s, t in norms.items()),
    *(Rule(s + weight, f"{t}/kernel", CONV) for s, t in convs.items()),
    *(Rule(s + bias, f"{t}/bias") for s, t in (norms | convs).items()),
    Rule(r"quantize\.embedding\.weight", "quantizer/codebook"),
    Rule(r"quantize\.codebook_used", None),  # A queue for a statistic only.
  ]
  prefix = names.prefix
  return [dataclasses.replace(r, source=prefix + r.source) for r in rules]
