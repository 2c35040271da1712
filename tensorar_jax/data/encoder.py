"""Encodes the images of a source to tokens, and captions to features.

Threads decode and crop, the devices of this process share every batch, and the
next batch is computed while the one before is read back.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import grain
import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt8

from tensorar_jax.conditioning import conditions
from tensorar_jax.data import codes, images, shards, sources
from tensorar_jax.interfaces import ChecksCaptions, TextEncoder, Tokenizer
from tensorar_jax.nn import image_bytes

Crops = UInt8[np.ndarray, "n A s s C"]
# Tokens of a batch, and its labels or text features; perhaps not computed yet.
Started = tuple[Int[Array, "B T F"], Any]
# The subject of one image, and its codes.
Example = tuple[shards.Subject, Int[np.ndarray, "A T F"]]


@functools.partial(jax.jit, static_argnums=0)
def _encode(
  graphdef, state, crops: UInt8[Array, "B h w C"]
) -> Int[Array, "B T F"]:
  return nnx.merge(graphdef, state).encode(image_bytes.normalise(crops))


class Encoder:
  """A tokenizer, compiled for batches of about `batch_size` crops.

  All variants of an image are in one batch. `channels` is the
  number of the images'. `text` encodes captions where images have them.
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
    rows = -(-rows // len(devices)) * len(devices)
    self.batch_shape = (rows, size, size, channels)
    self.vocab_sizes = tuple(tokenizer.vocab_sizes)
    grid = tuple(tokenizer.grid)
    self._graphdef, self._state = nnx.split(tokenizer)
    tokens = jax.eval_shape(
      functools.partial(_encode, self._graphdef),
      self._state,
      jax.ShapeDtypeStruct(self.batch_shape, np.uint8),
    )
    expected = (math.prod(grid), len(self.vocab_sizes))
    if tokens.shape[1:] != expected:
      raise ValueError(
        f"images of {size}x{size} give {tokens.shape[1]} tokens of "
        f"{tokens.shape[2]} sub-tokens; expected {expected} as of the "
        f"tokenizer's grid {grid}: change image_size, or the "
        "tokenizer's"
      )
    mesh = Mesh(devices, ("batch",))
    self._batch = NamedSharding(mesh, PartitionSpec("batch"))
    self._state = jax.device_put(
      self._state, NamedSharding(mesh, PartitionSpec())
    )

  def start(self, about: list[int] | list[str], crops: Crops) -> Started:
    """Starts the encoding of labels or captions, and of crops."""
    batch = np.zeros(self.batch_shape, np.uint8)
    crops = crops.reshape(-1, *self.batch_shape[1:])
    batch[: len(crops)] = crops
    batch = jax.device_put(batch, self._batch)
    tokens = _encode(self._graphdef, self._state, batch)
    if not self.text:
      return tokens, about
    captions = cast(list[str], about)
    # A short batch is filled up with its last caption.
    spare = self.num_images - len(about)
    features, mask = self.text(captions + captions[-1:] * spare)
    return tokens, (features[: len(about)], mask[: len(about)])

  def finish(self, started: Started) -> Iterator[Example]:
    """Waits for the examples of a batch that was started."""
    tokens, about = started
    subjects = about
    if self.text:
      features, mask = about
      dtype = text_dtype(self.text)
      subjects = conditions.real_rows(features.astype(dtype), mask)
    variants = self.recipe.num_variants
    tokens = np.asarray(tokens)[: len(subjects) * variants]
    codes.check_codes("the tokenizer", tokens, self.vocab_sizes)
    shape = (len(subjects), variants, *tokens.shape[1:])
    return zip(subjects, tokens.reshape(shape))


def identity(model: nnx.Module | Tokenizer) -> dict[str, Any]:
  """Describes a model for JSON: class, config and the digest of its weights."""
  digest = hashlib.sha256()
  state = nnx.to_flat_state(nnx.state(model))
  for path, value in sorted(("/".join(map(str, p)), v) for p, v in state):
    array = np.asarray(value[...])
    digest.update(f"{path} {array.dtype} {array.shape}".encode())
    digest.update(array.tobytes())
  config: Any = getattr(model, "config", None)
  return {
    "class": f"{type(model).__module__}.{type(model).__qualname__}",
    "config": dataclasses.asdict(config)
    if dataclasses.is_dataclass(config) and not isinstance(config, type)
    else None,
    "sha256": digest.hexdigest(),
  }


def text_dtype(text: TextEncoder) -> str:
  """The dtype of the features, in which they are stored."""
  return getattr(text, "dtype", "float32")


def text_identity(text: TextEncoder) -> dict[str, Any]:
  """Describes, for JSON, everything that the features depend on."""
  model = getattr(text, "model", None)
  return {
    "class": f"{type(text).__module__}.{type(text).__qualname__}",
    "width": text.width,
    "length": text.length,
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

  `on_broken(position, error)` is called for the others.
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
  read = functools.partial(_read, source, encoder)
  dataset = grain.MapDataset.range(positions.start, positions.stop)
  examples = dataset.map(read).to_iter_dataset(
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


def _read(source, encoder, position: int):
  """(position, label or caption, crops), or (position, None, error)."""
  try:
    example = source[position]
    label = example.get("label")
    if label is not None:
      subject = int(label)
    else:
      subject = example["caption"]
      _check_caption(encoder.text, subject, source, position)
  except images.BrokenSampleError as error:
    return position, None, error
  return position, subject, encoder.recipe(example["image"])


def _check_caption(text: TextEncoder | None, caption, source, position) -> None:
  """BrokenSampleError if the encoder that is to read a caption cannot."""
  if not isinstance(text, ChecksCaptions):
    return
  try:
    text.check(caption)
  except ValueError as error:
    where = getattr(source, "where", "sample {}".format)(position)
    raise images.BrokenSampleError(where, str(error)) from error
