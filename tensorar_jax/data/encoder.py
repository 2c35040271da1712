"""Images of a source -> tokens, and captions -> features, side by side.

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

from tensorar_jax.conditioning import conditions
from tensorar_jax.data import codes, images, shards, sources
from tensorar_jax.interfaces import TextEncoder, Tokenizer

Crops = UInt8[np.ndarray, "n A s s C"]
# What is on its way to the tokens, and to the text features, of a batch.
Started = tuple[Int[Array, "B T F"], Any]
# What one image is of, and its codes.
Example = tuple[shards.Subject, Int[np.ndarray, "A T F"]]


@functools.partial(jax.jit, static_argnums=0)
def _encode(
  graphdef, state, crops: UInt8[Array, "B h w C"]
) -> Int[Array, "B T F"]:
  return nnx.merge(graphdef, state).encode(images.normalise(crops))


class Encoder:
  """A tokenizer, compiled for batches of about `batch_size` crops.

  All variants of an image are in one batch. `channels` are the images'. `text`
  encodes the captions of images that have them.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    recipe: images.Recipe,
    channels: int,
    batch_size: int,
    text: TextEncoder | None = None,
  ):
    devices = np.array(jax.local_devices())
    self.recipe, self.text = recipe, text
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

  def start(self, about: list[int] | list[str], crops: Crops) -> Started:
    """What becomes of labels or captions and crops, still on its way."""
    batch = np.zeros(self.batch_shape, np.uint8)
    crops = crops.reshape(-1, *self.batch_shape[1:])
    batch[: len(crops)] = crops
    batch = jax.device_put(batch, self._batch)
    tokens = _encode(self._graphdef, self._state, batch)
    if not self.text:
      return tokens, about
    # Filled up as well: the last caption again.
    spare = self.num_images - len(about)
    features, mask = self.text(about + about[-1:] * spare)
    return tokens, (features[: len(about)], mask[: len(about)])

  def finish(self, started: Started) -> Iterator[Example]:
    """The examples of a batch, once they are there."""
    tokens, about = started
    subjects = about
    if self.text:
      features, mask = about
      dtype = text_dtype(self.text)
      subjects = conditions.real_rows(features.astype(dtype), mask)
    variants = self.recipe.num_variants
    found = np.asarray(tokens)[: len(subjects) * variants]
    codes.check_codes("the tokenizer", found, self.vocab_sizes)
    found = found.reshape(len(subjects), variants, *found.shape[1:])
    return zip(subjects, found)


def identity(model: nnx.Module) -> dict[str, Any]:
  """What its results depend on, for JSON: class, config, digest of weights."""
  digest = hashlib.sha256()
  state = nnx.to_flat_state(nnx.state(model))
  for path, value in sorted(("/".join(map(str, p)), v) for p, v in state):
    array = np.asarray(value[...])
    digest.update(f"{path} {array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())
  config = getattr(model, "config", None)
  is_fields = dataclasses.is_dataclass(config)
  return {
    "class": f"{type(model).__module__}.{type(model).__qualname__}",
    "config": dataclasses.asdict(config) if is_fields else None,
    "sha256": digest.hexdigest(),
  }


def text_dtype(text: TextEncoder) -> str:
  """The type in which its features are stored, which is their own."""
  return getattr(text, "dtype", "float32")


def text_identity(text: TextEncoder) -> dict[str, Any]:
  """What its features depend on, for JSON."""
  model = getattr(text, "model", None)
  return {
    "class": f"{type(text).__module__}.{type(text).__qualname__}",
    **{"width": text.width, "length": text.length},
    "weights": identity(model) if model is not None else None,
    "tokenizer": getattr(getattr(text, "tokenizer", text), "sha256", None),
  }


def encoded(
  encoder: Encoder,
  source: sources.Source,
  positions: range,
  on_broken: Callable[[int, images.BrokenSampleError], None],
) -> Iterator[Example]:
  """Subject and codes of every image that can be decoded, in order.

  `on_broken(position, error)` hears of the others.
  """
  batches = _batches(encoder, source, positions, on_broken)
  waiting = collections.deque()
  # The None at the end takes the last batch out.
  for batch in itertools.chain(batches, [None]):
    if batch:
      waiting.append(encoder.start(*batch))
    if waiting and (len(waiting) > 1 or not batch):
      yield from encoder.finish(waiting.popleft())


def _batches(
  encoder, source, positions, on_broken
) -> Iterator[tuple[list[int] | list[str], Crops]]:
  """Labels or captions, and crops, in whole batches except for the last."""
  threads = min(64, os.cpu_count() or 1)
  read = functools.partial(_read, source, encoder.recipe)
  places = grain.MapDataset.range(positions.start, positions.stop)
  examples = places.map(read).to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  )
  about, batch = [], []
  for position, subject, crops in examples:
    if isinstance(crops, images.BrokenSampleError):
      on_broken(position, crops)
      continue
    about.append(subject)
    batch.append(crops)
    if len(batch) == encoder.num_images:
      yield about, np.stack(batch)
      about, batch = [], []
  if batch:
    yield about, np.stack(batch)


def _read(source, recipe, position: int):
  """(position, label or caption, crops); of a broken sample, crops is why."""
  try:
    example = source[position]
  except images.BrokenSampleError as error:
    return position, None, error
  label = example.get("label")
  subject = example["caption"] if label is None else int(label)
  return position, subject, recipe(example["image"])
