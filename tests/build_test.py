"""Where weights come from: finished stages, and measurements tied to them."""

import jax.numpy as jnp
import pytest

from tensorar_jax import build
from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.evaluation import evaluate
from tests import train_test


def save(folder, step, config):
  checkpoints = orbax_io.Checkpoints(folder / "checkpoints")
  state = {"params": {"w": jnp.ones(3)}}
  checkpoints.save(step, state, {}, {"config": config})
  checkpoints.close()


def test_a_stage_that_is_not_finished_is_no_parent(tmp_path):
  config = train_test.stage(6)
  save(tmp_path / "base", 4, config)
  with pytest.raises(ValueError, match="base has got to step 4 of 6"):
    build.resolve("base", tmp_path)
  save(tmp_path / "base", 6, config)
  assert build.resolve("base", tmp_path).name == "6"


def test_a_measurement_belongs_to_one_set_of_weights(tmp_path):
  """Training again, with the same settings, makes it void."""
  config = train_test.stage(6)
  settings = evaluate.EvaluationConfig(models=("a",))

  def fingerprint(name, classifier="c"):
    subject = evaluate.Subject(name, config, tmp_path / name)
    return subject.fingerprint(settings, classifier)

  for name in ("a", "b"):
    save(tmp_path / name, 6, config)
  assert fingerprint("a") == fingerprint("a")
  assert fingerprint("a") != fingerprint("b")
  assert fingerprint("a") != fingerprint("a", classifier="d")
