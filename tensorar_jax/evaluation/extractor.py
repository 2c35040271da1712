"""Images -> features of a network, any number, batch by batch.

The network maps uint8 images [B, h, w, 3] to a pytree of arrays with a leading
B. The devices of this process share every batch; while the features of one
batch are read, the next one is already being computed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt8

# Arrays with a leading axis of images: one, or several one after another.
Images = np.ndarray | jax.Array | Iterable[np.ndarray | jax.Array]


@functools.partial(jax.jit, static_argnums=0)
def _extract(graphdef, state, images: UInt8[Array, "B h w 3"]) -> Any:
  return nnx.merge(graphdef, state)(images)


class Extractor:
  """A network, compiled for batches of `batch_size` images.

  The devices of this process share every batch, and `batch_size` is rounded up
  to a multiple of their number. A short batch is filled up, so there is one
  compiled program per image size.
  """

  def __init__(self, model: nnx.Module, batch_size: int = 64):
    if batch_size < 1:
      raise ValueError(f"batch_size={batch_size}: expected at least 1.")
    devices = np.array(jax.local_devices())
    self.batch_size = -(-batch_size // len(devices)) * len(devices)
    mesh = Mesh(devices, ("batch",))
    self._batch = NamedSharding(mesh, PartitionSpec("batch"))
    self._graphdef, state = nnx.split(model)
    self._state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))

  def __call__(self, images: Images) -> Iterator[Any]:
    """Yields the features of all images in numpy, in order, batch by batch.

    `images` is one array, uint8 [n, h, w, 3], or an iterable of such arrays, of
    one image size and any numbers of images.
    """
    if hasattr(images, "shape"):
      images = [_checked(images, None)]  # An error is raised now, not later.
    return self._stream(_rebatch(images, self.batch_size))

  def of(self, images: Images) -> Any:
    """The features of all images in one piece, a row for each image."""
    parts = list(self(images))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

  def _stream(self, batches):
    # The next batch is started before the last one is read.
    waiting = None
    for batch in batches:
      started = self._start(batch), len(batch)
      if waiting:
        yield _finish(*waiting)
      waiting = started
    if not waiting:
      raise ValueError("there are no images; expected at least one.")
    yield _finish(*waiting)

  def _start(self, images) -> Any:
    batch = np.zeros((self.batch_size, *images.shape[1:]), np.uint8)
    batch[: len(images)] = images
    batch = jax.device_put(batch, self._batch)
    return _extract(self._graphdef, self._state, batch)


def _finish(features, count: int) -> Any:
  return jax.tree.map(lambda array: np.asarray(array)[:count], features)


def _rebatch(arrays, batch_size: int) -> Iterator[np.ndarray]:
  """Yields the same images by `batch_size`; the last array may be shorter."""
  size, held, count = None, [], 0
  for images in arrays:
    images = _checked(images, size)
    size = images.shape[1:3]
    while len(images):
      part = images[: batch_size - count]
      images = images[len(part) :]
      held.append(part)
      count += len(part)
      if count == batch_size:
        yield np.concatenate(held)
        held, count = [], 0
  if held:
    yield np.concatenate(held)


def _checked(images, size: tuple[int, int] | None) -> np.ndarray:
  images = np.asarray(images)
  if images.dtype != np.uint8:
    raise ValueError(
      f"images are {images.dtype}; expected uint8 in 0..255: convert them as"
      " the samples were, with the tokenizer's uint8_offset."
    )
  if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
    raise ValueError(
      f"images have shape {images.shape}; expected [n, height, width, 3]: stack"
      " single images, move channels last, repeat a grey channel three times."
    )
  if size not in (None, images.shape[1:3]):
    raise ValueError(
      f"images of {images.shape[1:3]} follow images of {size}; expected one"
      " size: resize them as the protocol asks, or call once for each size."
    )
  return images
