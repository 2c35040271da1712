"""RAR's GPT (Yu et al., 2024, "Randomized Autoregressive Visual Generation").

A transformer over [cls, class, image tokens in any order]. Two tables tell a
row the position of its token and that of the token it must predict; the class
and the row's number set the scale and shift of every norm:

    x[p] = token + position[p] + target[p + 1]              row 0 has no target
    c[p] = SiLU(class + step[p])
    x += gate attention(norm(x) (1 + scale) + shift)        and so for the MLP
    z    = norm(x) (1 + scale') + shift'                    before the head

with shift, scale and gate linear in c.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tensorar_jax.conditioning import conditions
from tensorar_jax.interfaces import LINEAR, Cond, Key, Rule
from tensorar_jax.nn import checks, layers, transformer
from tensorar_jax.parallel import sharding

# Rows of the published tables beyond the image's; they are never used.
SPARE_POSITIONS = 1024
SPARE_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and training rates of one model.

  `mlp_width` None is 4 `width`. One embedding table serves image codes, a mask
  token that nothing uses, the classes and the null class, in this order.
  `attention_dropout` is that of the attention weights, `residual_dropout` of
  the attention's output, `mlp_dropout` of the MLP's hidden units and output.
  """

  vocab_size: int = 1024
  grid: tuple[int, int] = (16, 16)
  width: int = 768
  num_layers: int = 24
  num_heads: int = 16
  num_classes: int = 1000
  mlp_width: int | None = None
  norm_eps: float = 1e-6
  attention_dropout: float = 0.1
  residual_dropout: float = 0.1
  mlp_dropout: float = 0.1
  dtype: str = "float32"

  def __post_init__(self):
    sizes = ("vocab_size", "width", "num_layers", "num_heads", "mlp_width")
    checks.numbers(self, checks.COUNT, "num_classes", "grid", *sizes)
    rates = ("attention_dropout", "residual_dropout", "mlp_dropout")
    checks.numbers(self, checks.RATE, *rates)
    checks.numbers(self, checks.POSITIVE, "norm_eps")
    if self.width % self.num_heads:
      raise ValueError(
        f"width={self.width} is no multiple of num_heads={self.num_heads}:"
        " heads share the width equally. Change one of them."
      )
    if len(self.grid) != 2:
      raise ValueError(f"grid={self.grid}: expected (rows, columns).")


VARIANTS: dict[str, Config] = {
  "B": Config(width=768, num_layers=24),
  "L": Config(width=1024, num_layers=24),
  "XL": Config(width=1280, num_layers=32),
  "XXL": Config(width=1408, num_layers=40, mlp_width=6144),
}

# Published file -> variant.
SOURCES: dict[str, str] = {f"rar_{name.lower()}.bin": name for name in VARIANTS}


def _linear(width_in, width_out, config, rngs, kernel_init=layers.normal_init):
  """Makes a projection with a bias, which starts at zero."""
  return layers.Linear(
    width_in,
    width_out,
    kernel_init=kernel_init,
    dtype=config.dtype,
    rngs=rngs,
  )


def _norm(width, config, rngs, affine=True):
  """Makes a LayerNorm with float32 statistics; `affine`: scale and bias."""
  return nnx.LayerNorm(
    width,
    epsilon=config.norm_eps,
    dtype=config.dtype,
    use_scale=affine,
    use_bias=affine,
    use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits
    rngs=rngs,
  )


class Attention(nnx.Module):
  """Causal attention with a LayerNorm, shared by the heads, on q and on k."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = c = config
    head_dim = c.width // c.num_heads
    self.qkv = _linear(c.width, 3 * c.width, c, rngs)
    self.query_norm = _norm(head_dim, c, rngs)
    self.key_norm = _norm(head_dim, c, rngs)
    self.out = _linear(c.width, c.width, c, rngs)

  def __call__(self, x, mask, cache=None, rng=None):
    c = self.config
    batch, length, _ = x.shape
    qkv = self.qkv(x).reshape(batch, length, 3 * c.num_heads, -1)
    q, k, v = jnp.split(qkv.transpose(0, 2, 1, 3), 3, axis=1)  # [B, N, M, H]
    q, k = self.query_norm(q), self.key_norm(k)
    if cache is not None:
      cache, k, v = cache.append(k, v)
    mixed = layers.attention(q, k, v, mask, rate=c.attention_dropout, rng=rng)
    mixed = mixed.transpose(0, 2, 1, 3).reshape(batch, length, -1)
    return self.out(mixed), cache


class MLP(nnx.Module):
  """down(gelu(up(x))) with the exact GELU."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = c = config
    hidden = c.mlp_width or 4 * c.width
    self.up = _linear(c.width, hidden, c, rngs)
    self.down = _linear(hidden, c.width, c, rngs)

  def __call__(self, x, rng=None):
    hidden = jax.nn.gelu(self.up(x), approximate=False)
    return self.down(layers.dropout(hidden, self.config.mlp_dropout, rng))


class Block(nnx.Module):
  """Attention and MLP, each between an adaptive norm and a gate."""

  sharding_rules = (("modulation/kernel", ("fsdp", "tensor")),)

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = c = config
    # Zero: a new layer's gates are shut, and it does nothing.
    zeros = nnx.initializers.zeros
    self.modulation = _linear(c.width, 6 * c.width, c, rngs, zeros)
    self.attention_norm = _norm(c.width, c, rngs)
    self.attention = Attention(c, rngs=rngs)
    self.mlp_norm = _norm(c.width, c, rngs)
    self.mlp = MLP(c, rngs=rngs)

  def __call__(self, x, signal, mask, *, cache=None, rng=None):
    """x and signal [B, M, D] -> (x, cache). `rng` switches the dropouts on."""
    c = self.config
    rngs = [None] * 4 if rng is None else list(jax.random.split(rng, 4))
    parts = jnp.split(self.modulation(signal), 6, axis=-1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
    y = self.attention_norm(x) * (1 + scale) + shift
    y, cache = self.attention(y, mask, cache, rngs[0])
    x = x + gate * layers.dropout(y, c.residual_dropout, rngs[1])
    y = self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift
    y = layers.dropout(self.mlp(y, rngs[2]), c.mlp_dropout, rngs[3])
    return x + mlp_gate * y, cache


class Model(transformer.CausalTransformer):
  """The class-conditional GPT as a `Backbone`; the final norm is before z.

  A condition is {"label", "is_null"} and, if the tokens do not come in raster
  order, "order" [B, T]: the raster index of the token at each position.
  """

  prefix = 2
  cached_condition = ("label", "is_null", "order")
  sharding_rules = (
    (r"final_modulation/kernel", ("fsdp", "tensor")),
    (r"cls|(position|target|step)_table", (sharding.SPLIT,)),
  )

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    super().__init__(config)
    c = config
    self.vocab_sizes = (c.vocab_size,)

    def table(rows):
      shape = (1, self.num_tokens + rows, c.width)
      return nnx.Param(layers.normal_init(rngs.params(), shape))

    self.cls = nnx.Param(jnp.zeros((1, 1, c.width)))
    self.position_table = table(SPARE_POSITIONS)
    self.target_table = table(SPARE_POSITIONS)
    self.step_table = table(SPARE_STEPS)
    self.token_embed = nnx.Embed(
      c.vocab_size + 1 + c.num_classes + 1,
      c.width,
      embedding_init=layers.normal_init,
      dtype=c.dtype,
      rngs=rngs,
    )
    self.blocks = layers.Layers(
      lambda rngs: Block(c, rngs=rngs), c.num_layers, rngs
    )
    zeros = nnx.initializers.zeros
    self.final_modulation = _linear(c.width, 2 * c.width, c, rngs, zeros)
    self.final_norm = _norm(c.width, c, rngs, affine=False)
    self.head = _linear(c.width, c.vocab_size, c, rngs)

  def make_norm(self, rngs: nnx.Rngs) -> nnx.Module:
    return _norm(self.width, self.config, rngs)

  def check(self, cond: Cond) -> None:
    conditions.check_labels(cond, self.config.num_classes)
    order, images = cond.get("order"), len(cond["label"])
    if order is None or isinstance(order, jax.core.Tracer):
      return
    every = np.broadcast_to(
      np.arange(self.num_tokens), (images, self.num_tokens)
    )
    if not np.array_equal(np.sort(order, axis=-1), every):
      raise ValueError(
        f"order of shape {order.shape}: expected a permutation of 0 to"
        f" {self.num_tokens - 1} for each of {images} labels. Leave it"
        " out for raster order."
      )

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
    del tokens, rng  # one sub-token, no dropout: nothing to condition on
    return (self.head(hidden).astype(jnp.float32),)

  def condition_ids(self, cond: Cond) -> Int[Array, "B"]:
    """Returns the row of the embedding table for each condition."""
    label = conditions.class_ids(cond, self.config.num_classes)
    return self.config.vocab_size + 1 + label

  def embed_condition(self, cond: Cond) -> Float[Array, "B P D"]:
    label = self.token_embed(self.condition_ids(cond))[:, None]
    cls = self.cls[...].astype(label.dtype)
    return jnp.concatenate([jnp.broadcast_to(cls, label.shape), label], axis=1)

  def position_inputs(self, cond, x, rows):
    """Adds both position tables; blocks read the signal of their norms.

    `rows` are numbers in the sequence [cls, class, tokens]; the entry of a
    token in either table is the prefix plus its raster index. Rows after the
    last one count as the last.
    """
    order = cond.get("order")
    order = jnp.arange(self.num_tokens)[None] if order is None else order
    prefix = jnp.arange(self.prefix)
    prefix = jnp.broadcast_to(prefix, (len(order), self.prefix))
    entries = jnp.concatenate([prefix, self.prefix + order], axis=1)  # [b, P+T]
    last = entries.shape[1] - 1
    rows = jnp.minimum(rows, last)
    entry_of = functools.partial(jnp.take_along_axis, entries, axis=1)
    here = self.position_table[...][0, entry_of(rows)]
    target = self.target_table[...][0, entry_of(jnp.minimum(rows + 1, last))]
    # Only rows whose next row is a token predict one.
    predicts = (rows >= self.prefix - 1) & (rows < last)
    target = jnp.where(predicts[..., None], target, 0)
    x = x + here.astype(x.dtype) + target.astype(x.dtype)
    return x, self._signal(cond, rows)

  def _signal(self, cond, rows):
    """Returns what the adaptive norms of these rows read, [B, M, D]."""
    label = self.token_embed(self.condition_ids(cond))[:, None]
    # The row's number, not the raster index of its token.
    step = self.step_table[...][0, rows]
    return jax.nn.silu(label + step.astype(label.dtype))

  def apply_final_norm(self, x, signal):
    # The published order is (scale, shift) here and the opposite in a block.
    scale, shift = jnp.split(self.final_modulation(signal), 2, axis=-1)
    return self.final_norm(x) * (1 + scale) + shift


def import_rules(config: Config) -> list[Rule]:
  """Maps the published names."""
  del config  # the same names for every size
  rules = [
    Rule(r"cls_token", "cls"),
    Rule(r"pos_embed", "position_table"),
    Rule(r"target_aware_pos_embed", "target_table"),
    Rule(r"timesteps_embeddings", "step_table"),
    Rule(r"embeddings\.weight", "token_embed/embedding"),
  ]

  def linear(source, target):
    rules.append(Rule(source + r"\.weight", target + "/kernel", LINEAR))
    rules.append(Rule(source + r"\.bias", target + "/bias"))

  def norm(source, target):
    rules.append(Rule(source + r"\.weight", target + "/scale"))
    rules.append(Rule(source + r"\.bias", target + "/bias"))

  layer, stacked = r"blocks\.(?P<layer>\d+)\.", "blocks/stacked/"
  linear(layer + r"adaLN_modulation\.1", stacked + "modulation")
  norm(layer + r"norm1", stacked + "attention_norm")
  linear(layer + r"attn\.qkv", stacked + "attention/qkv")
  norm(layer + r"attn\.q_norm", stacked + "attention/query_norm")
  norm(layer + r"attn\.k_norm", stacked + "attention/key_norm")
  linear(layer + r"attn\.proj", stacked + "attention/out")
  norm(layer + r"norm2", stacked + "mlp_norm")
  linear(layer + r"mlp\.fc1", stacked + "mlp/up")
  linear(layer + r"mlp\.fc2", stacked + "mlp/down")
  linear(r"adaln_before_head\.adaLN_modulation\.1", "final_modulation")
  linear(r"lm_head", "head")
  return rules
