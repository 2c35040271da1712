"""What is measured, by hand; and what cannot be measured is refused."""

import numpy as np
import pytest

from configs import digits, shapes_t2i
from tensorar_jax.data import shapes
from tensorar_jax.evaluation import yardsticks
from tensorar_jax.experiment import build

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


def settings_and_stages(config):
  section = config.evaluation.to_dict()
  settings = build.call(yardsticks.EvaluationConfig, section, "evaluation")
  return settings, build.stages(config)


@pytest.mark.parametrize("module", [digits, shapes_t2i])
def test_the_configs_can_be_measured(module):
  settings, stages = settings_and_stages(module.get_config())
  settings.check(stages)


def test_what_cannot_be_measured_is_refused():
  settings, stages = settings_and_stages(shapes_t2i.get_config())
  base = stages["base"]
  for section, words in (
    ({"conditioning": dict(name="class", num_classes=6)}, "encodes captions"),
    ({"conditioning": dict(name="text", width=64)}, "encodes captions"),
    (
      {"data": {**base["data"], "name": "digits"}},
      "'digits': expected 'shapes'",
    ),
  ):
    with pytest.raises(ValueError, match=words):
      settings.check({**stages, "base": {**base, **section}})
  with pytest.raises(ValueError, match="'shpes' is unknown.*'shapes'"):
    yardsticks.EvaluationConfig(yardstick="shpes", models=("base",))
