"""Images of a source -> tokens: read, crop and encode side by side.

Threads decode and crop, the devices of this process share every batch, and one
batch is always under way while another is taken off.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt8

from tensorar_jax.data import codes, images, sources
from tensorar_jax.interfaces import Tokenizer

Crops = UInt8[np.ndarray, "n A s s C"]
# Label and codes of one image.
Example = tuple[int, Int[np.ndarray, "A T F"]]


@functools.partial(jax.jit, static_argnums=0)
def _encode(
  graphdef, state, crops: UInt8[Array, "B h w C"]
) -> Int[Array, "B T F"]:
  return nnx.merge(graphdef, state).encode(images.normalise(crops))


class Encoder:
  """A tokenizer, compiled for batches of about `batch_size` crops.

  All variants of an image are in one batch. `channels` are the images'.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    recipe: images.Recipe,
    channels: int,
    batch_size: int,
  ):
    devices = np.array(jax.local_devices())
    self.recipe = recipe
    self.num_images = max(1, batch_size // recipe.num_variants)
    rows = self.num_images * recipe.num_variants
    size = recipe.image_size
    # A short batch is filled up: there is one compiled shape.
    self.batch_shape = (-(-rows // len(devices)) * len(devices), size, size)
    self.batch_shape += (channels,)
    self.vocab_sizes = tuple(tokenizer.vocab_sizes)
    rows, cols = tokenizer.grid
    self._graphdef, self._state = nnx.split(tokenizer)
    made = jax.eval_shape(
      functools.partial(_encode, self._graphdef),
      self._state,
      jax.ShapeDtypeStruct(self.batch_shape, np.uint8),
    )
    expected = (rows * cols, len(self.vocab_sizes))
    if made.shape[1:] != expected:
      raise ValueError(
        f"images of {size}x{size} give {made.shape[1]} tokens of "
        f"{made.shape[2]} sub-tokens; expected {expected} as of the "
        f"tokenizer's grid {(rows, cols)}: change image_size, or the "
        "tokenizer's"
      )
    mesh = Mesh(devices, ("batch",))
    self._batch = NamedSharding(mesh, PartitionSpec("batch"))
    self._state = jax.device_put(
      self._state, NamedSharding(mesh, PartitionSpec())
    )

  def start(self, crops: Crops) -> Int[Array, "B T F"]:
    """The tokens of a batch, still on their way."""
    batch = np.zeros(self.batch_shape, np.uint8)
    crops = crops.reshape(-1, *self.batch_shape[1:])
    batch[: len(crops)] = crops
    batch = jax.device_put(batch, self._batch)
    return _encode(self._graphdef, self._state, batch)

  def finish(
    self, tokens: Int[Array, "B T F"], num_images: int
  ) -> Int[np.ndarray, "n A T F"]:
    """The codes of the images of a batch, once they are there."""
    variants = self.recipe.num_variants
    found = np.asarray(tokens)[: num_images * variants]
    codes.check_codes("the tokenizer", found, self.vocab_sizes)
    return found.reshape(num_images, variants, *found.shape[1:])


def identity(tokenizer: Tokenizer) -> dict[str, Any]:
  """What its tokens depend on, for JSON: class, config, digest of weights."""
  digest = hashlib.sha256()
  state = nnx.to_flat_state(nnx.state(tokenizer))
  for path, value in sorted(("/".join(map(str, p)), v) for p, v in state):
    array = np.asarray(value[...])
    digest.update(f"{path} {array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())
  config = getattr(tokenizer, "config", None)
  is_fields = dataclasses.is_dataclass(config)
  return {
    "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
    "config": dataclasses.asdict(config) if is_fields else None,
    "sha256": digest.hexdigest(),
  }


def encoded(
  encoder: Encoder,
  source: sources.Source,
  positions: range,
  on_broken: Callable[[int, images.BrokenImageError], None],
) -> Iterator[Example]:
  """Label and codes of every image that can be decoded, in order.

  `on_broken(position, error)` hears of the others.
  """
  batches = _batches(encoder, source, positions, on_broken)
  waiting = collections.deque()
  # The None at the end takes the last batch out.
  for batch in itertools.chain(batches, [None]):
    if batch:
      labels, crops = batch
      waiting.append((labels, encoder.start(crops)))
    if waiting and (len(waiting) > 1 or not batch):
      labels, tokens = waiting.popleft()
      yield from zip(labels, encoder.finish(tokens, len(labels)))


def _batches(
  encoder, source, positions, on_broken
) -> Iterator[tuple[list[int], Crops]]:
  """Labels and crops, whole batches of them except for the last."""
  threads = min(64, os.cpu_count() or 1)
  read = functools.partial(_read, source, encoder.recipe)
  places = grain.MapDataset.range(positions.start, positions.stop)
  examples = places.map(read).to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  )
  labels, batch = [], []
  for position, label, crops in examples:
    if isinstance(crops, images.BrokenImageError):
      on_broken(position, crops)
      continue
    labels.append(label)
    batch.append(crops)
    if len(batch) == encoder.num_images:
      yield labels, np.stack(batch)
      labels, batch = [], []
  if batch:
    yield labels, np.stack(batch)


def _read(source, recipe, position: int):
  """(position, label, crops); a broken image gives its error for crops."""
  try:
    example = source[position]
  except images.BrokenImageError as error:
    return position, None, error
  return position, int(example["label"]), recipe(example["image"])
