"""The examples of docs/extending.md work as they stand."""

import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx

import tensorar_jax as tj
from tensorar_jax.evaluation import metrics
from tensorar_jax.method import drawing, noising, objective
from tensorar_jax.reports import run_report
from tests import tiny
from tests.contract import families

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"


def example(title: str) -> str:
  """The first code block of a section, without the entry in the table."""
  section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
  code = re.search(r"```python\n(.*?)```", section, re.S)[1]
  return re.sub(r"^[A-Z]+ = \{\.\.\..*\n", "", code, flags=re.M)


@pytest.fixture(scope="module")
def model():
  backbone = families.backbone("llamagen")
  return tiny.redraw(tj.TensorAR(backbone, window=3, rngs=nnx.Rngs(0)))


def test_the_noise_kind_of_the_page_trains(model, monkeypatch):
  names = dict(vars(noising))
  exec(example("Add a noise kind"), names)
  monkeypatch.setitem(noising.KINDS, "swapped", names["add_swapped"])
  tokens = families.tokens(
    model.vocab_sizes, batch=2, length=model.backbone.num_tokens
  )

  def loss(kind):
    return objective.tensorar_loss(
      model,
      tiny.cond(),
      tokens,
      jax.random.key(0),
      noising.NoiseConfig(kind=kind),
      objective.LossConfig(),
    )[0]

  assert np.isfinite(loss("swapped")) and loss("swapped") != loss("none")


def test_the_drawing_rule_of_the_page_samples(model):
  names = dict(vars(drawing))
  exec(example("Add a drawing rule"), names)
  rule = names["AwayFromLastLook"]

  def draw(rule):
    config = tj.SamplingConfig(draw=rule)
    out = tj.generate(model, tiny.cond(), None, jax.random.key(0), config)
    return np.asarray(out.tokens)

  plain = draw("gumbel")
  np.testing.assert_array_equal(draw(rule(0.0)), plain)
  assert (draw(rule(5.0)) != plain).any()


def test_the_metric_of_the_page_is_measured_and_shown(monkeypatch):
  names = dict(vars(metrics))
  names["by_name"] = lambda page_has_more, *entries: metrics.by_name(*entries)
  exec(example("Add a metric"), names)
  monkeypatch.setitem(metrics.METRICS, "shift", names["METRICS"]["shift"])
  draw = np.random.default_rng(0).standard_normal
  real, fake = (metrics.FeatureSet(pool=draw((50, 3))) for _ in range(2))
  moved = metrics.FeatureSet(pool=fake.pool + (3.0, 0.0, 4.0))
  values = [
    metrics.Comparison(real, one).values()["shift"] for one in (fake, moved)
  ]
  assert values[0] < 1 < values[1] < 6
  assert 0 < metrics.Comparison(real, fake).errors(20)["shift"] < 1
  # It is shown, and judged by its direction.
  models = {"continued": {"shift": 2.0}, "wrapped": {"shift": 1.0}}
  text = run_report.table({"models": models})
  assert "shift \u2193" in text and "better" in text
