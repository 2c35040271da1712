"""Where weights come from: finished stages, and measurements tied to them."""

import jax.numpy as jnp
import pytest

from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.evaluation import evaluate
from tensorar_jax.experiment import build
from tensorar_jax.generation import requests, sample_files
from tests.training import loop_test


def save(folder, step, config):
  checkpoints = orbax_io.Checkpoints(folder / "checkpoints")
  state = {"params": {"w": jnp.ones(3)}}
  checkpoints.save(step, state, {}, {"config": config})
  checkpoints.close()


def test_a_stage_that_is_not_finished_is_no_parent(tmp_path):
  config = loop_test.stage(6)
  save(tmp_path / "base", 4, config)
  with pytest.raises(ValueError, match="base has got to step 4 of 6"):
    build.resolve("base", tmp_path)
  save(tmp_path / "base", 6, config)
  assert build.resolve("base", tmp_path).name == "6"


def test_stages_that_read_text_are_not_drawn_by_class():
  classes = loop_test.stage(6)
  text = {**classes, "conditioning": dict(name="text")}
  stages = {"classes": classes, "text": text}
  assert sample_files.drawable(stages, None) == "text"
  requests.check_classes("classes", classes)
  with pytest.raises(ValueError, match="'text' makes images from .*prompts"):
    requests.check_classes("text", text)
  stages["classifier"] = {**classes, "objective": "classifier"}
  evaluate.EvaluationConfig(models=("classes",)).check(stages)
  with pytest.raises(ValueError, match="'text' makes images from .*prompts"):
    evaluate.EvaluationConfig(models=("classes", "text")).check(stages)


def test_a_text_encoder_fits_its_conditioning(monkeypatch):
  class Encoder:
    width, length = 5, 9

    def __call__(self, captions):
      raise AssertionError("nothing is encoded")

  made = lambda name, texts, mesh: Encoder()
  monkeypatch.setitem(build.TEXT_ENCODERS, "words", made)
  section = dict(name="text", encoder="words", width=5, length=9)
  assert build.text_encoder(section).width == 5
  with pytest.raises(ValueError, match=r"\(width, length\) = \(5, 9\): set"):
    build.text_encoder({**section, "width": 6})
  with pytest.raises(ValueError, match="expected an `encoder`"):
    build.text_encoder({**section, "encoder": ""})


def test_a_measurement_belongs_to_one_set_of_weights(tmp_path):
  """Training again, with the same settings, makes it void."""
  config = loop_test.stage(6)
  settings = evaluate.EvaluationConfig(models=("a",))

  def fingerprint(name, classifier="c"):
    subject = evaluate.Subject(name, config, tmp_path / name)
    return subject.fingerprint(settings, classifier)

  for name in ("a", "b"):
    save(tmp_path / name, 6, config)
  assert fingerprint("a") == fingerprint("a")
  assert fingerprint("a") != fingerprint("b")
  assert fingerprint("a") != fingerprint("a", classifier="d")
