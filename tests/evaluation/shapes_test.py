"""Drawings are read back exactly, and what is wrong is seen."""

import dataclasses

import numpy as np
import pytest

from tensorar_jax.data import shapes
from tensorar_jax.evaluation import shapes as scorer

COUNT = 600  # scenes, 100 of each category


@pytest.fixture(scope="module")
def scenes():
  return [shapes.scene(i) for i in range(COUNT)]


def of(scenes, *categories):
  return [s for s in scenes if s.prompt.category in categories]


def right(objects, prompt):
  return bool(scorer.score(shapes.draw(tuple(objects))[None], [prompt])[0])


def test_every_drawing_is_read_back_exactly(scenes):
  for scene in scenes:
    found = scorer.read(shapes.draw(scene.objects))
    assert set(found) == set(scene.objects)
    assert len(found) == len(scene.objects)
  images = np.stack([shapes.draw(scene.objects) for scene in scenes])
  assert scorer.score(images, [scene.prompt for scene in scenes]).all()


def test_blur_does_not_matter(scenes):
  """Colours off by a third, and a pixel on either side of the threshold."""
  rng = np.random.RandomState(0)
  for scene in scenes[:120]:
    image = shapes.draw(scene.objects).astype(float)
    noisy = image + rng.uniform(-80, 80, image.shape)
    found = scorer.read(np.clip(noisy, 0, 255).astype(np.uint8))
    assert set(found) == set(scene.objects)


def test_a_missing_object_is_wrong(scenes):
  for scene in scenes:
    assert not right(scene.objects[1:], scene.prompt)


def test_another_shape_is_wrong(scenes):
  for scene in scenes:
    first, *others = scene.objects
    shape = next(
      shape
      for shape in shapes.SHAPES
      if shape not in {one.shape for one in scene.objects}
    )
    first = dataclasses.replace(first, shape=shape)
    assert not right((first, *others), scene.prompt)


def test_counts_are_exact(scenes):
  for scene in of(scenes, "counting"):
    new = dataclasses.replace(scene.objects[0], height=8, width=8)
    places = [
      dataclasses.replace(new, top=top, left=left)
      for top in range(0, 25, 2)
      for left in range(0, 25, 2)
    ]
    free = [
      place
      for place in places
      if not any(shapes._near(place, old) for old in scene.objects)
    ]
    if free:
      assert not right((*scene.objects, free[0]), scene.prompt)


def test_colours_count_where_they_are_asked_for(scenes):
  for scene in of(scenes, "colors", "color_attribution"):
    tints = [one.colour for one in scene.objects]
    tints = tints[::-1] if len(tints) > 1 else ["white", "red"]
    swapped = [
      dataclasses.replace(one, colour=tint if tint != one.colour else "red")
      for one, tint in zip(scene.objects, tints, strict=False)
    ]
    assert not right(swapped, scene.prompt)
  for scene in of(scenes, "single_object", "two_objects"):
    red = [dataclasses.replace(one, colour="red") for one in scene.objects]
    assert right(red, scene.prompt)


def test_a_mirrored_position_is_wrong(scenes):
  for scene in of(scenes, "position"):
    image = shapes.draw(scene.objects)
    flip = slice(None, None, -1)
    both = {True: image[:, flip], False: image[flip]}
    sideways = scene.prompt.relation in ("left of", "right of")
    images = np.stack([both[sideways], both[not sideways]])
    found = scorer.score(images, [scene.prompt] * 2)
    assert not found[0]
    # Upside down a triangle is none any more.
    assert found[1] == ("triangle" not in scene.prompt.caption or not sideways)


def test_more_than_the_caption_says_is_right_unless_it_counts(scenes):
  scene = next(s for s in of(scenes, "two_objects"))
  single = dataclasses.replace(
    scene.prompt, demands=scene.prompt.demands[:1], category="single_object"
  )
  assert right(scene.objects, single)


def test_specks_and_odd_shapes_are_no_objects():
  image = np.zeros((32, 32, 3), np.uint8)
  image[3:6, 3:6] = 255  # too small
  image[10:12, 2:30] = (255, 0, 0)
  image[10:30, 2:4] = (255, 0, 0)  # an angle
  assert scorer.read(image) == []
