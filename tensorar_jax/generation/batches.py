"""Labels -> images, any number, in batches of one compiled shape.

The devices of a mesh share every batch; each process has batches of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int, UInt8

from tensorar_jax.generation.resize import resize_bicubic
from tensorar_jax.interfaces import Conditioning, Tokenizer
from tensorar_jax.method import sampling, windows
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.nn import checks
from tensorar_jax.nn.image_bytes import normalise, to_uint8
from tensorar_jax.parallel import sharding

STRIPS = 6  # images in a refinement strip
DECODED = 8  # images that a device decodes at once: activations are large


@functools.partial(jax.jit, static_argnames=("graphdef", "size", "mesh"))
def _decode(graphdef, state, tokens, size, mesh=None):
  def decode_all(state, tokens):
    tokenizer = nnx.merge(graphdef, state)
    images = tokenizer.decode(tokens)
    images = resize_bicubic(images, size) if size else images
    return to_uint8(images, tokenizer.uint8_offset)

  def of_device(state, tokens):
    if len(tokens) <= DECODED:
      return decode_all(state, tokens)
    decode_one = lambda row: decode_all(state, row[None])[0]
    return jax.lax.map(decode_one, tokens, batch_size=DECODED)

  if mesh is None:
    return of_device(state, tokens)
  whole, rows = PartitionSpec(), PartitionSpec(sharding.ROWS)
  decode_rows = jax.shard_map(
    of_device, mesh=mesh, in_specs=(whole, rows), out_specs=rows
  )
  return decode_rows(state, tokens)


def decode(
  tokenizer: Tokenizer,
  tokens: Int[Array | np.ndarray, "B T F"],
  size: tuple[int, int] | None = None,
) -> UInt8[np.ndarray, "B h w C"]:
  """The images of tokens, on the host; resized (bicubic) to `size` if given."""
  return np.asarray(_decode(*nnx.split(tokenizer), jnp.asarray(tokens), size))


def encode(
  tokenizer: Tokenizer, images: UInt8[np.ndarray, "n h w C"]
) -> Int[np.ndarray, "n T F"]:
  """The tokens of images, on the host."""
  graphdef, state = nnx.split(tokenizer)
  parts = [
    np.asarray(_encode(graphdef, state, images[start : start + 256]))
    for start in range(0, len(images), 256)
  ]
  return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef, state, images):
  return nnx.merge(graphdef, state).encode(normalise(images))


def refinement(
  tokenizer: Tokenizer, drafts: Int[np.ndarray, "n T k F"]
) -> tuple[UInt8[np.ndarray, "n k h w C"], Bool[np.ndarray, "n k r c"]]:
  """The pictures after each look, and the cells that each look changed."""
  window = drafts.shape[2]
  looks = [
    np.asarray(windows.after_looks(jnp.asarray(drafts), n))
    for n in range(1, window + 1)
  ]
  images = np.stack([decode(tokenizer, t) for t in looks], axis=1)
  tokens = np.stack(looks, axis=1)  # [n, k, T, F]
  changed = np.zeros(tokens.shape[:3], bool)
  changed[:, 1:] = (tokens[:, 1:] != tokens[:, :-1]).any(axis=-1)
  return images, changed.reshape(*changed.shape[:2], *tokenizer.grid)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Draws the labelled images of a run with one model, any number at a time.

  `mesh` is of this process's devices; by default they split the rows. The model
  is kept only in the form of `sampling.prepare`.
  """

  model: TensorAR
  conditioning: Conditioning
  config: sampling.SamplingConfig
  seed: int
  mesh: Mesh = dataclasses.field(default_factory=sharding.local_mesh)

  def __post_init__(self):
    checks.seed(self.seed)
    prepared = sampling.prepare(self.model, self.mesh)
    object.__setattr__(self, "model", prepared)

  def batches(
    self, labels: Int[np.ndarray, "n"], batch_size: int, first: int = 0
  ) -> Iterator[tuple[sampling.Samples, int]]:
    """Yields (samples, how many of them count) for images first, first + 1, ...

    Samples may still be being computed. A short batch is filled up, so there is
    one compiled shape: batch_size, or the next one that the mesh splits evenly.
    """
    rng, parts = jax.random.key(self.seed), sharding.row_parts(self.mesh)
    batch_size = math.ceil(batch_size / parts) * parts
    for start in range(0, len(labels), batch_size):
      count = min(batch_size, len(labels) - start)
      index = start + np.arange(batch_size)
      rows = np.minimum(index, len(labels) - 1)
      cond = self.conditioning.encode(labels[rows])
      null = self.conditioning.null(cond)
      cond, null, index = jax.device_put(
        (cond, null, first + index), sharding.rows(self.mesh)
      )
      yield (
        sampling.generate(self.model, cond, null, rng, self.config, index),
        count,
      )

  def images(
    self,
    tokenizer: Tokenizer,
    labels: Int[np.ndarray, "n"],
    batch_size: int,
    first: int = 0,
    size: tuple[int, int] | None = None,
  ) -> Iterator[tuple[UInt8[np.ndarray, "b h w C"], sampling.Samples]]:
    """Yields (images, samples) by batch; the next one is already started."""
    graphdef, state = nnx.split(sharding.replicate(tokenizer, self.mesh))
    started = (
      (_decode(graphdef, state, out.tokens, size, self.mesh), out, count)
      for out, count in self.batches(labels, batch_size, first)
    )
    # A pair's second batch is started before its first is read; the None at the
    # end is the partner of the last batch.
    pairs = itertools.pairwise(itertools.chain(started, [None]))
    for batch, _ in pairs:
      if batch is not None:
        images, out, count = batch
        yield np.asarray(images)[:count], _cut(out, count)


def _cut(out: sampling.Samples, count: int) -> sampling.Samples:
  if count == len(out.tokens):
    return out
  return jax.tree.map(lambda a: a[:count], out)


def generate(
  model: TensorAR,
  conditioning: Conditioning,
  labels: Int[np.ndarray, "n"],
  seed: int,
  config: sampling.SamplingConfig,
  batch_size: int,
) -> Iterator[sampling.Samples]:
  """Yields samples for the labels, by batch, the last one cut to size.

  Image i of the run is the same for every batch size.
  """
  sampler = Sampler(model, conditioning, config, seed)
  for out, count in sampler.batches(labels, min(batch_size, len(labels))):
    yield _cut(out, count)
