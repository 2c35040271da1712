"""Labels -> images, any number, in batches of one compiled shape."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from tensorar_jax import sampling
from tensorar_jax.evaluation.resize import resize_bicubic
from tensorar_jax.interfaces import Conditioning, Tokenizer
from tensorar_jax.tensorar import TensorAR


def to_uint8(
  images: Float[Array, "B h w C"], offset: float
) -> UInt8[Array, "B h w C"]:
  """[-1, 1] -> bytes: 127.5 x + offset, clipped, truncated.

  128 rounds, 127.5 does not; the published codes differ, and so do `Tokenizer`s
  in their `uint8_offset`.
  """
  return jnp.clip(127.5 * images + offset, 0, 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=("graphdef", "size"))
def _decode(graphdef, state, tokens, size):
  tokenizer = nnx.merge(graphdef, state)
  images = tokenizer.decode(tokens)
  images = resize_bicubic(images, size) if size else images
  return to_uint8(images, tokenizer.uint8_offset)


def decode(
  tokenizer: Tokenizer,
  tokens: Int[Array | np.ndarray, "B T F"],
  size: tuple[int, int] | None = None,
) -> UInt8[np.ndarray, "B h w C"]:
  """The images of tokens, on the host; bicubic to `size` if it is given."""
  return np.asarray(_decode(*nnx.split(tokenizer), jnp.asarray(tokens), size))


def generate(
  model: TensorAR,
  conditioning: Conditioning,
  labels: Int[np.ndarray, "n"],
  seed: int,
  config: sampling.SamplingConfig,
  batch_size: int,
) -> Iterator[sampling.Samples]:
  """Samples for each label, a batch at a time, the last one cut to size.

  Image i of the run is the same for every batch size.
  """
  rng = jax.random.key(seed)
  batch_size = min(batch_size, len(labels))
  for start in range(0, len(labels), batch_size):
    index = np.arange(start, start + batch_size)
    rows = np.minimum(index, len(labels) - 1)  # pads the last batch
    cond = conditioning.encode(labels[rows])
    out = sampling.generate(
      model, cond, conditioning.null(cond), rng, config, index
    )
    count = min(batch_size, len(labels) - start)
    yield jax.tree.map(lambda a, count=count: a[:count], out)
