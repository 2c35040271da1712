"""Where weights come from: finished stages, and measurements tied to them."""

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx

from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.evaluation import evaluate, yardsticks
from tensorar_jax.experiment import build, saved
from tensorar_jax.experiment.schema import (
  BackboneConfig,
  ConditioningConfig,
  EvaluationConfig,
  TextOptions,
)
from tensorar_jax.experiment.stages import with_precision
from tensorar_jax.generation import requests, sample_files
from tensorar_jax.parallel import weights
from tests import tiny_configs


def save(folder, step, stage):
  checkpoints = orbax_io.Checkpoints(folder / "checkpoints")
  state = {"params": {"w": jnp.ones(3)}}
  meta = {"config": saved.saved_config(stage)}
  checkpoints.save(step, state, {}, meta)
  checkpoints.close()


def test_a_stage_that_is_not_finished_is_no_parent(tmp_path):
  config = tiny_configs.stage(6)
  save(tmp_path / "base", 4, config)
  with pytest.raises(ValueError, match="base has got to step 4 of 6"):
    saved.resolve("base", tmp_path)
  save(tmp_path / "base", 6, config)
  assert saved.resolve("base", tmp_path).name == "6"


def test_stages_that_read_text_are_not_drawn_by_class():
  classes = tiny_configs.stage(6)
  text = tiny_configs.stage(6, conditioning=dict(name="text"))
  stages = {"classes": classes, "text": text}
  assert sample_files.drawable(stages, None) == "text"
  requests.check_classes("classes", classes)
  with pytest.raises(ValueError, match="'text' makes images from .*prompts"):
    requests.check_classes("text", text)
  stages["classifier"] = tiny_configs.stage(6, objective="classifier")
  yardsticks.check(EvaluationConfig(models=("classes",)), stages)
  with pytest.raises(ValueError, match="'text' makes images from .*prompts"):
    yardsticks.check(EvaluationConfig(models=("classes", "text")), stages)


def test_a_text_encoder_fits_its_conditioning(monkeypatch):
  class Encoder:
    width, length = 5, 9

    def __call__(self, captions):
      raise AssertionError("nothing is encoded")

  made = lambda name, texts, mesh: Encoder()
  monkeypatch.setitem(build.TEXT_ENCODERS, "words", made)

  def section(**fields):
    options = TextOptions(**{"encoder": "words", "length": 9, **fields})
    return ConditioningConfig("text", options)

  assert build.text_encoder(section(width=5)).width == 5
  with pytest.raises(ValueError, match=r"\(width, length\) = \(5, 9\): set"):
    build.text_encoder(section(width=6))
  with pytest.raises(ValueError, match="expected an `encoder`"):
    build.text_encoder(section(encoder=""))


def test_a_measurement_belongs_to_one_set_of_weights(tmp_path):
  """Training again, with the same settings, makes it void."""
  config = tiny_configs.stage(6)
  settings = EvaluationConfig(models=("a",))

  def fingerprint(name, classifier="c"):
    subject = evaluate.Subject(name, config, tmp_path / name)
    return subject.fingerprint(settings, classifier)

  for name in ("a", "b"):
    save(tmp_path / name, 6, config)
  assert fingerprint("a") == fingerprint("a")
  assert fingerprint("a") != fingerprint("b")
  assert fingerprint("a") != fingerprint("a", classifier="d")


def test_what_is_loaded_is_what_is_asked_for(tmp_path):
  config = tiny_configs.stage(objective="classifier", optim=dict(ema_decay=0.0))
  _, params, _ = weights.split(build.model(config, nnx.Rngs(0)))
  checkpoints = orbax_io.Checkpoints(tmp_path / "a" / "checkpoints")
  meta = {"config": saved.saved_config(config)}
  checkpoints.save(6, {"params": params}, {}, meta)
  checkpoints.close()
  with pytest.raises(ValueError, match="holds no EMA: train with"):
    build.load(tmp_path / "a", ema=True)
  with pytest.raises(ValueError, match="a classifier: images are drawn by"):
    build.load_tensorar(config, tmp_path / "a")
  reader = tiny_configs.stage(tokenizer=dict(init=str(tmp_path / "a")))
  with pytest.raises(ValueError, match="holds no tokenizer: name a stage"):
    build.frozen_tokenizer(reader, tmp_path)
  with pytest.raises(ValueError, match="'class': expected one that reads text"):
    build.text_conditioning(config.conditioning)


def test_precision_sets_the_dtype_of_every_backbone():
  one, other = tiny_configs.stage(6), tiny_configs.stage(objective="classifier")
  stages = {"one": one, "other": other}
  made = with_precision(stages, "bfloat16")
  assert made["one"].backbone.config.dtype == "bfloat16"
  assert one.backbone.config.dtype == "float32"  # not changed in place
  assert with_precision(made, "tensorfloat32") == stages
  bare = dataclasses.replace(one, backbone=BackboneConfig())
  assert with_precision({"bare": bare}, "bfloat16") == {"bare": bare}
