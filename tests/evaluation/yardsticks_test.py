"""What is measured, by hand; and what cannot be measured is refused."""

import dataclasses

import numpy as np
import pytest

from tensorar_jax.data import shapes
from tensorar_jax.evaluation import yardsticks
from tensorar_jax.experiment import config_file
from tensorar_jax.experiment.schema import (
  ClassOptions,
  ConditioningConfig,
  DataConfig,
  TextOptions,
)

CATEGORIES = len(shapes.CATEGORIES)


@pytest.fixture(scope="module")
def reader():
  """A yardstick of 60 prompts, without a tokenizer."""
  made = yardsticks.ByReading.__new__(yardsticks.ByReading)
  made.scenes = [shapes.scene(i) for i in range(10 * CATEGORIES)]
  return made


def test_the_mean_is_over_categories_and_the_error_over_prompts(reader):
  """Half of the counting images are black, the same prompts in both seeds."""
  test = reader.held_out(60)
  images, labels = test["image"], test["label"]
  black = images.copy()
  counting = shapes.CATEGORIES.index("counting")
  black[counting::CATEGORIES][::2] = 0
  found = reader.measure([black, black], labels)
  assert list(found) == [*shapes.CATEGORIES, "overall"]
  assert found["counting"]["values"] == [0.5, 0.5]
  assert found["overall"]["mean"] == pytest.approx(1 - 0.5 / CATEGORIES)
  assert found["colors"]["mean"] == 1 and found["colors"]["std"] == 0
  # Ten prompts, each right or wrong: sqrt(1/4 / 10), whatever the seeds.
  assert found["counting"]["std"] == pytest.approx(0.158, abs=0.02)
  low, high = found["counting"]["interval"]
  assert 0.1 <= low <= 0.3 and 0.7 <= high <= 0.9
  ratio = found["overall"]["std"] / found["counting"]["std"]
  assert ratio == pytest.approx(1 / CATEGORIES)
  assert reader.cost(black, labels) == pytest.approx(0.5 / CATEGORIES)


def test_labels_number_the_prompts(reader):
  np.testing.assert_array_equal(reader.labels(57, 5), [57, 58, 59, 0, 1])
  images = reader.held_out(12)["image"]
  assert reader.right(images, np.arange(12)).all()
  assert not reader.right(images, np.arange(12) + 1).all()


@pytest.mark.parametrize("name", ["digits", "shapes_t2i"])
def test_the_configs_can_be_measured(name):
  found = config_file.load(f"configs/{name}.py")
  yardsticks.check(found.evaluation, found.stages)


def test_what_cannot_be_measured_is_refused():
  found = config_file.load("configs/shapes_t2i.py")
  settings, stages = found.evaluation, found.stages
  classes = ConditioningConfig("class", ClassOptions(num_classes=6))
  features = ConditioningConfig("text", TextOptions(width=64))
  for section, words in (
    (dict(conditioning=classes), "encodes captions"),
    (dict(conditioning=features), "encodes captions"),
    (dict(data=DataConfig("digits")), "'digits': expected 'shapes'"),
  ):
    base = dataclasses.replace(stages["base"], **section)
    with pytest.raises(ValueError, match=words):
      yardsticks.check(settings, {**stages, "base": base})
  with pytest.raises(ValueError, match="'shpes' is unknown.*'shapes'"):
    yardsticks.check(dataclasses.replace(settings, yardstick="shpes"), stages)
