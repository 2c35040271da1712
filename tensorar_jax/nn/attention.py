"""Attention: one function, which calls a fast kernel where one applies.

| where            | what computes it                                        |
| ---------------- | ------------------------------------------------------- |
| GPU              | `jax.nn.dot_product_attention`, cuDNN's flash attention |
| TPU              | the flash attention of `jax.experimental.pallas`        |
| everywhere else  | two matrix products and a float32 softmax               |

The kernels never write a head's [M, S] scores to memory. They serve whole
sequences in bfloat16 or float16 without attention dropout, as in training;
float32 takes the plain path, and so does decoding, a few rows at a time. On
GPUs and TPUs --precision says how its products are computed; see
`parallel.chips`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from tensorar_jax.interfaces import Key
from tensorar_jax.parallel import sharding

LANES = 128  # the TPU kernel works on blocks of a multiple of this
MAX_BLOCK = 640  # rows; its tile of scores, 1.6 MB, fits a TPU's fast memory


@struct.dataclass
class Mask:
  """Which keys each row may see.

  Attributes:
    visible: broadcasts to [B, M, S]; row m may see what is true.
    is_padding: rows of the prefix that no other row sees, or None.
    is_whole: whether the rows are 0 .. S-1, all of the sequence in order.
  """

  visible: Bool[Array, "*B M S"]
  is_padding: Bool[Array | np.ndarray, "B P"] | None = None
  is_whole: bool = struct.field(pytree_node=False, default=False)


def causal_mask(
  rows: Int[Array, "*#B M"],
  length: int,
  is_padding: Bool[Array | np.ndarray, "B P"] | None,
) -> Mask:
  """Lets row `rows[b, m]` of a sequence see keys 0 .. rows[b, m], but padding.

  The rows of an image are consecutive; `length` of them are all of it.
  """
  keys = jnp.arange(length)
  visible = keys <= rows[..., None]
  if is_padding is not None:
    prefix = is_padding.shape[1]
    hidden = jnp.pad(is_padding, ((0, 0), (0, length - prefix)))
    # Padding sees itself, as nothing to see would mean everything.
    visible = visible & ~hidden[:, None] | (keys == rows[..., None])
  return Mask(visible, is_padding, is_whole=rows.shape[-1] == length)


def dropout(x: Array, rate: float | Array, rng: Key | None) -> Array:
  """Zeroes entries of x at `rate` and rescales the rest; rng=None: x."""
  if rng is None or (isinstance(rate, float) and rate == 0.0):
    return x
  keep = jax.random.bernoulli(rng, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def attention(
  q: Float[Array, "B N M H"],
  k: Float[Array, "B G S H"],
  v: Float[Array, "B G S H"],
  mask: Mask,
  rate: float = 0.0,
  rng: Key | None = None,
) -> Float[Array, "B N M H"]:
  """Computes softmax(q k^T / sqrt(H)) v; query heads share G key heads.

  `rate` is the dropout of the weights, on with `rng`. The results of padding
  rows mean nothing and depend on the kernel.
  """
  q, k, v = (sharding.constrain(a, *sharding.HEADS) for a in (q, k, v))
  kernel = _kernel(q.shape[-1])
  drops = rng is not None and rate > 0
  if kernel and mask.is_whole and q.dtype.itemsize == 2 and not drops:
    return kernel(q, k, v, mask)
  one_row = q.shape[2] == 1 and sharding.platform() == "cpu"
  if one_row and q.dtype.itemsize == 2 and not drops:
    # A CPU multiplies two rows of bfloat16 4 to 8 times as fast as one.
    return plain(jnp.repeat(q, 2, axis=2), k, v, mask)[:, :, :1]
  return plain(q, k, v, mask, rate, rng)


def _kernel(head_dim: int) -> Callable | None:
  """Returns the platform's kernel for heads of this width, or None."""
  platform = sharding.platform()
  if platform == "tpu":
    return flash
  # cuDNN is asked while a program is traced, so a compile for GPUs that are not
  # here cannot use it.
  gpu_is_here = platform == "gpu" and jax.default_backend() == "gpu"
  if gpu_is_here and head_dim % 8 == 0 and head_dim <= 128:
    return cudnn
  return None


def plain(q, k, v, mask: Mask, rate: float = 0.0, rng: Key | None = None):
  """Attention in plain operations; a row that sees nothing sees everything."""
  b, n, m, h = q.shape
  groups = k.shape[1]
  q = q.reshape(b, groups, n // groups, m, h)
  scores = jnp.einsum(
    "bgrmh,bgsh->bgrms", q, k, preferred_element_type=jnp.float32
  )
  scores *= h**-0.5
  visible = jnp.broadcast_to(mask.visible, (b, m, k.shape[2]))[:, None, None]
  scores = jnp.where(visible, scores, jnp.finfo("float32").min)
  weights = jax.nn.softmax(scores, axis=-1)
  weights = dropout(weights, rate, rng).astype(v.dtype)
  # Whole sequences are trained on, and wide sums would make the gradients'
  # products float32.
  wide = None if mask.is_whole else jnp.float32
  out = jnp.einsum("bgrms,bgsh->bgrmh", weights, v, preferred_element_type=wide)
  return out.astype(q.dtype).reshape(b, n, m, h)


def cudnn(
  q, k, v, mask: Mask, implementation: Literal["cudnn", "xla"] = "cudnn"
):
  """Attention of whole sequences by `jax.nn`; "xla" runs on any device."""
  # JAX trains by cuDNN on even lengths alone. No row sees the added one, and
  # what that gets is cut off again.
  length, visible = q.shape[2], None
  extra = length % 2
  q, k, v = (
    jnp.pad(a, ((0, 0), (0, 0), (0, extra), (0, 0))) for a in (q, k, v)
  )
  if mask.is_padding is not None:
    visible = mask.visible[:, None]
    visible = jnp.pad(visible, ((0, 0), (0, 0), (0, extra), (0, extra)))
  q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
  out = jax.nn.dot_product_attention(
    query=q,
    key=k,
    value=v,
    mask=visible,
    is_causal=visible is None,
    implementation=implementation,
  )
  return out.swapaxes(1, 2)[:, :, :length]


def flash(q, k, v, mask: Mask):
  """Attention of whole sequences by the Pallas kernel for TPUs."""
  length = q.shape[2]
  repeats = q.shape[1] // k.shape[1]
  k, v = (jnp.repeat(a, repeats, axis=1) for a in (k, v))
  # Fill up with rows that no earlier row sees; they are cut off at the end.
  extra = -length % LANES
  q, k, v = (
    jnp.pad(a, ((0, 0), (0, 0), (0, extra), (0, 0))) for a in (q, k, v)
  )
  segments = jnp.zeros((q.shape[0], length + extra), jnp.int32)
  if mask.is_padding is not None:  # padding is a segment of its own
    prefix = mask.is_padding.shape[1]
    segments = segments.at[:, :prefix].set(mask.is_padding)
  run = functools.partial(_flash_rows, block=_block(length + extra))
  heads = sharding.spec_of(q, *sharding.HEADS)
  rows = PartitionSpec(*heads[:1])
  if any(heads):  # the compiler cannot split a kernel by itself
    run = jax.shard_map(
      run, in_specs=(heads,) * 3 + (rows,), out_specs=heads, check_vma=False
    )
  return run(q, k, v, segments)[:, :, :length]


def _block(length: int) -> int:
  """The largest block of a multiple of LANES rows that divides the length."""
  sizes = range(LANES, min(length, MAX_BLOCK) + 1, LANES)
  return max(size for size in sizes if length % size == 0)


def _flash_rows(q, k, v, segments, block):
  from jax.experimental.pallas.ops.tpu import flash_attention

  names = (
    "q",
    "k_major",
    "k",
    "q_major_dkv",
    "k_major_dkv",
    "k_dkv",
    "q_dkv",
    "k_major_dq",
    "k_dq",
    "q_dq",
  )
  return flash_attention.flash_attention(
    q,
    k,
    v,
    segment_ids=flash_attention.SegmentIds(segments, segments),
    causal=True,
    sm_scale=q.shape[-1] ** -0.5,
    block_sizes=flash_attention.BlockSizes(
      block_b=1, **{f"block_{name}": block for name in names}
    ),
  )
