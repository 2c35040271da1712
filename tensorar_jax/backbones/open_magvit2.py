"""Open-MAGVIT2's transformer (Luo et al., 2024, arXiv:2409.04410).

A LLaMA over image tokens in raster order, each of two sub-tokens; a token's
embedding is the sum of theirs. A second, inner transformer reads two steps, the
spatial one's output h and the embedding of the first sub-token, and predicts

    logits[0] = head_0(norm(inner(h)))
    logits[1] = head_1(norm(inner(h, e_0[first])))

It knows no position, so that it is part of `logits`, and the final norm with
it: hidden states are the raw stream. Facts: the parity README of this family.
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

  `vocab_sizes` are those of the first and the second sub-token.
  `mlp_multiple` rounds the hidden width 8/3 D (times `mlp_scale`, if given) up.
  """

  vocab_sizes: tuple[int, ...] = (64, 4096)
  grid: tuple[int, int] = (16, 16)
  width: int = 1024
  num_layers: int = 24
  num_inner_layers: int = 2
  num_heads: int = 16
  num_kv_heads: int | None = None
  num_classes: int = 1000
  mlp_multiple: int = 256
  mlp_scale: float | None = None
  rope_base: float = 10000.0
  norm_eps: float = 1e-5
  token_dropout: float = 0.1
  residual_dropout: float = 0.1
  mlp_dropout: float = 0.1
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
        " Choose one of its divisors."
      )
    if self.grid[0] != self.grid[1]:
      raise ValueError(
        f"grid={self.grid}: this family's position table is square. Use equal"
        " rows and columns."
      )
    if len(self.vocab_sizes) != 2:
      raise ValueError(
        f"vocab_sizes={self.vocab_sizes}: expected two, of the first and of"
        " the second sub-token. Give both, such as (64, 4096)."
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


VARIANTS: dict[str, Config] = {
  "B": Config(width=1024, num_layers=24, num_inner_layers=2, num_heads=16),
  "L": Config(width=1280, num_layers=36, num_inner_layers=3, num_heads=20),
  "XL": Config(width=1536, num_layers=48, num_inner_layers=4, num_heads=24),
}

# Published file -> variant.
SOURCES: dict[str, str] = {f"AR_256_{name}.ckpt": name for name in VARIANTS}


class InnerBlock(layers.Block):
  """A block over two steps that are run one after the other.

  The published model rotates step 0 by the zero row of its table and step 1 by
  nothing. Without query and key, step 0 sees itself alone; step 1 weighs itself
  with q k / sqrt(H) against step 0's 0, and a softmax over (0, s) is a sigmoid.
  """

  def attend_first(
    self, x: Float[Array, "n D"]
  ) -> tuple[Float[Array, "n D"], Float[Array, "n G 1 H"]]:
    """Attention of step 0: (what it adds, its values for step 1)."""
    c = self.config
    # The fused projection without its queries and keys.
    kernel = self.attention.qkv.kernel[:, -c.num_kv_heads * c.head_dim :]
    values = self.attention_norm(x).astype(c.dtype) @ kernel.astype(c.dtype)
    values = values.reshape(x.shape[0], c.num_kv_heads, 1, c.head_dim)
    mixed = jnp.repeat(values, c.num_heads // c.num_kv_heads, axis=2)
    return self.attention.out(mixed.reshape(x.shape[0], -1)), values

  def attend_second(
    self, x: Float[Array, "n D"], values: Float[Array, "n G 1 H"]
  ) -> Float[Array, "n D"]:
    """Attention of step 1, given the `values` of step 0."""
    c = self.config
    qkv = self.attention.qkv(self.attention_norm(x))
    qkv = qkv.reshape(x.shape[0], -1, c.head_dim)
    q, k, v = jnp.split(
      qkv, [c.num_heads, c.num_heads + c.num_kv_heads], axis=1
    )
    q = q.reshape(x.shape[0], c.num_kv_heads, -1, c.head_dim)  # [n, G, N/G, H]
    # A product and a sum, which XLA fuses: n matrix products of one row and
    # one column would be slower.
    scores = q.astype(jnp.float32) * k[:, :, None].astype(jnp.float32)
    scores = jnp.sum(scores, axis=-1, keepdims=True) * c.head_dim**-0.5
    weight = jax.nn.sigmoid(scores).astype(v.dtype)
    mixed = values + weight * (v[:, :, None] - values)
    return self.attention.out(mixed.reshape(x.shape[0], -1))

  def add(
    self, x: Float[Array, "n D"], y: Float[Array, "n D"], rng: Key | None
  ) -> Float[Array, "n D"]:
    """x plus its attention y, then plus its MLP."""
    c, rngs = self.config, (None, None)
    if rng is not None:
      rngs = tuple(jax.random.split(rng))
    x = x + layers.dropout(y, c.residual_dropout, rngs[0])
    return x + layers.dropout(
      self.mlp(self.mlp_norm(x)), c.mlp_dropout, rngs[1]
    )


class Model(nnx.Module):
  """The class-conditional model as a `Backbone`; the final norm is behind z."""

  kernel_init = staticmethod(layers.normal_init)

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    c = self.config = config
    self.num_tokens = c.grid[0] * c.grid[1]
    self.width, self.num_heads, self.dtype = c.width, c.num_heads, c.dtype
    self.vocab_sizes = tuple(c.vocab_sizes)
    self.prefix = 1
    embed = dict(embedding_init=layers.normal_init, rngs=rngs, dtype=c.dtype)
    self.class_embed = nnx.Embed(c.num_classes + 1, c.width, **embed)
    self.token_embeds = nnx.List(
      nnx.Embed(size, c.width, **embed) for size in c.vocab_sizes
    )
    self.blocks = layers.Layers(
      lambda rngs: layers.Block(c.block, rngs=rngs), c.num_layers, rngs
    )
    self.inner_blocks = layers.Layers(
      lambda rngs: InnerBlock(c.block, rngs=rngs), c.num_inner_layers, rngs
    )
    self.norm = layers.RMSNorm(c.width, c.norm_eps)
    # The heads start at zero, so that training starts at a loss of ln V_f each.
    zeros = nnx.initializers.zeros
    self.heads = nnx.List(
      layers.linear(c.width, size, rngs, c.dtype, zeros)
      for size in c.vocab_sizes
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

  def embed(self, tokens: Int[Array, "*n 2"]) -> Float[Array, "*n D"]:
    first, second = self.token_embeds
    return first(tokens[..., 0]) + second(tokens[..., 1])

  def logits(
    self,
    hidden: Float[Array, "*n D"],
    tokens: Int[Array, "*n 2"],
    *,
    rng: Key | None = None,
  ) -> tuple[Float[Array, "*n _"], ...]:
    leading = hidden.shape[:-1]
    *_, steps = self._run_inner(
      hidden.reshape(-1, self.width), tokens[..., 0].reshape(-1), rng
    )
    return tuple(
      head(self.norm(x)).astype(jnp.float32).reshape(*leading, -1)
      for head, x in zip(self.heads, steps, strict=True)
    )

  def __call__(
    self, cond: Cond, x: Float[Array, "B M D"], *, rng: Key | None = None
  ) -> Float[Array, "B M+1 D"]:
    hidden, _ = self._run(cond, x, rng)
    return hidden[:, self.prefix - 1 :]

  def hidden_states(
    self, cond: Cond, x: Float[Array, "B M D"]
  ) -> tuple[Float[Array, "L B S D"], Float[Array, "B S D"]]:
    """Every row after every spatial layer, and after the last; for tests."""
    hidden, states = self._run(cond, x, None)
    return states, hidden

  def inner_states(
    self, hidden: Float[Array, "*n D"], tokens: Int[Array, "*n 2"]
  ) -> tuple[Float[Array, "I *n 2 D"], Float[Array, "*n 2 D"]]:
    """Both steps after every inner layer, and after the norm; for tests."""
    states = self._run_inner(
      hidden.reshape(-1, self.width), tokens[..., 0].reshape(-1), None
    )
    states = jnp.stack([jnp.stack(steps, axis=-2) for steps in states])
    states = states.reshape(-1, *hidden.shape[:-1], 2, self.width)
    return states, self.norm(states[-1])

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
    """All rows through the spatial layers: (last stream, every layer's)."""
    rng_token, rng_layers = (
      (None, None) if rng is None else jax.random.split(rng)
    )
    x = jnp.concatenate([self._embed_condition(cond), x], axis=1)
    x = layers.dropout(x, self.config.token_dropout, rng_token)
    length, count = x.shape[1], self.config.num_layers
    table = self._rotary()[:length]
    mask = jnp.tril(jnp.ones((length, length), bool))
    keys = None if rng is None else jax.random.split(rng_layers, count)

    def apply(block, x, key):
      x, _ = block(
        x, lambda q: layers.rotate_interleaved(q, table), mask, rng=key
      )
      return x, x

    return self.blocks(apply, x, keys)

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
    return x[:, -1], cache.replace(end=end + length)

  def _run_inner(self, hidden, first, rng):
    """Both steps [n, D] after each inner layer, from h [n, D] and tokens [n].

    No scan, for the layers are few: this way the compiler drops step 1 where
    only logits[0] is used, and shares step 0 among the sampler's calls.
    """
    keys = [(None, None)] * self.config.num_inner_layers
    if rng is not None:
      keys = jax.random.split(rng, (len(keys), 2))
    x0, x1, states = hidden, self.token_embeds[0](first), []
    for block, (key_0, key_1) in zip(
      self.inner_blocks.each(), keys, strict=True
    ):
      y0, values = block.attend_first(x0)
      y1 = block.attend_second(x1, values)
      x0, x1 = block.add(x0, y0, key_0), block.add(x1, y1, key_1)
      states.append((x0, x1))
    return states


def import_rules(config: Config) -> list[Rule]:
  """The published state dict's names; tables and caches are not stored."""
  del config  # the same names for every size
  groups = {"spatial_blocks": "blocks", "factorized_blocks": "inner_blocks"}
  parts = {
    r"attention\.wqkv": "attention/qkv/kernel",
    r"attention\.wo": "attention/out/kernel",
    r"feed_forward\.w1": "mlp/gate/kernel",
    r"feed_forward\.w3": "mlp/up/kernel",
    r"feed_forward\.w2": "mlp/down/kernel",
    r"attention_norm": "attention_norm/scale",
    r"ffn_norm": "mlp_norm/scale",
  }
  gpt = r"transformer\."
  return [
    Rule(gpt + r"class_emb\.embedding_table\.weight", "class_embed/embedding"),
    Rule(gpt + r"pre_emb\.weight", "token_embeds/0/embedding"),
    Rule(gpt + r"post_emb\.weight", "token_embeds/1/embedding"),
    *(
      Rule(
        rf"{gpt}{group}\.(?P<layer>\d+)\.{part}\.weight",
        f"{ours}/stacked/{path}",
        LINEAR if path.endswith("kernel") else (),
      )
      for group, ours in groups.items()
      for part, path in parts.items()
    ),
    Rule(gpt + r"norm\.weight", "norm/scale"),
    Rule(gpt + r"head\.(?P<head>\d+)\.weight", "heads/{head}/kernel", LINEAR),
    # The tokenizer that the file carries is imported as one, see there.
    Rule(r"first_stage_model\..*", None),
  ]
