"""Parts of the backbones: rotary tables, KV cache, stacked blocks, projections.

Layers of one kind are stored stacked, `[L, ...]`, and run under `lax.scan`.
Norms, softmax and rotary arithmetic are float32 whatever the compute dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float

from tensorar_jax.interfaces import Cache, Key
from tensorar_jax.nn.attention import attention, dropout
from tensorar_jax.parallel import sharding, weights

Layer = TypeVar("Layer", bound=nnx.Module)


def normal_init(rng: Key, shape, dtype=jnp.float32) -> Array:
  """Draws from normal(0, 0.02), the same bits under jit and outside of it."""
  draw = jax.random.normal(rng, shape, dtype)
  return jax.lax.optimization_barrier(draw) * 0.02  # or the factors merge


class RMSNorm(nnx.Module):
  """x / rms(x) * scale; statistics in float32, scaled in the input's dtype."""

  def __init__(self, width: int, eps: float = 1e-5):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

  def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return y.astype(x.dtype) * self.scale[...].astype(x.dtype)


def drop_path(x: Array, rate: float | Array, rng: Key | None) -> Array:
  """Zeroes whole samples (leading axis) at `rate` and rescales the others."""
  if rng is None:
    return x
  keep = jax.random.bernoulli(rng, 1.0 - rate, (x.shape[0],))
  keep = keep.reshape((-1,) + (1,) * (x.ndim - 1))
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


# --- rotary position tables ------------------------------------------------


def rotary_table_2d(
  grid: tuple[int, int], head_dim: int, base: float, prefix: int
) -> Float[np.ndarray, "S p 2"]:
  """Returns cos and sin of every pair: `prefix` rows of 0, then the grid's.

  The first half of the pairs turns with the row, the second with the column.
  The prefix is zero, not the identity: it erases prefix queries and keys, as
  the published models that use this table were trained.
  """
  half = head_dim // 2
  freqs = base ** (-np.arange(0, half, 2, dtype=np.float64) / half)
  rows, cols = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
  angles = np.concatenate(
    [rows[:, None] * freqs, cols[:, None] * freqs], axis=-1
  )
  table = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
  zeros = np.zeros((prefix, half, 2))
  return np.concatenate([zeros, table]).astype(np.float32)


def rotate_interleaved(
  x: Float[Array, "B N M H"], table: Float[Array, "#B 1 M p 2"]
) -> Float[Array, "B N M H"]:
  """Rotates the pairs (2p, 2p + 1) of each head by the table's angles."""
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  a, b = pairs[..., 0], pairs[..., 1]
  cos, sin = table[..., 0], table[..., 1]
  out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.reshape(x.shape).astype(x.dtype)


def rotate_halves(
  x: Float[Array, "B N M H"], table: Float[Array, "#B 1 M p 2"]
) -> Float[Array, "B N M H"]:
  """Rotates the pairs (p, H/2 + p) of each head by the table's angles."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = table[..., 0], table[..., 1]
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.astype(x.dtype)


# --- the cache, and layers of one kind --------------------------------------


@struct.dataclass
class LayerCache:
  """One layer's view of a Cache. `layer` is None if k and v are its own."""

  k: Array
  v: Array
  end: Array
  layer: Array | None = None
  is_aligned: bool = struct.field(pytree_node=False, default=True)

  def append(self, k: Array, v: Array) -> tuple[LayerCache, Array, Array]:
    """Writes rows `end..`; returns the cache and all its keys and values."""
    new = dataclasses.replace(
      self, k=self._write(self.k, k), v=self._write(self.v, v)
    )
    if self.layer is None:
      return new, new.k, new.v
    read = jax.lax.dynamic_index_in_dim
    return (
      new,
      read(new.k, self.layer, keepdims=False),
      read(new.v, self.layer, keepdims=False),
    )

  def _write(self, old: Array, rows: Float[Array, "B N M H"]) -> Array:
    """Writes keys or values of M rows over the old ones."""
    rows = rows if self.layer is None else rows[None]
    layer = () if self.layer is None else (self.layer,)
    if self.is_aligned:
      start = (*layer, 0, 0, self.end[0], 0)
      return jax.lax.dynamic_update_slice(old, rows, start)

    def write(old, rows, end):
      return jax.lax.dynamic_update_slice(old, rows, (*layer, 0, end, 0))

    axis = len(layer)  # of the images
    return jax.vmap(write, (axis, axis, 0), axis)(old, rows, self.end)


def cache_rows(cache: Cache) -> int:
  """Returns how many rows a cache has room for."""
  return jax.tree.leaves(cache.k)[0].shape[-2]


# Which activations of a layer training keeps for the backward pass. The others
# are computed again, and weights are always gathered again.
REMAT = {
  "none": jax.checkpoint_policies.save_anything_except_these_names(
    sharding.GATHERED
  ),
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


@runtime_checkable
class _HasRemat(Protocol):
  remat: str


def set_remat(model: nnx.Module, name: str) -> None:
  """Sets the REMAT policy of every module that has a `remat`, as `Layers` has.

  "dots" keeps the results of products with weights, "full" what enters a layer.
  """
  if name not in REMAT:
    raise ValueError(f"remat={name!r}: choose one of {tuple(REMAT)}.")
  for _, module in nnx.iter_modules(model):
    if isinstance(module, _HasRemat):
      module.remat = name


def checkpoint(function: Callable, remat: str, in_scan: bool = False):
  """Wraps `function` in `jax.checkpoint` with a policy of REMAT."""
  if remat == "none" and not sharding.is_split():
    return function
  # A scan keeps the two passes apart; elsewhere barriers have to.
  return jax.checkpoint(function, policy=REMAT[remat], prevent_cse=not in_scan)


class Layers(nnx.Module, Generic[Layer]):
  """`num_layers` equal layers with parameters stacked on a leading axis."""

  # One module with stacked weights, or one for each layer; see `for_decoding`.
  stacked: Layer | nnx.List[Layer]

  def __init__(
    self,
    make: Callable[[nnx.Rngs], Layer],
    num_layers: int,
    rngs: nnx.Rngs,
  ):
    self.num_layers, self.remat = num_layers, "none"
    self.stacked = nnx.vmap(make)(rngs.split(num_layers))

  @property
  def is_single(self) -> bool:
    """Whether each layer has its own arrays; see `single_layers`."""
    return isinstance(self.stacked, nnx.List)

  def __call__(self, apply: Callable, x: Array, xs: Any = None):
    """Scans `apply(layer, x, xs_l) -> (x, y_l)`; returns (x, stacked y)."""
    graphdef, params = nnx.split(self.stacked)

    def body(x, scanned):
      layer = sharding.gather(nnx.merge(graphdef, scanned[0]))
      return apply(layer, x, scanned[1])

    body = checkpoint(body, self.remat, in_scan=True)
    return jax.lax.scan(body, x, (params, xs))

  def cached(self, apply: Callable, x: Array, cache: Cache):
    """Runs `apply(layer, x, layer_cache)`; returns (x, cache).

    With single layers (see `single_layers`) each one owns its cache arrays;
    else the stacked cache is the carry of a scan and gets one write a layer.
    """
    if isinstance(self.stacked, nnx.List):
      keys, values = [], []
      for layer, k, v in zip(self.stacked, cache.k, cache.v, strict=True):
        view = LayerCache(k, v, cache.end, is_aligned=cache.is_aligned)
        x, view = apply(layer, x, view)
        keys.append(view.k)
        values.append(view.v)
      return x, dataclasses.replace(cache, k=tuple(keys), v=tuple(values))
    graphdef, params = nnx.split(self.stacked)

    def body(carry, scanned):
      x, k, v = carry
      view = LayerCache(k, v, cache.end, scanned[1], cache.is_aligned)
      x, view = apply(nnx.merge(graphdef, scanned[0]), x, view)
      return (x, view.k, view.v), None

    numbered = (params, jnp.arange(self.num_layers))
    (x, k, v), _ = jax.lax.scan(body, (x, cache.k, cache.v), numbered)
    return x, dataclasses.replace(cache, k=k, v=v)

  def each(self) -> list[Layer]:
    """The layers one by one, with slices of the stacked parameters."""
    if isinstance(self.stacked, nnx.List):
      return list(self.stacked)
    graphdef, params = nnx.split(self.stacked)
    return [
      nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], params))
      for i in range(self.num_layers)
    ]

  def init_cache(self, shape: tuple[int, int, int, int], dtype) -> Cache:
    """An empty cache; shape = [B, N, S, H] of one layer."""
    end = jnp.zeros(shape[0], jnp.int32)
    if self.is_single:
      empty = tuple(
        sharding.constrain(jnp.zeros(shape, dtype), *sharding.HEADS)
        for _ in range(self.num_layers)
      )
      return Cache(k=empty, v=empty, end=end)
    empty = jnp.zeros((self.num_layers, *shape), dtype)
    empty = sharding.constrain(empty, None, *sharding.HEADS)
    return Cache(k=empty, v=empty, end=end)


def for_decoding(model: weights.Model, platform: str) -> weights.Model:
  """Returns a copy of `model` in the form in which `platform` decodes fastest.

  On TPUs layers stay stacked. Elsewhere they become single, and on CPUs the
  projections store their weights transposed as well. A model in that form is
  left as it is.

  Args:
    model: with stacked layers, or in this form already.
    platform: "cpu", "gpu" or "tpu".
  """
  if platform == "tpu":
    return model
  model = single_layers(model)
  return transposed_projections(model) if platform == "cpu" else model


def is_for_decoding(model: nnx.Module) -> bool:
  """Returns whether a model is in a form that only decoding uses."""
  return any(
    isinstance(module, Layers)
    and module.is_single
    or isinstance(module, Linear)
    and module.kernel is None
    for _, module in nnx.iter_modules(model)
  )


def single_layers(model: weights.Model) -> weights.Model:
  """Returns a copy of `model` whose layers have arrays of their own.

  Then no step slices the weights and the cache of a layer out of stacked ones.
  The stacked weights stay in memory as long as `model` does.
  """
  model = nnx.merge(*nnx.split(model))
  for _, module in list(nnx.iter_modules(model)):
    if isinstance(module, Layers):
      module.stacked = nnx.List(module.each())
  return model


def transposed_projections(model: weights.Model) -> weights.Model:
  """Returns a copy of `model` with the weights of projections transposed.

  They are in the compute dtype, too; otherwise every step would convert them.
  """
  model = nnx.merge(*nnx.split(model))
  for _, module in list(nnx.iter_modules(model)):
    if isinstance(module, Linear) and module.kernel is not None:
      module.transpose()
  return model


# --- the pre-norm block of the LLaMA family --------------------------------


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """Sizes and rates of one `Block`; widths in features, rates in [0, 1)."""

  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  norm_eps: float = 1e-5
  residual_dropout: float = 0.0
  mlp_dropout: float = 0.0
  dtype: str = "float32"


class Linear(nnx.Linear):
  """A projection that flattens leading axes, which trains faster on a CPU."""

  def transpose(self) -> None:
    """Stores the weights as [out, in] from now on, in the compute dtype.

    With few rows a CPU multiplies 1.3 to 2 times as fast if the weights are on
    the left and both operands are contracted on their last axis.
    """
    kernel = self.weight.astype(self.dtype or self.param_dtype)
    # Else XLA would take the transposition into the product, and back.
    self.transposed = nnx.Param(jax.lax.optimization_barrier(kernel.T))
    self.kernel = None

  @property
  def weight(self) -> Float[Array, "D E"]:
    """The weights as [in, out], transposed or not."""
    if self.kernel is None:
      return self.transposed[...].T
    return self.kernel[...]

  def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n E"]:
    rows = x.reshape(-1, x.shape[-1])
    y = self._product(rows) if self.kernel is None else super().__call__(rows)
    return y.reshape(*x.shape[:-1], y.shape[-1])

  def _product(self, rows):
    weight = self.transposed[...]
    y = jax.lax.dot_general(
      weight,
      rows.astype(weight.dtype),
      dimension_numbers=(((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    y = jax.lax.optimization_barrier(y)  # or XLA swaps the operands
    y = y.T.astype(weight.dtype)
    return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def linear(
  width_in: int, width_out: int, rngs: nnx.Rngs, dtype=None, kernel_init=None
) -> Linear:
  """Makes a bias-free projection, by default with normal(0, 0.02) weights."""
  return Linear(
    width_in,
    width_out,
    use_bias=False,
    kernel_init=kernel_init or normal_init,
    dtype=dtype,
    rngs=rngs,
  )


class SelfAttention(nnx.Module):
  """Causal attention; one fused projection [q | k | v], heads contiguous."""

  def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
    self.config = config
    c = config
    self.make_inputs(rngs)
    self.out = linear(c.num_heads * c.head_dim, c.width, rngs, c.dtype)

  def make_inputs(self, rngs: nnx.Rngs) -> None:
    c = self.config
    fused = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    self.qkv = linear(c.width, fused, rngs, c.dtype)

  def inputs(self, x: Float[Array, "B M D"]) -> list[Array]:
    """Projects rows to queries [B, N, M, H], keys and values [B, G, M, H]."""
    c = self.config
    qkv = self.heads(self.qkv(x))
    return jnp.split(qkv, [c.num_heads, c.num_heads + c.num_kv_heads], axis=1)

  def heads(self, x: Float[Array, "B M _"]) -> Float[Array, "B _ M H"]:
    """Splits projected rows into heads."""
    x = x.reshape(*x.shape[:2], -1, self.config.head_dim)
    return x.transpose(0, 2, 1, 3)

  def __call__(self, x, rotate, mask, cache=None):
    q, k, v = self.inputs(x)
    q, k = rotate(q), rotate(k)
    if cache is not None:
      cache, k, v = cache.append(k, v)
    mixed = attention(q, k, v, mask).transpose(0, 2, 1, 3)
    return self.out(mixed.reshape(*x.shape[:2], -1)), cache


class GatedMLP(nnx.Module):
  """down(activation(gate(x)) * up(x)), bias-free."""

  def __init__(
    self,
    width: int,
    hidden: int,
    *,
    rngs: nnx.Rngs,
    dtype=None,
    activation: Callable = jax.nn.silu,
  ):
    self.activation = activation
    self.gate = linear(width, hidden, rngs, dtype)
    self.up = linear(width, hidden, rngs, dtype)
    self.down = linear(hidden, width, rngs, dtype)

  def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """x + attn(norm(x)), then x + mlp(norm(x)), with dropout and drop path."""

  attention_type = SelfAttention

  def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
    self.config = config
    c = config
    self.attention_norm = RMSNorm(c.width, c.norm_eps)
    self.attention = self.attention_type(c, rngs=rngs)
    self.mlp_norm = RMSNorm(c.width, c.norm_eps)
    self.mlp = GatedMLP(c.width, c.mlp_width, rngs=rngs, dtype=c.dtype)

  def __call__(self, x, rotate, mask, *, cache=None, rng=None, path_rate=0.0):
    """x [B, M, D] -> (x, cache). `rng` switches the dropouts on."""
    rngs = [None] * 4 if rng is None else list(jax.random.split(rng, 4))
    y, cache = self.attention(self.attention_norm(x), rotate, mask, cache)
    y = dropout(y, self.config.residual_dropout, rngs[0])
    x = x + drop_path(y, path_rate, rngs[1])
    y = dropout(self.mlp(self.mlp_norm(x)), self.config.mlp_dropout, rngs[2])
    return x + drop_path(y, path_rate, rngs[3]), cache
