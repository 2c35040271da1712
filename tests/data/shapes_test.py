"""Drawings with captions: a fixed data set that keeps its promises."""

import collections
import hashlib

import numpy as np
import pytest
import scipy.ndimage

from tensorar_jax.data import pipeline, shapes, sources
from tensorar_jax.data.sources import shapes as shapes_source


@pytest.fixture(scope="module")
def scenes():
  return [shapes.scene(i) for i in range(600)]


def test_a_scene_depends_on_seed_and_index_alone(scenes):
  again = [shapes.scene(i) for i in (7, 599, 0)]
  assert again == [scenes[7], scenes[599], scenes[0]]
  assert shapes.scene(7, seed=1) != scenes[7]


def test_the_data_set_is_what_it_was():
  """Else a stored run would be compared with another one's data."""
  source = sources.load("shapes", "test")
  examples = [source[i] for i in range(60)]
  text = "\n".join(example["caption"] for example in examples).encode()
  drawn = b"".join(example["image"].tobytes() for example in examples)
  digest = hashlib.sha256(text + drawn).hexdigest()[:16]
  assert digest == "a8ecc84da81d9f8e"


def test_the_grammar_covers_its_categories(scenes):
  kinds = collections.defaultdict(set)
  for scene in scenes:
    kinds[scene.prompt.category].add(scene.prompt.caption)
    assert set(scene.prompt.caption.split()) <= shapes.WORDS
  assert list(kinds) == list(shapes.CATEGORIES)
  assert kinds["single_object"] == {f"a {shape}" for shape in shapes.SHAPES}
  assert len(kinds["two_objects"]) == 4 * 3
  assert len(kinds["counting"]) == 3 * 4
  assert kinds["colors"] <= {
    f"a {colour} {shape}"
    for colour in shapes.COLOURS
    for shape in shapes.SHAPES
  }
  words = {word for caption in kinds["position"] for word in caption.split()}
  assert {"left", "right", "above", "below"} <= words


def test_the_objects_are_those_of_the_caption(scenes):
  for scene in scenes:
    wanted = [d for d in scene.prompt.demands for _ in range(d.count)]
    assert [one.shape for one in scene.objects] == [d.shape for d in wanted]
    for one, demand in zip(scene.objects, wanted):
      assert demand.colour in (None, one.colour)
    if scene.prompt.relation:
      assert shapes.holds(scene.prompt.relation, *scene.objects)


def test_objects_are_apart_and_inside(scenes):
  """Each is one connected area, with a free pixel between them."""
  for scene in scenes:
    drawn = shapes.draw(scene.objects).any(axis=-1)
    near = scipy.ndimage.binary_dilation(drawn, np.ones((2, 2)))
    assert scipy.ndimage.label(near)[1] == len(scene.objects)
    area = sum(
      shapes.mask(one.shape, one.height, one.width).sum()
      for one in scene.objects
    )
    assert area == drawn.sum()


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_a_mask_touches_all_sides_and_is_mirrored(shape):
  for size in (7, 8, 10, 12):
    mask = shapes.mask(shape, size, size)
    assert mask[0].any() and mask[-1].any()
    assert mask[:, 0].any() and mask[:, -1].any()
    np.testing.assert_array_equal(mask, mask[:, ::-1])


@pytest.mark.parametrize(
  ("relation", "mirrored"), [("left of", "right of"), ("above", "below")]
)
def test_relations_are_of_boxes_apart(relation, mirrored):
  place = lambda at: (0, at) if relation == "left of" else (at, 0)
  box = lambda at: shapes.Object("square", "red", *place(at), 8, 8)
  assert shapes.holds(relation, box(0), box(8))
  assert not shapes.holds(relation, box(0), box(7))
  assert not shapes.holds(mirrored, box(0), box(8))
  assert shapes.holds(mirrored, box(8), box(0))


def test_splits_share_no_scene():
  train, test = (sources.load("shapes", split) for split in ("train", "test"))
  assert isinstance(train, sources.Source)
  assert train.end == test.first and len(train) % 6 == len(test) % 6 == 0
  assert train[len(train) - 1]["image"].shape == train.image_shape
  for position in (-1, len(test)):
    with pytest.raises(IndexError):
      test[position]
  with pytest.raises(ValueError, match="'val'.*'train' and 'test'"):
    sources.load("shapes", "val")
  with pytest.raises(ValueError, match="category 'cats'.*single_object"):
    shapes.draw_prompt("cats", np.random.RandomState(0))
  with pytest.raises(ValueError, match="shape 'star'.*circle"):
    shapes.mask("star", 8, 8)


def test_batches_carry_captions():
  source = shapes_source.ShapesSource(0, 12)
  iterator = pipeline.train_iterator(source, batch_size=6, seed=0)
  key = lambda one: (one["image"].tobytes(), one["caption"], int(one["label"]))
  found = []
  for batch in (next(iterator), next(iterator)):
    assert batch["label"].dtype == np.int32
    rows = [{name: batch[name][i] for name in batch} for i in range(6)]
    found += map(key, rows)
  assert sorted(found) == sorted(key(source[i]) for i in range(12))
