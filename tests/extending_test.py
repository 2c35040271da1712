"""The examples of docs/extending.md work as they stand."""

import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx

import tensorar_jax as tj
from tensorar_jax.method import drawing, noising, objective
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
    config = tj.SamplingConfig(rule=rule)
    out = tj.generate(model, tiny.cond(), None, jax.random.key(0), config)
    return np.asarray(out.tokens)

  plain = draw("inverse_cdf")
  np.testing.assert_array_equal(draw(rule(0.0)), plain)
  assert (draw(rule(5.0)) != plain).any()
