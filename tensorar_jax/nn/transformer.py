"""Runs a causal transformer over [condition prefix, image tokens].

All rows at once, or some rows after those of a key/value cache, both are

    prefix      = embed_condition(cond)
    x, position = position_inputs(cond, x, rows)
    x           = block(x, position, mask)      every block, in one scan
    hidden      = apply_final_norm(x, position)

Row n of P + T sees the rows 0 .. n, but for padding in the prefix. In a cache
every image may be at a row of its own, so `rows` are [B, M], or [1, M] if all
images share them. The blocks and these three methods belong to the family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tensorar_jax.interfaces import Cache, Cond, Key
from tensorar_jax.nn import attention, checks, layers
from tensorar_jax.parallel import sharding


class CausalTransformer(nnx.Module):
  """The half of a `Backbone` that runs rows through `blocks`.

  A subclass makes its weights, among them `blocks`: `layers.Layers` of modules
  called as `block(x, position, mask, *, cache=None, rng=None) -> (x, cache)`,
  where `position` is the second result of `position_inputs`. It defines
  `embed_condition`, `position_inputs` and, if the last residual stream is not
  the hidden state, `apply_final_norm`.
  """

  kernel_init = staticmethod(layers.normal_init)
  blocks: layers.Layers
  # Rate of dropout on the rows that enter the first block. None takes no random
  # key, so that the other dropouts see other numbers than with a rate of 0.
  token_dropout: float | None = None
  # Rate of drop path at the last block; it rises linearly from 0 at the first.
  # Unless it is 0, blocks take a `path_rate`.
  drop_path: float = 0.0
  # The entries of a condition that the rows after the prefix need; the cache
  # keeps them.
  cached_condition: tuple[str, ...] = ("is_padding",)

  def __init__(
    self, config, num_kv_heads: int | None = None, head_dim: int | None = None
  ):
    """`config` has grid, width, num_heads and dtype."""
    c = self.config = config
    self.grid, self.num_tokens = c.grid, c.grid[0] * c.grid[1]
    self.width, self.num_heads, self.dtype = c.width, c.num_heads, c.dtype
    self.num_kv_heads = num_kv_heads or c.num_heads
    self.head_dim = head_dim or c.width // c.num_heads

  def embed_condition(self, cond: Cond) -> Float[Array, "B P D"]:
    """The rows that stand for the condition."""
    raise NotImplementedError

  def position_inputs(
    self, cond: Cond, x: Float[Array, "B M D"], rows: Int[Array, "#B M"]
  ) -> tuple[Float[Array, "B M D"], Any]:
    """Adds what depends on the numbers of rows.

    Args:
      cond: the condition; when decoding, only its `cached_condition` entries.
      x: the rows that enter.
      rows: their numbers, consecutive in each image, counted from the start of
        the prefix. Rows after the last one of the sequence may be anything.

    Returns:
      (what enters the first block, what every block reads of the positions,
      such as a rotation or the signal of adaptive norms).
    """
    raise NotImplementedError

  def apply_final_norm(
    self, x: Float[Array, "B M D"], position: Any
  ) -> Float[Array, "B M D"]:
    """Hidden states of the last residual stream; by default the stream."""
    del position
    return x

  def __call__(
    self, cond: Cond, x: Float[Array, "B M D"], *, rng: Key | None = None
  ) -> Float[Array, "B M+1 D"]:
    """Hidden states of all rows at once; see `Backbone`."""
    _, hidden = self._run(cond, x, rng)
    return hidden[:, -(x.shape[1] + 1) :]

  def hidden_states(
    self, cond: Cond, x: Float[Array, "B M D"]
  ) -> tuple[Float[Array, "L B S D"], Float[Array, "B S D"]]:
    """Every row after every block, and its hidden state.

    To compare a family with the model it was ported from, block by block.
    """
    return self._run(cond, x, None)

  def prefill(
    self, cond: Cond, spare: int = 0
  ) -> tuple[Float[Array, "B D"], Cache]:
    """Runs the prefix; see `Backbone`."""
    x = self.embed_condition(cond)
    rows = x.shape[1] + self.num_tokens + spare
    cache = self.blocks.init_cache(
      (x.shape[0], self.num_kv_heads, rows, self.head_dim), x.dtype
    )
    context = {n: cond[n] for n in self.cached_condition if n in cond}
    cache = dataclasses.replace(cache, context=context)
    hidden, cache = self.decode(x, cache)
    return hidden[:, -1], cache

  def decode(
    self, x: Float[Array, "B M D"], cache: Cache
  ) -> tuple[Float[Array, "B M D"], Cache]:
    """Runs M more rows; see `Backbone`."""
    cond, length = cache.context, x.shape[1]
    end = cache.end[:1] if cache.is_aligned else cache.end
    rows = end[:, None] + jnp.arange(length)
    x, position = self.position_inputs(cond, x, rows)
    mask = attention.causal_mask(
      rows, layers.cache_rows(cache), cond.get("is_padding")
    )

    def apply(block, x, view):
      x, view = block(x, position, mask, cache=view)
      return sharding.constrain(x, sharding.ROWS), view

    x, cache = self.blocks.cached(apply, x, cache)
    hidden = self.apply_final_norm(x, position)
    return hidden, dataclasses.replace(cache, end=cache.end + length)

  def _run(self, cond, x, rng):
    """Runs all rows: (the stream after every block, hidden states)."""
    # Each part on its own as well: XLA 0.10 has joined rows wrongly that came
    # split along another axis, on a mesh of 2 x 2 x 2.
    prefix = sharding.constrain(self.embed_condition(cond), sharding.ROWS)
    x = sharding.constrain(x, sharding.ROWS)
    x = jnp.concatenate([prefix, x], axis=1)
    if rng is not None and self.token_dropout is not None:
      rng_token, rng = jax.random.split(rng)
      x = layers.dropout(x, self.token_dropout, rng_token)
    rows, count = jnp.arange(x.shape[1])[None], self.blocks.num_layers
    x = sharding.constrain(x, sharding.ROWS)
    x, position = self.position_inputs(cond, x, rows)
    mask = attention.causal_mask(rows, x.shape[1], cond.get("is_padding"))
    keys = None if rng is None else jax.random.split(rng, count)
    rates = jnp.linspace(0.0, self.drop_path, count) if self.drop_path else None

    def apply(block, x, xs):
      key, rate = xs
      options = {} if rate is None else {"path_rate": rate}
      x, _ = block(x, position, mask, rng=key, **options)
      x = sharding.constrain(x, sharding.ROWS)
      return x, x

    x, states = self.blocks(apply, x, (keys, rates))
    return states, self.apply_final_norm(x, position)


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
  """Sizes and rates of `layers.Block`s on a square grid, 2-D rotary positions.

  Attributes:
    num_kv_heads: key and value heads; None is `num_heads`.
    mlp_scale: factor on the hidden width of the MLPs, 8/3 D without it.
    mlp_multiple: the hidden width is rounded up to a multiple of this.
  """

  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int | None = None
  grid: tuple[int, int] = (16, 16)
  mlp_multiple: int = 256
  mlp_scale: float | None = None
  rope_base: float = 10000.0
  norm_eps: float = 1e-5
  token_dropout: float = 0.1
  residual_dropout: float = 0.1
  mlp_dropout: float = 0.1
  dtype: str = "float32"

  def __post_init__(self):
    sizes = ("width", "num_layers", "num_heads", "num_kv_heads", "grid")
    checks.numbers(self, checks.COUNT, *sizes, "mlp_multiple")
    rates = ("token_dropout", "residual_dropout", "mlp_dropout")
    checks.numbers(self, checks.RATE, *rates)
    scales = ("mlp_scale", "rope_base", "norm_eps")
    checks.numbers(self, checks.POSITIVE, *scales)
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

  @property
  def block(self) -> layers.BlockConfig:
    """Sizes and rates of one block."""
    hidden = int(2 * (4 * self.width) / 3)
    if self.mlp_scale is not None:
      hidden = int(self.mlp_scale * hidden)
    rounded = -(-hidden // self.mlp_multiple) * self.mlp_multiple
    return layers.BlockConfig(
      width=self.width,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads or self.num_heads,
      head_dim=self.width // self.num_heads,
      mlp_width=rounded,
      norm_eps=self.norm_eps,
      residual_dropout=self.residual_dropout,
      mlp_dropout=self.mlp_dropout,
      dtype=self.dtype,
    )

  def rotation(self, rows: Int[Array, "#B M"], prefix: int) -> Callable:
    """Returns q [B, N, M, H] -> q, rotated by the rows' places in the grid.

    The first `prefix` rows are not in the grid.
    """
    table = layers.rotary_table_2d(
      self.grid, self.block.head_dim, self.rope_base, prefix
    )
    table = jnp.asarray(table)[jnp.minimum(rows, len(table) - 1)]
    return lambda q: layers.rotate_interleaved(q, table[:, None])
