"""Order, sharing out, resuming and mirroring of training batches."""

import itertools
import json

import numpy as np
import pytest

from tensorar_jax.data import pipeline, sources
from tensorar_jax.data.sources import tfds
from tensorar_jax.parallel import sharding

NUM_IMAGES = 23


@pytest.fixture
def source() -> sources.ArraySource:
  """Images that no two of are alike, nor like another's mirror image."""
  images = np.random.default_rng(0).integers(
    0, 256, (NUM_IMAGES, 3, 5, 1), dtype=np.uint8
  )
  labels = np.arange(NUM_IMAGES, dtype=np.int32)  # the position, to be found
  return sources.ArraySource(images, labels, num_classes=NUM_IMAGES)


class OneByOne:
  """The same images without batched access, as a lazy source has them."""

  def __init__(self, source: sources.ArraySource):
    self.source = source
    self.num_classes = source.num_classes
    self.image_shape = source.image_shape

  def __len__(self):
    return len(self.source)

  def __getitem__(self, position):
    return self.source[int(position)]


def take(iterator, n):
  return list(itertools.islice(iterator, n))


def assert_same_batches(actual, expected):
  assert len(actual) == len(expected)
  for one, other in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(one["image"], other["image"])
    np.testing.assert_array_equal(one["label"], other["label"])


def test_shapes_and_types(source):
  batch = next(pipeline.train_iterator(source, batch_size=7, seed=1))
  assert batch["image"].shape == (7, 3, 5, 1)
  assert batch["image"].dtype == np.uint8
  assert batch["label"].shape == (7,)
  assert batch["label"].dtype == np.int32
  np.testing.assert_array_equal(batch["image"], source.images[batch["label"]])


def test_an_epoch_has_each_image_once_in_its_own_order(source):
  iterator = pipeline.train_iterator(source, batch_size=7, seed=1)
  # 23 batches of 7 are 7 epochs; most batches span two of them.
  seen = np.concatenate([batch["label"] for batch in take(iterator, 23)])
  epochs = seen.reshape(7, NUM_IMAGES)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(NUM_IMAGES))
  assert len({tuple(epoch) for epoch in epochs}) == 7


def test_a_batch_may_be_the_whole_set(source):
  iterator = pipeline.train_iterator(source, batch_size=NUM_IMAGES, seed=1)
  for batch in take(iterator, 2):
    assert set(batch["label"]) == set(range(NUM_IMAGES))


def test_the_seed_decides(source):
  def labels(seed):
    iterator = pipeline.train_iterator(source, batch_size=NUM_IMAGES, seed=seed)
    return [tuple(batch["label"]) for batch in take(iterator, 3)]

  assert labels(1) == labels(1)
  # All six epochs differ: seed 2 is not seed 1 shifted by an epoch.
  assert len(set(labels(1) + labels(2))) == 6


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_any_number_of_processes_reads_the_same_batches(source, count, flip):
  options = {"batch_size": 6, "seed": 3, "flip": flip}
  expected = take(pipeline.train_iterator(source, **options), 9)
  parts = [
    take(
      pipeline.train_iterator(
        source,
        share=sharding.Share((block,), count),
        **options,
      ),
      9,
    )
    for block in range(count)
  ]
  assert parts[0][0]["label"].shape == (6 // count,)
  joined = [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_same_batches(joined, expected)


@pytest.mark.parametrize("flip", [False, True])
def test_resuming_gives_the_following_batches(source, flip):
  options = {"batch_size": 5, "seed": 3, "flip": flip}
  iterator = pipeline.train_iterator(source, **options)
  take(iterator, 6)
  state = json.loads(json.dumps(iterator.get_state()))
  assert state == {"next_index": 6}
  expected = take(iterator, 8)

  resumed = pipeline.train_iterator(source, **options)
  resumed.set_state(state)
  assert_same_batches(take(resumed, 8), expected)
  iterator.set_state(state)  # and back on a used one
  assert_same_batches(take(iterator, 8), expected)


def test_a_state_moves_to_another_number_of_processes(source):
  options = {"batch_size": 6, "seed": 3, "flip": True}
  whole = pipeline.train_iterator(source, **options)
  take(whole, 5)
  half = pipeline.train_iterator(
    source, share=sharding.Share((1,), 2), **options
  )
  half.set_state(whole.get_state())
  batch = next(whole)
  second_half = {key: value[3:] for key, value in batch.items()}
  assert_same_batches([next(half)], [second_half])
  assert half.get_state() == whole.get_state()


def test_blocks_apart_from_each_other_are_joined(source):
  options = {"batch_size": 8, "seed": 3, "flip": True}
  whole = pipeline.train_iterator(source, **options)
  share = sharding.Share((0, 3), 4)
  for batch in take(pipeline.train_iterator(source, share=share, **options), 4):
    rows = {k: v[[0, 1, 6, 7]] for k, v in next(whole).items()}
    assert_same_batches([batch], [rows])


def test_flip_mirrors_about_half_and_anew_each_epoch(source):
  def mirrored(seed):
    iterator = pipeline.train_iterator(
      source, batch_size=NUM_IMAGES, seed=seed, flip=True
    )
    rows = []
    for batch in take(iterator, 20):
      upright = source.images[batch["label"]]
      same = (batch["image"] == upright).all((1, 2, 3))
      turned = (batch["image"] == upright[:, :, ::-1]).all((1, 2, 3))
      assert (same ^ turned).all()
      rows.append(turned[np.argsort(batch["label"])])
    return np.array(rows)

  before = source.images.copy()
  drawn = mirrored(seed=5)
  np.testing.assert_array_equal(drawn, mirrored(seed=5))
  assert (drawn != mirrored(seed=6)).any()
  assert 0.4 < drawn.mean() < 0.6  # 460 draws, 4 standard deviations
  assert (drawn.any(axis=0) & ~drawn.all(axis=0)).all()  # each image both ways
  np.testing.assert_array_equal(source.images, before)


@pytest.mark.parametrize("flip", [False, True])
def test_a_lazy_source_reads_the_same(source, flip):
  options = {"batch_size": 5, "seed": 3, "flip": flip}
  lazy = pipeline.train_iterator(OneByOne(source), **options)
  eager = pipeline.train_iterator(source, **options)
  assert_same_batches(take(lazy, 11), take(eager, 11))
  assert lazy.get_state() == eager.get_state() == {"next_index": 11}
  assert_same_batches(
    list(pipeline.batches(OneByOne(source), 5)),
    list(pipeline.batches(source, 5)),
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 0}, "between 1 and the 23 images.*got 0"),
    ({"batch_size": 24}, "between 1 and the 23 images.*got 24"),
    ({"batch_size": 7, "share": sharding.Share((0,), 2)}, "divisible by the 2"),
    ({"batch_size": 6, "seed": -1}, "seed=-1: expected a whole number from 0"),
  ],
)
def test_bad_options_are_errors(source, options, message):
  with pytest.raises(ValueError, match=message):
    pipeline.train_iterator(source, **{"seed": 0, **options})


def test_images_of_different_sizes_are_an_error(source):
  uneven = tfds.LazySource(source, (None, None, 3), num_classes=2)
  for read in (
    lambda: pipeline.train_iterator(uneven, batch_size=2, seed=0),
    lambda: pipeline.batches(uneven, 2),
    lambda: pipeline.as_arrays(uneven),
  ):
    with pytest.raises(ValueError, match="differ in size"):
      read()


def test_batches_pass_once_in_order(source):
  passed = list(pipeline.batches(source, 7))
  assert [len(batch["label"]) for batch in passed] == [7, 7, 7, 2]
  joined = {
    key: np.concatenate([batch[key] for batch in passed]) for key in passed[0]
  }
  np.testing.assert_array_equal(joined["image"], source.images)
  np.testing.assert_array_equal(joined["label"], source.labels)
  with pytest.raises(ValueError, match="at least 1, got 0"):
    pipeline.batches(source, 0)


def test_as_arrays_stacks_all_or_the_first(source):
  images, labels = pipeline.as_arrays(source)
  np.testing.assert_array_equal(images, source.images)
  np.testing.assert_array_equal(labels, source.labels)
  images, labels = pipeline.as_arrays(OneByOne(source), limit=5)
  np.testing.assert_array_equal(images, source.images[:5])
  np.testing.assert_array_equal(labels, source.labels[:5])
  assert len(pipeline.as_arrays(source, limit=99)[1]) == NUM_IMAGES
  with pytest.raises(ValueError, match="got 0"):
    pipeline.as_arrays(source, limit=0)
