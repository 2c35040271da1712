"""Tests of the stream of features, on a network that only adds pixels up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tensorar_jax.evaluation.extractor import Extractor


class Sums(nnx.Module):
  """Per image the weighted sum of all pixels, and the first one."""

  def __init__(self):
    self.weight = nnx.Param(jnp.float32(0.5))

  def __call__(self, images):
    x = images.astype(jnp.float32) * self.weight[...]
    return {"sum": x.sum((1, 2, 3)), "first": x[:, 0, 0]}


def _images(n, height=3, width=5):
  rng = np.random.RandomState(0)
  return rng.randint(0, 256, (n, height, width, 3)).astype(np.uint8)


def _assert_features(got, images):
  want = images.astype(np.float32) / 2
  np.testing.assert_array_equal(got["sum"], want.sum((1, 2, 3)))
  np.testing.assert_array_equal(got["first"], want[:, 0, 0])
  assert all(type(array) is np.ndarray for array in got.values())


@pytest.mark.parametrize("batch_size", [1, 4, 7, 64])
def test_every_image_once_and_in_order(batch_size):
  images = _images(7)
  features = Extractor(Sums(), batch_size)
  batches = list(features(images))
  sizes = [len(batch["sum"]) for batch in batches]
  full, rest = divmod(7, batch_size)
  assert sizes == [batch_size] * full + [rest] * (rest > 0)
  _assert_features(features.of(images), images)


def test_any_iterable_of_arrays():
  images = _images(11)
  features = Extractor(Sums(), 4)
  bounds = [0, 1, 1, 3, 9, 11]  # one of the parts is empty
  parts = [images[a:b] for a, b in zip(bounds, bounds[1:])]
  _assert_features(features.of(parts), images)
  _assert_features(features.of(iter(parts)), images)
  _assert_features(features.of(jnp.asarray(part) for part in parts), images)
  _assert_features(features.of(jnp.asarray(images)), images)


def test_batches_are_read_as_they_are_needed():
  images, read = _images(40), []

  def source():
    for part in np.split(images, 10):
      read.append(len(part))
      yield part

  next(Extractor(Sums(), 4)(source()))
  assert len(read) <= 3


def test_one_compiled_shape():
  calls = []

  class Counted(Sums):
    def __call__(self, images):
      calls.append(images.shape)
      return super().__call__(images)

  features = Extractor(Counted(), 4)
  features.of(_images(11))
  features.of(_images(2))
  devices = len(jax.local_devices())
  assert calls == [(-(-4 // devices) * devices, 3, 5, 3)]


def test_errors_say_what_to_do():
  features = Extractor(Sums(), 4)
  for images, message in (
    (np.zeros((2, 3, 5, 3), np.float32), "float32; expected uint8.*convert"),
    (np.zeros((3, 5, 3), np.uint8), r"\(3, 5, 3\); expected \[n, .*stack"),
    (np.zeros((2, 3, 5, 1), np.uint8), "grey channel three times"),
    (np.zeros((2, 3, 5, 4), np.uint8), r"\(2, 3, 5, 4\); expected"),
    (np.zeros((2, 3, 0, 3), np.uint8), r"\(2, 3, 0, 3\); expected"),
  ):
    with pytest.raises(ValueError, match=message):
      features(images)  # before the first batch is asked for
    with pytest.raises(ValueError, match=message):
      features.of(iter([images]))
  for nothing in (_images(0), [], iter([_images(0)])):
    with pytest.raises(ValueError, match="no images; expected at least one"):
      features.of(nothing)
  with pytest.raises(ValueError, match=r"\(4, 5\) follow images of \(3, 5\)"):
    features.of([_images(1), _images(1, height=4)])
  with pytest.raises(ValueError, match="batch_size=0: expected at least 1"):
    Extractor(Sums(), 0)
