"""Labels -> images, any number, in batches of one compiled shape.

The devices of a mesh share every batch; each process has batches of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, UInt8

from tensorar_jax.generation.resize import resize_bicubic
from tensorar_jax.interfaces import Conditioning, Tokenizer
from tensorar_jax.method import sampling, windows
from tensorar_jax.method.marginals import Marginals
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.nn import checks
from tensorar_jax.nn.image_bytes import normalise, to_uint8
from tensorar_jax.parallel import sharding

STRIPS = 6  # images in a refinement strip
DECODED = 8  # images that a device decodes at once: activations are large
REFILL = 1 / 8  # share of finished images at which places are filled again


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
  is kept only in the form of `sampling.prepare`. `marginals` are for a parallel
  decoder that guesses by them.
  """

  model: TensorAR
  conditioning: Conditioning
  config: sampling.SamplingConfig
  seed: int
  mesh: Mesh = dataclasses.field(default_factory=sharding.local_mesh)
  marginals: Marginals | None = None

  def __post_init__(self):
    checks.seed(self.seed)
    prepared = sampling.prepare(self.model, self.mesh)
    object.__setattr__(self, "model", prepared)
    if self.marginals is not None:  # once, and not at every call
      everywhere = NamedSharding(self.mesh, PartitionSpec())
      placed = jax.device_put(self.marginals, everywhere)
      object.__setattr__(self, "marginals", placed)

  def batches(
    self, labels: Int[np.ndarray, "n"], batch_size: int, first: int = 0
  ) -> Iterator[tuple[sampling.Samples, int]]:
    """Yields (samples, how many of them count) for images first, first + 1, ...

    Samples may still be being computed. A short batch is filled up, so there is
    one compiled shape: batch_size, or the next one that the mesh splits evenly.
    The parallel decoder begins an image of a later batch in the place of one
    that is finished, where there are several batches.
    """
    parts = sharding.row_parts(self.mesh)
    batch_size = math.ceil(batch_size / parts) * parts
    refills = len(labels) > batch_size and not self.config.return_logits
    if self.config.decoder == "parallel" and refills:
      yield from self._refilled(labels, batch_size, first)
      return
    for start in range(0, len(labels), batch_size):
      count = min(batch_size, len(labels) - start)
      index = start + np.arange(batch_size)
      yield sampling.generate(**self._call(labels, index, first)), count

  def _call(self, labels, index, first) -> dict[str, Any]:
    """What the sampler is called with for the labels of these indices."""
    cond = self.conditioning.encode(labels[np.minimum(index, len(labels) - 1)])
    null = self.conditioning.null(cond)
    cond, null, image_index = jax.device_put(
      (cond, null, first + index), sharding.rows(self.mesh)
    )
    return dict(
      model=self.model,
      cond=cond,
      null=null,
      rng=jax.random.key(self.seed),
      config=self.config,
      image_index=image_index,
      marginals=self.marginals,
    )

  def _refilled(
    self, labels, batch_size: int, first: int
  ) -> Iterator[tuple[sampling.Samples, int]]:
    """`batches` in which a finished image makes room for the next one."""
    rows = sharding.rows(self.mesh)
    index, is_new = np.arange(batch_size), np.ones(batch_size, bool)
    following, state = batch_size, None
    finished: dict[int, list[np.ndarray]] = {}  # by index, arrays of one image
    start = 0  # the first index that was not yielded yet
    is_done = np.zeros(batch_size, bool)
    while start < len(labels):
      waits = following < len(labels)
      enough = math.ceil(REFILL * batch_size) if waits else batch_size
      state, out = sampling.advance(
        **self._call(labels, index, first),
        state=state,
        is_new=jax.device_put(is_new, rows),
        enough=enough,
      )
      arrays, structure = jax.tree.flatten(out)
      arrays = list(map(np.asarray, arrays))
      now_done = np.asarray(state.count) == self.model.num_tokens
      index, is_new = index.copy(), np.zeros(batch_size, bool)
      for place in np.flatnonzero(now_done):
        if not is_done[place]:  # else there was nothing left to begin there
          finished[int(index[place])] = [a[place] for a in arrays]
        if following < len(labels):
          index[place], is_new[place] = following, True
          following += 1
      is_done = now_done & ~is_new
      while start < len(labels):
        count = min(batch_size, len(labels) - start)
        batch = range(start, start + count)
        if not all(i in finished for i in batch):
          break
        images = [finished.pop(i) for i in batch]
        images += [images[-1]] * (batch_size - count)
        stacked = [np.stack(a) for a in zip(*images, strict=True)]
        start += count
        yield structure.unflatten(jax.device_put(stacked, rows)), count

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
  marginals: Marginals | None = None,
) -> Iterator[sampling.Samples]:
  """Yields samples for the labels, by batch, the last one cut to size.

  Image i of the run is the same for every batch size.
  """
  sampler = Sampler(
    model, conditioning, config, seed, sharding.local_mesh(), marginals
  )
  for out, count in sampler.batches(labels, min(batch_size, len(labels))):
    yield _cut(out, count)
