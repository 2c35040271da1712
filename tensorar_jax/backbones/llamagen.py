"""LlamaGen's GPT (Sun et al., 2024, "Autoregressive Model Beats Diffusion").

A LLaMA over image tokens in raster order: one class token or the features of a
text, then the image; 2-D rotary positions on interleaved pairs, with zero rows
for the prefix.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tensorar_jax.conditioning import conditions
from tensorar_jax.interfaces import LINEAR, Cond, Frozen, Key, Rule
from tensorar_jax.nn import checks, layers, transformer


@dataclasses.dataclass(frozen=True)
class Config(transformer.RotaryConfig):
  """Sizes and training rates of one model; the base class has the others.

  `null_class` adds the row of the class table that guidance needs.
  `text_width` makes a text-to-image model, without classes, whose prefix is
  `text_length` rows of so many features. `drop_path` rises linearly over the
  layers to its value.
  """

  vocab_size: int = 16384
  width: int = 768
  num_layers: int = 12
  num_heads: int = 12
  num_classes: int = 1000
  null_class: bool = True
  text_width: int | None = None
  text_length: int = 120
  drop_path: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    checks.numbers(self, checks.COUNT, "vocab_size", "num_classes")
    checks.numbers(self, checks.RATE, "drop_path")
    if self.text_width is not None and min(self.text_width, self.prefix) < 1:
      raise ValueError(
        f"text_width={self.text_width}, text_length={self.text_length}:"
        " expected at least 1 of each, or text_width=None for classes."
      )

  @property
  def prefix(self) -> int:
    """The rows before the image."""
    return 1 if self.text_width is None else self.text_length


def _variant(width: int, num_layers: int, num_heads: int, **text) -> Config:
  return Config(width=width, num_layers=num_layers, num_heads=num_heads, **text)


VARIANTS: dict[str, Config] = {
  "B": _variant(768, 12, 12),
  "L": _variant(1024, 24, 16),
  "XL": _variant(1280, 36, 20),
  "XXL": _variant(1536, 48, 24),
  "3B": _variant(3200, 24, 32),
  "T2I-XL": _variant(1280, 36, 20, text_width=2048),
}

# Published file -> variant. Files of another image size differ only in `grid`:
# (24, 24) at 384 px and (32, 32) at 512.
SOURCES: dict[str, str] = {
  **{
    f"c2i_{name}_{pixels}.pt": name
    for name, config in VARIANTS.items()
    for pixels in (256, 384)
    if config.text_width is None
  },
  "t2i_XL_stage1_256.pt": "T2I-XL",
  "t2i_XL_stage2_512.pt": "T2I-XL",
}


class TextEmbed(nnx.Module):
  """down(gelu(up(features))), bias-free; null features stand for no text."""

  sharding_rules = (("null", ()),)  # small, and read whole

  def __init__(self, config: Config, text_width: int, *, rngs: nnx.Rngs):
    c = config
    # Drawn once and never trained, as published.
    null = jax.random.normal(rngs.params(), (c.text_length, text_width))
    self.null = Frozen(null * text_width**-0.5)
    self.up = layers.linear(text_width, c.width, rngs, c.dtype)
    self.down = layers.linear(c.width, c.width, rngs, c.dtype)

  def __call__(self, cond: Cond) -> Float[Array, "B P D"]:
    is_null = cond["is_null"][:, None, None]
    text = jnp.where(is_null, self.null[...], cond["text"])
    return self.down(jax.nn.gelu(self.up(text), approximate=True))


class Model(transformer.CausalTransformer):
  """The GPT as a `Backbone`; the final norm is before z."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    super().__init__(config, config.num_kv_heads)
    c = config
    self.vocab_sizes = (c.vocab_size,)
    self.token_dropout, self.drop_path = c.token_dropout, c.drop_path
    embed = functools.partial(
      nnx.Embed,
      features=c.width,
      embedding_init=layers.normal_init,
      dtype=c.dtype,
      rngs=rngs,
    )
    if c.text_width is None:
      rows = c.num_classes + int(c.null_class)
      self.class_embed = embed(rows)
    else:
      self.text_embed = TextEmbed(c, c.text_width, rngs=rngs)
    self.token_embed = embed(c.vocab_size)
    self.blocks = layers.Layers(
      lambda rngs: layers.Block(c.block, rngs=rngs), c.num_layers, rngs
    )
    self.norm = layers.RMSNorm(c.width, c.norm_eps)
    # The head starts at zero, so that training starts at a loss of ln V.
    self.head = layers.linear(
      c.width, c.vocab_size, rngs, c.dtype, nnx.initializers.zeros
    )

  def make_norm(self, rngs: nnx.Rngs) -> nnx.Module:
    del rngs  # RMSNorm starts at one
    return layers.RMSNorm(self.width, self.config.norm_eps)

  def check(self, cond: Cond) -> None:
    conditions.refuse_order(cond)
    c = self.config
    if c.text_width is None:
      conditions.check_labels(cond, c.num_classes, c.null_class)
    else:
      conditions.check_text(cond, c.text_length, c.text_width)

  def embed(self, tokens: Int[Array, "*n 1"]) -> Float[Array, "*n D"]:
    checks.tokens(tokens, self.vocab_sizes)
    return self.token_embed(tokens[..., 0])

  def logits(
    self,
    hidden: Float[Array, "*n D"],
    tokens: Int[Array, "*n 1"],
    *,
    rng: Key | None = None,
  ) -> tuple[Float[Array, "*n _"], ...]:
    del tokens, rng  # one sub-token, and a head without dropout
    return (self.head(hidden).astype(jnp.float32),)

  def embed_condition(self, cond: Cond) -> Float[Array, "B P D"]:
    if self.config.text_width is not None:
      return self.text_embed(cond)
    label = conditions.class_ids(cond, self.config.num_classes)
    return self.class_embed(label)[:, None]

  def position_inputs(self, cond, x, rows):
    return x, self.config.rotation(rows, self.config.prefix)

  def apply_final_norm(self, x, position):
    return self.norm(x)


def import_rules(config: Config) -> list[Rule]:
  """Maps the published names; caches and tables are recomputed."""
  del config  # the same names for every size
  layer = r"layers\.(?P<layer>\d+)\."
  stacked = "blocks/stacked/"
  return [
    Rule(r"cls_embedding\.embedding_table\.weight", "class_embed/embedding"),
    Rule(r"cls_embedding\.uncond_embedding", "text_embed/null"),
    Rule(
      r"cls_embedding\.cap_proj\.fc1\.weight", "text_embed/up/kernel", LINEAR
    ),
    Rule(
      r"cls_embedding\.cap_proj\.fc2\.weight", "text_embed/down/kernel", LINEAR
    ),
    Rule(r"tok_embeddings\.weight", "token_embed/embedding"),
    Rule(
      layer + r"attention\.wqkv\.weight",
      stacked + "attention/qkv/kernel",
      LINEAR,
    ),
    Rule(
      layer + r"attention\.wo\.weight", stacked + "attention/out/kernel", LINEAR
    ),
    Rule(
      layer + r"feed_forward\.w1\.weight", stacked + "mlp/gate/kernel", LINEAR
    ),
    Rule(
      layer + r"feed_forward\.w3\.weight", stacked + "mlp/up/kernel", LINEAR
    ),
    Rule(
      layer + r"feed_forward\.w2\.weight", stacked + "mlp/down/kernel", LINEAR
    ),
    Rule(layer + r"attention_norm\.weight", stacked + "attention_norm/scale"),
    Rule(layer + r"ffn_norm\.weight", stacked + "mlp_norm/scale"),
    Rule(r"norm\.weight", "norm/scale"),
    Rule(r"output\.weight", "head/kernel", LINEAR),
    Rule(r"freqs_cis", None),
    Rule(layer + r"attention\.kv_cache\.[kv]_cache", None),
  ]
