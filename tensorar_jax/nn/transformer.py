"""Running a causal transformer over [condition prefix, image tokens].

All rows at once, or some rows behind a key/value cache, both are

    x, at  = place(cond, x, rows)      whatever depends on a row's number
    x      = block(x, at, mask)        every block, for all rows in one scan
    hidden = finish(x, at)

Row n of P + T sees the rows 0 .. n, but for padding in the prefix. What a block
is, and the three functions, belong to the family.
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
from tensorar_jax.nn import attention, layers
from tensorar_jax.parallel import sharding


class CausalTransformer(nnx.Module):
  """The half of a `Backbone` that runs rows through `blocks`.

  A subclass makes its weights, among them `blocks`: `layers.Layers` of modules
  called as `block(x, at, mask, *, cache=None, rng=None) -> (x, cache)`, where
  `at` is what `place` says of the rows. It defines `start`, `place` and, if the
  last residual stream is not the hidden state, `finish`.
  """

  kernel_init = staticmethod(layers.normal_init)
  blocks: layers.Layers
  # Rate on the rows that enter; None spends no key on it.
  token_dropout: float | None = None
  # Rises linearly over the blocks, which then take a `path_rate`.
  drop_path: float = 0.0
  # The entries of a condition that the cache keeps for rows behind the prefix.
  remembers: tuple[str, ...] = ("is_padding",)

  def __init__(
    self, config, num_kv_heads: int | None = None, head_dim: int | None = None
  ):
    """`config` has grid, width, num_heads and dtype."""
    c = self.config = config
    self.num_tokens = c.grid[0] * c.grid[1]
    self.width, self.num_heads, self.dtype = c.width, c.num_heads, c.dtype
    self.num_kv_heads = num_kv_heads or c.num_heads
    self.head_dim = head_dim or c.width // c.num_heads

  def start(self, cond: Cond) -> Float[Array, "B P D"]:
    """The rows that stand for the condition."""
    raise NotImplementedError

  def place(
    self, cond: Cond, x: Float[Array, "B M D"], rows: Int[Array, "M"]
  ) -> tuple[Float[Array, "B M D"], Any]:
    """(what enters the first block, what every block reads) at these rows.

    `rows` are consecutive and count from the start of the prefix. Behind it
    `cond` has only what the model `remembers`.
    """
    raise NotImplementedError

  def finish(self, x: Float[Array, "B M D"], at: Any) -> Float[Array, "B M D"]:
    """Hidden states of the last residual stream."""
    del at
    return x

  def __call__(
    self, cond: Cond, x: Float[Array, "B M D"], *, rng: Key | None = None
  ) -> Float[Array, "B M+1 D"]:
    _, hidden = self._run(cond, x, rng)
    return hidden[:, -(x.shape[1] + 1) :]

  def hidden_states(
    self, cond: Cond, x: Float[Array, "B M D"]
  ) -> tuple[Float[Array, "L B S D"], Float[Array, "B S D"]]:
    """Every row after every block, and its hidden state; for tests."""
    return self._run(cond, x, None)

  def prefill(self, cond: Cond) -> tuple[Float[Array, "B D"], Cache]:
    x = self.start(cond)
    rows = x.shape[1] + self.num_tokens
    cache = self.blocks.init_cache(
      (x.shape[0], self.num_kv_heads, rows, self.head_dim), x.dtype
    )
    context = {name: cond[name] for name in self.remembers if name in cond}
    return self._append(x, cache.replace(context=context))

  def decode(
    self, x: Float[Array, "B D"], cache: Cache
  ) -> tuple[Float[Array, "B D"], Cache]:
    return self._append(x[:, None], cache)

  def _run(self, cond, x, rng):
    """All rows through all blocks: (every block's stream, hidden states)."""
    # Each part on its own as well: XLA 0.10 has joined rows wrongly that came
    # split along another axis, on a mesh of 2 x 2 x 2.
    parts = [
      sharding.constrain(a, sharding.ROWS) for a in (self.start(cond), x)
    ]
    x = jnp.concatenate(parts, axis=1)
    if rng is not None and self.token_dropout is not None:
      rng_token, rng = jax.random.split(rng)
      x = layers.dropout(x, self.token_dropout, rng_token)
    rows, count = jnp.arange(x.shape[1]), self.blocks.num_layers
    x, at = self.place(cond, sharding.constrain(x, sharding.ROWS), rows)
    mask = attention.causal_mask(rows, len(rows), cond.get("is_padding"))
    keys = None if rng is None else jax.random.split(rng, count)
    rates = jnp.linspace(0.0, self.drop_path, count) if self.drop_path else None

    def apply(block, x, xs):
      key, rate = xs
      options = {} if rate is None else {"path_rate": rate}
      x, _ = block(x, at, mask, rng=key, **options)
      x = sharding.constrain(x, sharding.ROWS)
      return x, x

    x, states = self.blocks(apply, x, (keys, rates))
    return states, self.finish(x, at)

  def _append(self, x, cache):
    """Rows x [B, M, D] behind the cache: (hidden state of the last, cache)."""
    cond, length = cache.context, x.shape[1]
    rows = cache.end + jnp.arange(length)
    x, at = self.place(cond, x, rows)
    mask = attention.causal_mask(
      rows, layers.cache_rows(cache), cond.get("is_padding")
    )

    def apply(block, x, view):
      x, view = block(x, at, mask, cache=view)
      return sharding.constrain(x, sharding.ROWS), view

    x, cache = self.blocks.cached(apply, x, cache)
    return self.finish(x, at)[:, -1], cache.replace(end=cache.end + length)


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
  """Sizes and rates of `layers.Block`s on a square grid, 2-D rotary positions.

  `mlp_multiple` rounds the hidden width 8/3 D (times `mlp_scale`, if given) up.
  `num_kv_heads` None is `num_heads`.
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

  def rotation(self, rows: Int[Array, "M"], prefix: int) -> Callable:
    """q -> q [B, N, M, H] turned by the places of these consecutive rows."""
    table = layers.rotary_table_2d(
      self.grid, self.block.head_dim, self.rope_base, prefix
    )
    table = jax.lax.dynamic_slice_in_dim(jnp.asarray(table), rows[0], len(rows))
    return lambda q: layers.rotate_interleaved(q, table)
