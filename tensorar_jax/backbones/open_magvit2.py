"""Open-MAGVIT2's transformer (Luo et al., 2024, arXiv:2409.04410).

A LLaMA over image tokens in raster order, each of two sub-tokens; a token's
embedding is the sum of theirs. A second, inner transformer reads two steps, the
spatial one's output h and the embedding of the first sub-token, and predicts

    logits[0] = head_0(norm(inner(h)))
    logits[1] = head_1(norm(inner(h, e_0[first])))

The inner transformer knows no position, so it is part of `logits`, and so is
the final norm: hidden states are the raw stream.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tensorar_jax.conditioning import conditions
from tensorar_jax.interfaces import LINEAR, Cond, Key, Rule
from tensorar_jax.nn import checks, layers, transformer


@dataclasses.dataclass(frozen=True)
class Config(transformer.RotaryConfig):
  """Sizes and training rates of one model; the base class has the others.

  `vocab_sizes` are those of the first and the second sub-token.
  """

  vocab_sizes: tuple[int, ...] = (64, 4096)
  width: int = 1024
  num_layers: int = 24
  num_inner_layers: int = 2
  num_heads: int = 16
  num_classes: int = 1000

  def __post_init__(self):
    super().__post_init__()
    sizes = ("vocab_sizes", "num_inner_layers", "num_classes")
    checks.numbers(self, checks.COUNT, *sizes)
    if len(self.vocab_sizes) != 2:
      raise ValueError(
        f"vocab_sizes={self.vocab_sizes}: expected two, of the first and of"
        " the second sub-token. Give both, such as (64, 4096)."
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
    """Attends at step 0: (what it adds, its values for step 1)."""
    c = self.config
    # The fused projection without its queries and keys.
    kernel = self.attention.qkv.weight[:, -c.num_kv_heads * c.head_dim :]
    values = self.attention_norm(x).astype(c.dtype) @ kernel.astype(c.dtype)
    values = values.reshape(x.shape[0], c.num_kv_heads, 1, c.head_dim)
    mixed = jnp.repeat(values, c.num_heads // c.num_kv_heads, axis=2)
    return self.attention.out(mixed.reshape(x.shape[0], -1)), values

  def attend_second(
    self, x: Float[Array, "n D"], values: Float[Array, "n G 1 H"]
  ) -> Float[Array, "n D"]:
    """Attends at step 1, given the `values` of step 0."""
    c = self.config
    qkv = self.attention.qkv(self.attention_norm(x))
    qkv = qkv.reshape(x.shape[0], -1, c.head_dim)
    q, k, v = jnp.split(
      qkv, [c.num_heads, c.num_heads + c.num_kv_heads], axis=1
    )
    q = q.reshape(x.shape[0], c.num_kv_heads, -1, c.head_dim)  # [n, G, N/G, H]
    # XLA fuses a product and a sum; n matrix products of one row and one column
    # would be slower.
    scores = q.astype(jnp.float32) * k[:, :, None].astype(jnp.float32)
    scores = jnp.sum(scores, axis=-1, keepdims=True) * c.head_dim**-0.5
    weight = jax.nn.sigmoid(scores).astype(v.dtype)
    mixed = values + weight * (v[:, :, None] - values)
    return self.attention.out(mixed.reshape(x.shape[0], -1))

  def add(
    self, x: Float[Array, "n D"], y: Float[Array, "n D"], rng: Key | None
  ) -> Float[Array, "n D"]:
    """Adds the attention y to x, then the MLP."""
    c, rngs = self.config, (None, None)
    if rng is not None:
      rngs = tuple(jax.random.split(rng))
    x = x + layers.dropout(y, c.residual_dropout, rngs[0])
    return x + layers.dropout(
      self.mlp(self.mlp_norm(x)), c.mlp_dropout, rngs[1]
    )


class Model(transformer.CausalTransformer):
  """The class-conditional model as a `Backbone`; `logits` applies the norm."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    super().__init__(config, config.num_kv_heads)
    c = config
    self.vocab_sizes = tuple(c.vocab_sizes)
    self.token_dropout = c.token_dropout
    embed = functools.partial(
      nnx.Embed,
      features=c.width,
      embedding_init=layers.normal_init,
      dtype=c.dtype,
      rngs=rngs,
    )
    self.class_embed = embed(c.num_classes + 1)
    self.token_embeds = nnx.List(embed(size) for size in c.vocab_sizes)
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
    conditions.refuse_order(cond)
    conditions.check_labels(cond, self.config.num_classes)

  def embed(self, tokens: Int[Array, "*n 2"]) -> Float[Array, "*n D"]:
    checks.tokens(tokens, self.vocab_sizes)
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

  def embed_condition(self, cond: Cond) -> Float[Array, "B 1 D"]:
    label = conditions.class_ids(cond, self.config.num_classes)
    return self.class_embed(label)[:, None]

  def position_inputs(self, cond, x, rows):
    return x, self.config.rotation(rows, prefix=1)

  def inner_states(
    self, hidden: Float[Array, "*n D"], tokens: Int[Array, "*n 2"]
  ) -> tuple[Float[Array, "I *n 2 D"], Float[Array, "*n 2 D"]]:
    """Both steps after every inner layer, and after the norm.

    As `hidden_states`, to compare with the published model layer by layer.
    """
    states = self._run_inner(
      hidden.reshape(-1, self.width), tokens[..., 0].reshape(-1), None
    )
    states = jnp.stack([jnp.stack(steps, axis=-2) for steps in states])
    states = states.reshape(-1, *hidden.shape[:-1], 2, self.width)
    return states, self.norm(states[-1])

  def _run_inner(self, hidden, first, rng):
    """Runs both steps [n, D] through the inner layers; returns each layer's.

    Without a scan, as layers are few, the compiler drops step 1 where only
    logits[0] is used and shares step 0 among the sampler's calls.
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
  """Maps the published names; tables and caches are not stored."""
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
    # The file's tokenizer has an import table of its own.
    Rule(r"first_stage_model\..*", None),
  ]
