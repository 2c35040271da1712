"""Janus-Pro's image generation (Chen et al., 2025, arXiv:2501.17811).

A LLaMA that is a language model: the prefix is a prompt's token ids, embedded
by the model's own text table. Image tokens follow in raster order, with an
embedding and a head of their own,

    embed(i)  = aligner(table[i])      Linear, then d - 1 times (GELU, Linear)
    logits(z) = head(GELU(head_hidden(z)))

and positions are one-dimensional over both, rotary on half-split pairs. The
vision encoder with its aligner and the text head, which serve to read images
and to write text, are not imported.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tensorar_jax.conditioning import conditions
from tensorar_jax.interfaces import LINEAR, Cond, Key, Rule
from tensorar_jax.nn import checks, layers, transformer


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and training rates of one model.

  `vocab_size` is the image's, `code_dim` the width of its embedding table
  before the aligner of `aligner_depth` projections, `head_width` that of the
  image head. None means num_heads for `num_kv_heads`, width / num_heads for
  `head_dim` and width for `head_width`. The published model was trained without
  dropout; that of tokens is TensorAR's.
  """

  text_vocab_size: int = 102400
  vocab_size: int = 16384
  grid: tuple[int, int] = (24, 24)
  width: int = 2048
  num_layers: int = 24
  num_heads: int = 16
  num_kv_heads: int | None = None
  head_dim: int | None = None
  mlp_width: int = 5632
  code_dim: int = 8
  aligner_depth: int = 2
  head_width: int | None = None
  rope_base: float = 10000.0
  norm_eps: float = 1e-6
  token_dropout: float = 0.1
  residual_dropout: float = 0.0
  mlp_dropout: float = 0.0
  dtype: str = "float32"

  def __post_init__(self):
    sizes = ("vocab_size", "width", "num_layers", "num_heads", "mlp_width")
    sizes += ("num_kv_heads", "head_dim", "head_width", "code_dim", "grid")
    sizes += ("text_vocab_size", "aligner_depth")
    checks.numbers(self, checks.COUNT, *sizes)
    rates = ("token_dropout", "residual_dropout", "mlp_dropout")
    checks.numbers(self, checks.RATE, *rates)
    checks.numbers(self, checks.POSITIVE, "rope_base", "norm_eps")
    if self.head_dim is None and self.width % self.num_heads:
      raise ValueError(
        f"width={self.width} with num_heads={self.num_heads}: expected a whole"
        " multiple. Change one of them, or give head_dim."
      )
    if self.block.head_dim < 2 or self.block.head_dim % 2:
      raise ValueError(
        f"heads of width {self.block.head_dim}: rotary positions need an even"
        " one. Change head_dim, or width and num_heads."
      )
    if self.num_heads % self.block.num_kv_heads:
      raise ValueError(
        f"num_kv_heads={self.num_kv_heads} does not divide"
        f" num_heads={self.num_heads}. Choose one of its divisors."
      )

  @property
  def block(self) -> layers.BlockConfig:
    """Sizes and rates of one block."""
    head_dim = self.head_dim
    if head_dim is None:
      head_dim = self.width // self.num_heads
    return layers.BlockConfig(
      width=self.width,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads or self.num_heads,
      head_dim=head_dim,
      mlp_width=self.mlp_width,
      norm_eps=self.norm_eps,
      residual_dropout=self.residual_dropout,
      mlp_dropout=self.mlp_dropout,
      dtype=self.dtype,
    )


VARIANTS: dict[str, Config] = {
  "1B": Config(),
  "7B": Config(width=4096, num_layers=30, num_heads=32, mlp_width=11008),
}

# Published file -> variant. Two repositories of one name have files of each
# size: the authors' has PyTorch files, the conversion for transformers has
# safetensors. The folder is named after the repository.
SOURCES: dict[str, str] = {
  "Janus-Pro-1B/pytorch_model.bin": "1B",
  "Janus-Pro-7B/pytorch_model.bin.index.json": "7B",
  **{
    f"Janus-Pro-{name}/model.safetensors{index}": name
    for name in VARIANTS
    for index in ("", ".index.json")
  },
}


class Attention(layers.SelfAttention):
  """Attention with separate projections of queries, keys and values."""

  def make_inputs(self, rngs: nnx.Rngs) -> None:
    c = self.config
    grouped = c.num_kv_heads * c.head_dim
    self.query = layers.linear(c.width, c.num_heads * c.head_dim, rngs, c.dtype)
    self.key = layers.linear(c.width, grouped, rngs, c.dtype)
    self.value = layers.linear(c.width, grouped, rngs, c.dtype)

  def inputs(self, x: Float[Array, "B M D"]) -> list[Array]:
    return [self.heads(part(x)) for part in (self.query, self.key, self.value)]


class Block(layers.Block):
  """A LLaMA block with these projections."""

  attention_type = Attention


class Model(transformer.CausalTransformer):
  """The language model with its image ends as a `Backbone`.

  The final norm is before z. The prompt may have any length.
  """

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    c = config
    super().__init__(c, c.block.num_kv_heads, c.block.head_dim)
    self.vocab_sizes = (c.vocab_size,)
    self.token_dropout = c.token_dropout

    def embed(rows: int, width: int) -> nnx.Embed:
      init = layers.normal_init
      return nnx.Embed(
        rows, width, embedding_init=init, dtype=c.dtype, rngs=rngs
      )

    def linear(inputs: int, outputs: int) -> layers.Linear:
      init = layers.normal_init
      return layers.Linear(
        inputs, outputs, kernel_init=init, dtype=c.dtype, rngs=rngs
      )

    self.text_embed = embed(c.text_vocab_size, c.width)
    self.token_embed = embed(c.vocab_size, c.code_dim)
    widths = [c.code_dim] + [c.width] * (c.aligner_depth - 1)
    self.aligner = nnx.List(linear(width, c.width) for width in widths)
    self.blocks = layers.Layers(
      lambda rngs: Block(c.block, rngs=rngs), c.num_layers, rngs
    )
    self.norm = layers.RMSNorm(c.width, c.norm_eps)
    self.head_hidden = linear(c.width, c.head_width or c.width)
    self.head = linear(c.head_width or c.width, c.vocab_size)

  def make_norm(self, rngs: nnx.Rngs) -> nnx.Module:
    del rngs  # RMSNorm starts at one
    return layers.RMSNorm(self.width, self.config.norm_eps)

  def check(self, cond: Cond) -> None:
    conditions.refuse_order(cond)
    conditions.check_prompts(cond, self.config.text_vocab_size)

  def embed(self, tokens: Int[Array, "*n 1"]) -> Float[Array, "*n D"]:
    checks.tokens(tokens, self.vocab_sizes)
    first, *rest = self.aligner
    x = first(self.token_embed(tokens[..., 0]))
    for projection in rest:
      x = projection(jax.nn.gelu(x, approximate=False))
    return x

  def logits(
    self,
    hidden: Float[Array, "*n D"],
    tokens: Int[Array, "*n 1"],
    *,
    rng: Key | None = None,
  ) -> tuple[Float[Array, "*n _"], ...]:
    del tokens, rng  # one sub-token, and a head without dropout
    x = jax.nn.gelu(self.head_hidden(hidden), approximate=False)
    return (self.head(x).astype(jnp.float32),)

  def embed_condition(self, cond: Cond) -> Float[Array, "B P D"]:
    prompt, null = cond["text"][..., 0], cond["text"][..., 1]
    return self.text_embed(jnp.where(cond["is_null"][:, None], null, prompt))

  def position_inputs(self, cond, x, rows):
    """Counts positions from a prompt's first token, not from its padding."""
    table = self._rotary_table(cond.get("is_padding"), rows)
    return x, lambda q: layers.rotate_halves(q, table)

  def _rotary_table(self, padding, rows) -> Float[Array, "#B 1 M p 2"]:
    half = self.head_dim // 2
    positions = rows
    if padding is not None:  # the rows of padding itself see nothing
      positions = jnp.maximum(rows - padding.sum(axis=1)[:, None], 0)
    # In float32, as the models were trained.
    rates = self.config.rope_base ** -(jnp.arange(half) / half)
    angles = positions[:, None, :, None] * rates
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)

  def apply_final_norm(self, x, position):
    return self.norm(x)


def import_rules(config: Config) -> list[Rule]:
  """Maps the authors' names; those of transformers' layout are aliases."""
  block = r"layers\.(?P<layer>\d+)\."
  attention, mlp = block + r"self_attn\.", block + r"mlp\."
  stacked = "blocks/stacked/"
  language = {
    "embed_tokens": "text_embed/embedding",
    attention + "q_proj": stacked + "attention/query/kernel",
    attention + "k_proj": stacked + "attention/key/kernel",
    attention + "v_proj": stacked + "attention/value/kernel",
    attention + "o_proj": stacked + "attention/out/kernel",
    mlp + "gate_proj": stacked + "mlp/gate/kernel",
    mlp + "up_proj": stacked + "mlp/up/kernel",
    mlp + "down_proj": stacked + "mlp/down/kernel",
    block + "input_layernorm": stacked + "attention_norm/scale",
    block + "post_attention_layernorm": stacked + "mlp_norm/scale",
    "norm": "norm/scale",
  }
  ends = {
    "head_hidden": (r"head\.output_mlp_projector", r"head\.proj_out"),
    "head": (r"head\.vision_head", r"head\.vision_head"),
    "aligner/0": (r"aligner\.layers\.0", r"aligner\.fc1"),
  }
  for n in range(1, config.aligner_depth):
    other = rf"aligner\.hidden_layers\.{n - 1}"
    ends[f"aligner/{n}"] = (rf"aligner\.layers\.{2 * n}", other)
  embeddings = r"model\.generation_embeddings"
  names = [("gen_embed", embeddings, "token_embed/embedding")]
  names += [  # in either layout, and where it goes
    (rf"language_model\.model\.{n}", rf"model\.language_model\.{n}", path)
    for n, path in language.items()
  ]
  rules = []
  for end, (ours, other) in ends.items():
    ours, other = rf"gen_{ours}", rf"model\.generation_{other}"
    names.append((ours, other, f"{end}/kernel"))
    rules.append(Rule(rf"{ours}\.bias", f"{end}/bias"))
    rules.append(Rule(rf"{other}\.bias", f"{end}/bias", is_alias=True))
  for ours, other, path in names:
    axes = LINEAR if path.endswith("kernel") else ()
    rules.append(Rule(rf"{ours}\.weight", path, axes))
    rules.append(Rule(rf"{other}\.weight", path, axes, is_alias=True))
  # The tokenizer that the file carries is imported as one; the others serve to
  # read images and to write text.
  unused = r"vision_model|aligner"
  return [
    *rules,
    Rule(rf"(gen_vision_model|{unused}|model\.(vqmodel|{unused}))\..*", None),
    Rule(r"(language_model\.)?lm_head\.weight", None),
    Rule(r".*language_model\..*rotary_emb\.inv_freq", None),
  ]
