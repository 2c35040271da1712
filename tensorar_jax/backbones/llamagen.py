"""LlamaGen's GPT (Sun et al., 2024, "Autoregressive Model Beats Diffusion").

A LLaMA over image tokens in raster order: one class token, then the image;
2-D rotary positions on interleaved pairs, the class token's rotary row zero.
Facts and numbers: the parity README of this family.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tensorar_jax import layers
from tensorar_jax.interfaces import LINEAR, Cache, Cond, Key, Rule


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and training rates of one model.

  `mlp_multiple` rounds the hidden width 8/3 D (times `mlp_scale`, if given) up.
  `null_class` adds the row of the class table that guidance needs.
  `drop_path` rises linearly over the layers to its value.
  """

  vocab_size: int = 16384
  grid: tuple[int, int] = (16, 16)
  width: int = 768
  num_layers: int = 12
  num_heads: int = 12
  num_kv_heads: int | None = None
  num_classes: int = 1000
  null_class: bool = True
  mlp_multiple: int = 256
  mlp_scale: float | None = None
  rope_base: float = 10000.0
  norm_eps: float = 1e-5
  token_dropout: float = 0.1
  residual_dropout: float = 0.1
  mlp_dropout: float = 0.1
  drop_path: float = 0.0
  dtype: str = "float32"

  def __post_init__(self):
    kv_heads = self.num_kv_heads or self.num_heads
    if self.width % self.num_heads or (self.width // self.num_heads) % 4:
      raise ValueError(
        f"width={self.width} with num_heads={self.num_heads}: 2-D rotary"
        " positions need heads whose width is a whole multiple of 4. Change"
        " width or num_heads."
      )
    if self.num_heads % kv_heads:
      raise ValueError(
        f"num_kv_heads={kv_heads} does not divide num_heads={self.num_heads}."
      )
    if self.grid[0] != self.grid[1]:
      raise ValueError(
        f"grid={self.grid}: this family's position table is square. Use equal"
        " rows and columns."
      )

  @property
  def block(self) -> layers.BlockConfig:
    hidden = int(2 * (4 * self.width) / 3)
    if self.mlp_scale is not None:
      hidden = int(self.mlp_scale * hidden)
    rounded = -(-hidden // self.mlp_multiple) * self.mlp_multiple
    return layers.BlockConfig(
      width=self.width,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads or self.num_heads,
      mlp_width=rounded,
      norm_eps=self.norm_eps,
      residual_dropout=self.residual_dropout,
      mlp_dropout=self.mlp_dropout,
      dtype=self.dtype,
    )


def _variant(width: int, num_layers: int, num_heads: int) -> Config:
  return Config(width=width, num_layers=num_layers, num_heads=num_heads)


VARIANTS: dict[str, Config] = {
  "B": _variant(768, 12, 12),
  "L": _variant(1024, 24, 16),
  "XL": _variant(1280, 36, 20),
  "XXL": _variant(1536, 48, 24),
  "3B": _variant(3200, 24, 32),
}

# Published file -> variant; the 384 px files differ only in `grid=(24, 24)`.
SOURCES: dict[str, str] = {
  f"c2i_{name}_{pixels}.pt": name for name in VARIANTS for pixels in (256, 384)
}


class Model(nnx.Module):
  """The class-conditional GPT as a `Backbone`; the final norm is before z."""

  kernel_init = staticmethod(layers.normal_init)

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    c = self.config = config
    self.num_tokens = c.grid[0] * c.grid[1]
    self.width, self.num_heads, self.dtype = c.width, c.num_heads, c.dtype
    self.vocab_sizes = (c.vocab_size,)
    self.prefix = 1
    embed = dict(embedding_init=layers.normal_init, rngs=rngs, dtype=c.dtype)
    rows = c.num_classes + int(c.null_class)
    self.class_embed = nnx.Embed(rows, c.width, **embed)
    self.token_embed = nnx.Embed(c.vocab_size, c.width, **embed)
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
    if "order" in cond:
      raise ValueError(
        "order: the tokens of this backbone come in raster order. Set"
        " loss.random_order=None."
      )
    if isinstance(cond["label"], jax.core.Tracer):
      return  # inside someone's jit: nothing to look at
    known, label = self.config.num_classes, np.asarray(cond["label"])
    if label.size and not 0 <= label.min() <= label.max() < known:
      raise ValueError(
        f"class ids {label.min()} to {label.max()}: this backbone knows"
        f" {known} classes, 0 to {known - 1}. Let the conditioning's and the"
        " backbone's num_classes agree."
      )
    if not self.config.null_class and np.asarray(cond["is_null"]).any():
      raise ValueError(
        "null_class=False: this backbone has no null class, so there is"
        " neither guidance nor condition dropout. Set guidance=1 and"
        " condition_dropout=0."
      )

  def embed(self, tokens: Int[Array, "*n 1"]) -> Float[Array, "*n D"]:
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

  def __call__(
    self, cond: Cond, x: Float[Array, "B M D"], *, rng: Key | None = None
  ) -> Float[Array, "B M+1 D"]:
    hidden, _ = self._run(cond, x, rng)
    return self.norm(hidden[:, self.prefix - 1 :])

  def hidden_states(
    self, cond: Cond, x: Float[Array, "B M D"]
  ) -> tuple[Float[Array, "L B S D"], Float[Array, "B S D"]]:
    """Every row after every layer, and after the final norm; for tests."""
    hidden, states = self._run(cond, x, None)
    return states, self.norm(hidden)

  def prefill(self, cond: Cond) -> tuple[Float[Array, "B D"], Cache]:
    x = self._embed_condition(cond)
    c = self.config.block
    rows = self.prefix + self.num_tokens
    cache = self.blocks.init_cache(
      (x.shape[0], c.num_kv_heads, rows, c.head_dim), x.dtype
    )
    return self._append(x, cache)

  def decode(
    self, x: Float[Array, "B D"], cache: Cache
  ) -> tuple[Float[Array, "B D"], Cache]:
    return self._append(x[:, None], cache)

  def _embed_condition(self, cond: Cond) -> Float[Array, "B 1 D"]:
    null = self.config.num_classes
    label = jnp.where(cond["is_null"], null, cond["label"])
    return self.class_embed(label)[:, None]

  def _rotary(self) -> Float[Array, "S p 2"]:
    c = self.config
    head_dim = c.width // c.num_heads
    return jnp.asarray(
      layers.rotary_table_2d(c.grid, head_dim, c.rope_base, self.prefix)
    )

  def _run(self, cond, x, rng):
    """All rows through all layers: (last residual stream, every layer's)."""
    rng_token, rng_layers = (
      (None, None) if rng is None else jax.random.split(rng)
    )
    x = jnp.concatenate([self._embed_condition(cond), x], axis=1)
    x = layers.dropout(x, self.config.token_dropout, rng_token)
    length, count = x.shape[1], self.config.num_layers
    table = self._rotary()[:length]
    mask = jnp.tril(jnp.ones((length, length), bool))
    rates = jnp.linspace(0.0, self.config.drop_path, count)
    keys = None if rng is None else jax.random.split(rng_layers, count)

    def apply(block, x, xs):
      rate, key = xs
      x, _ = block(
        x,
        lambda q: layers.rotate_interleaved(q, table),
        mask,
        rng=key,
        path_rate=rate if self.config.drop_path else 0.0,
      )
      return x, x

    return self.blocks(apply, x, (rates, keys))

  def _append(self, x, cache):
    """Rows x [B, M, D] behind the cache: (hidden state of the last, cache)."""
    length, end = x.shape[1], cache.end
    table = jax.lax.dynamic_slice_in_dim(self._rotary(), end, length)
    rows = self.prefix + self.num_tokens
    mask = jnp.arange(rows) <= end + jnp.arange(length)[:, None]

    def apply(block, x, view):
      return block(
        x, lambda q: layers.rotate_interleaved(q, table), mask, cache=view
      )

    x, cache = self.blocks.cached(apply, x, cache)
    return self.norm(x[:, -1]), cache.replace(end=end + length)


def import_rules(config: Config) -> list[Rule]:
  """The published state dict's names; caches and tables are recomputed."""
  del config  # the same names for every size
  layer = r"layers\.(?P<layer>\d+)\."
  stacked = "blocks/stacked/"
  return [
    Rule(r"cls_embedding\.embedding_table\.weight", "class_embed/embedding"),
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
