"""The encoder of T5 (Raffel et al., 2020; v1.1 and Flan: gated GELU).

A pre-norm transformer without biases and without absolute positions. Every
block adds one shared bias to its attention scores, which are not scaled:

    scores[h, i, j] = q_i . k_j + table[bucket(j - i), h]

where near offsets have a bucket each and far ones share them logarithmically.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tensorar_jax.interfaces import LINEAR, Rule
from tensorar_jax.nn import layers

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of one encoder, by default those of Flan-T5-XL.

  `num_buckets` are for both directions together; offsets of `max_distance` and
  more share the last one of their direction. `dtype` is that of
  computation; norms, softmax and scores are float32.
  """

  vocab_size: int = 32128
  width: int = 2048
  num_layers: int = 24
  num_heads: int = 32
  head_dim: int = 64
  mlp_width: int = 5120
  num_buckets: int = 32
  max_distance: int = 128
  norm_eps: float = 1e-6
  dtype: str = "float32"

  def __post_init__(self):
    if self.dtype not in DTYPES:
      raise ValueError(f"dtype={self.dtype!r}: expected one of {DTYPES}.")
    if self.num_buckets < 4 or self.num_buckets % 2:
      raise ValueError(
        f"num_buckets={self.num_buckets}: expected an even number from 4 on,"
        " half of it for each direction."
      )
    if self.max_distance <= self.num_buckets // 4:
      raise ValueError(
        f"max_distance={self.max_distance}: expected more than"
        f" {self.num_buckets // 4}, up to where each offset has its own bucket."
      )


# Fields of a published config.json -> ours; absent ones have our defaults.
_FIELDS = {
  "vocab_size": "vocab_size",
  "d_model": "width",
  "num_layers": "num_layers",
  "num_heads": "num_heads",
  "d_kv": "head_dim",
  "d_ff": "mlp_width",
  "relative_attention_num_buckets": "num_buckets",
  "relative_attention_max_distance": "max_distance",
  "layer_norm_epsilon": "norm_eps",
}


def published_config(fields: Mapping[str, Any], dtype: str) -> Config:
  """The Config of a published config.json; another model is a ValueError."""
  kind = fields.get("model_type"), fields.get("feed_forward_proj")
  if kind != ("t5", "gated-gelu"):
    raise ValueError(
      f"model_type, feed_forward_proj = {kind}: expected ('t5', 'gated-gelu'),"
      " the encoder of T5 v1.1 or Flan-T5. Use such a model."
    )
  sizes = {our: fields[name] for name, our in _FIELDS.items() if name in fields}
  return Config(**sizes, dtype=dtype)


def buckets(
  offsets: Int[np.ndarray, "*n"], num_buckets: int, max_distance: int
) -> Int[np.ndarray, "*n"]:
  """The bucket of each offset, key position minus query position."""
  half = num_buckets // 2
  exact = half // 2
  distance = np.abs(offsets)
  # In float32, as published: some distances are on the edge of a bucket.
  far = np.log(np.maximum(distance, exact).astype(np.float32) / exact)
  far = far / np.log(max_distance / exact).item() * (half - exact)
  far = np.minimum(exact + far.astype(int), half - 1)
  return np.where(distance < exact, distance, far) + half * (offsets > 0)


class Attention(nnx.Module):
  """Attention in both directions, unscaled, with a bias on the scores."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    c = self.config = config
    inner = c.num_heads * c.head_dim
    self.q = layers.linear(c.width, inner, rngs, c.dtype)
    self.k = layers.linear(c.width, inner, rngs, c.dtype)
    self.v = layers.linear(c.width, inner, rngs, c.dtype)
    self.out = layers.linear(inner, c.width, rngs, c.dtype)

  def __call__(self, x, bias, mask):
    shape = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
    q, k, v = (
      project(x).reshape(shape) for project in (self.q, self.k, self.v)
    )
    mixed = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=1.0)
    return self.out(mixed.reshape(*x.shape[:2], -1))


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    c = config
    self.attention_norm = layers.RMSNorm(c.width, c.norm_eps)
    self.attention = Attention(c, rngs=rngs)
    self.mlp_norm = layers.RMSNorm(c.width, c.norm_eps)
    # JAX's own default is the tanh form, which these models use.
    self.mlp = layers.GatedMLP(
      c.width, c.mlp_width, rngs=rngs, dtype=c.dtype, activation=jax.nn.gelu
    )

  def __call__(self, x, bias, mask):
    x = x + self.attention(self.attention_norm(x), bias, mask)
    return x + self.mlp(self.mlp_norm(x))


class Model(nnx.Module):
  """Token ids and a mask -> features of every token."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    c = self.config = config
    self.token_embed = nnx.Embed(
      c.vocab_size, c.width, rngs=rngs, dtype=c.dtype
    )
    self.relative_bias = nnx.Embed(c.num_buckets, c.num_heads, rngs=rngs)
    self.blocks = layers.Layers(
      lambda rngs: Block(c, rngs=rngs), c.num_layers, rngs
    )
    self.norm = layers.RMSNorm(c.width, c.norm_eps)

  def position_bias(self, length: int) -> Float[Array, "1 N S S"]:
    """The bias of the scores of every block, [1, head, query, key]."""
    c, positions = self.config, np.arange(length)
    offsets = positions - positions[:, None]
    table = buckets(offsets, c.num_buckets, c.max_distance)
    return self.relative_bias(jnp.asarray(table)).transpose(2, 0, 1)[None]

  def hidden_states(
    self, ids: Int[Array, "B S"], mask: Bool[Array, "B S"]
  ) -> tuple[Float[Array, "L B S D"], Float[Array, "B S D"]]:
    """(inputs of each block, features), of masked positions too."""
    bias = self.position_bias(ids.shape[1])
    keys = mask[:, None, None]  # [B, N, query, key]

    def apply(block, x, _):
      return block(x, bias, keys), x

    x, states = self.blocks(apply, self.token_embed(ids))
    return states, self.norm(x)

  def __call__(
    self, ids: Int[Array, "B S"], mask: Bool[Array, "B S"]
  ) -> Float[Array, "B S D"]:
    """Features of every position; no position sees a masked one."""
    return self.hidden_states(ids, mask)[1]


def import_rules(config: Config) -> list[Rule]:
  """Published names -> paths of `Model`; the decoder is not read."""
  del config  # the same names for every size
  block = r"encoder\.block\.(?P<layer>\d+)\.layer\."
  stacked = "blocks/stacked/"
  kernels = {
    r"0\.SelfAttention\.q": "attention/q",
    r"0\.SelfAttention\.k": "attention/k",
    r"0\.SelfAttention\.v": "attention/v",
    r"0\.SelfAttention\.o": "attention/out",
    r"1\.DenseReluDense\.wi_0": "mlp/gate",
    r"1\.DenseReluDense\.wi_1": "mlp/up",
    r"1\.DenseReluDense\.wo": "mlp/down",
  }
  return [
    Rule(r"shared\.weight", "token_embed/embedding"),
    *(
      Rule(rf"{block}{name}\.weight", f"{stacked}{path}/kernel", LINEAR)
      for name, path in kernels.items()
    ),
    Rule(block + r"0\.layer_norm\.weight", stacked + "attention_norm/scale"),
    Rule(block + r"1\.layer_norm\.weight", stacked + "mlp_norm/scale"),
    Rule(
      r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias"
      r"\.weight",
      "relative_bias/embedding",
    ),
    Rule(r"encoder\.final_layer_norm\.weight", "norm/scale"),
    # A copy of the shared table, and the decoder.
    Rule(r"encoder\.embed_tokens\.weight", None),
    Rule(r"(decoder|lm_head)\..*", None),
  ]
