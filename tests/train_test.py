import json
import re
import shutil
import time

import chex
import numpy as np
import pytest

import tensorar_jax as tj
from tensorar_jax import build, train, train_step, weights
from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.data import pipeline


def stage(num_steps=6, **sections):
  """A stage on the digits that trains in seconds."""
  fields = dict(width=16, num_layers=2, num_heads=2, num_classes=10)
  base = {
    "seed": 0,
    "objective": "tensorar",
    "init": None,
    "source": None,
    "source_dtype": None,
    "data": dict(name="digits", train_split="train", test_split="test"),
    "tokenizer": dict(name="pixels", image_size=(8, 8), levels=17),
    "conditioning": dict(name="class", num_classes=10),
    "backbone": dict(
      name="llamagen", vocab_size=17, grid=(8, 8), mlp_multiple=8, **fields
    ),
    "tensorar": dict(window=3),
    "noise": dict(kind="categorical"),
    "loss": dict(weights="rdm"),
    "optim": dict(learning_rate=3e-3, ema_decay=0.9),
    "train": dict(
      batch_size=8, num_steps=num_steps, log_every=2, checkpoint_every=2
    ),
  }
  base = json.loads(json.dumps(base))
  for name, value in sections.items():
    base[name] = {**base[name], **value} if isinstance(value, dict) else value
  return base


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("train") / "stage"
  train.fit(stage(), folder)
  return folder


def test_a_run_resumed_from_a_checkpoint_equals_a_straight_one(
  trained, tmp_path
):
  """Parameters, EMA, optimiser, key and data position all come back."""
  folder = tmp_path / "stage"
  shutil.copytree(trained, folder)
  shutil.rmtree(folder / "checkpoints" / "6")
  train.fit(stage(), folder)
  assert (folder / "log.jsonl").read_text() == (
    trained / "log.jsonl"
  ).read_text()
  a = orbax_io.read_weights(orbax_io.find(folder))
  b = orbax_io.read_weights(orbax_io.find(trained))
  chex.assert_trees_all_equal(a, b)
  assert set(a) == {"params", "ema"}


def test_the_step_compiles_once_from_fresh_and_from_given_weights(
  trained, tmp_path, monkeypatch
):
  steps, make = [], train_step.make_train_step

  def spy(*args):
    steps.append(make(*args))
    return steps[-1]

  monkeypatch.setattr(train_step, "make_train_step", spy)
  train.fit(stage(2, optim=dict(ema_decay=0.0)), tmp_path / "fresh")
  train.fit(stage(2, init=str(trained)), tmp_path / "given")
  assert [step._cache_size() for step in steps] == [1, 1]


def test_a_slow_input_is_seen_and_steps_are_traced(tmp_path, monkeypatch):
  make, lines = pipeline.train_iterator, []

  class Slow:
    def __init__(self, *args, **options):
      self.data = make(*args, **options)
      self.get_state = self.data.get_state

    def __next__(self):
      time.sleep(0.55)
      return next(self.data)

  monkeypatch.setattr(pipeline, "train_iterator", Slow)
  write = lambda text, *args: lines.append(text % args if args else text)
  for level in ("info", "warning"):
    monkeypatch.setattr(train.logging, level, write)
  train.fit(stage(4), tmp_path / "stage", profile=(2, 3))
  assert list((tmp_path / "stage" / "profile").rglob("*.trace.json.gz"))
  slow = [line for line in lines if "input is too slow" in line]
  assert slow and "had no batch for" in slow[0]
  (row,) = [line for line in lines if " 2/4 " in line]
  speeds = r"ms/step, .* tokens/s, .* images/s, .* TFLOP/s, waiting .*%, ETA"
  assert re.search(speeds, row)
  # The trace of an interrupted run has nothing that a clock decides.
  assert "speed" not in (tmp_path / "stage" / "log.jsonl").read_text()


def test_load_gives_the_trained_model_and_its_average(trained):
  model, average = tj.load(trained), tj.load(trained, ema=True)
  assert model.window == 3
  a, b = (weights.split(m)[1] for m in (model, average))
  path = "backbone/head/kernel"
  assert (np.asarray(a[path]) != np.asarray(b[path])).any()


def test_training_lowers_the_loss(tmp_path):
  longer = stage(
    60, train=dict(batch_size=32, log_every=10, checkpoint_every=60)
  )
  train.fit(longer, tmp_path / "stage")
  rows = (tmp_path / "stage" / "log.jsonl").read_text().splitlines()
  rows = [json.loads(row) for row in rows]
  assert rows[-1]["ce/0"] < 0.8 * rows[0]["ce/0"]
  assert rows[-1]["ce/2"] < 0.9 * rows[0]["ce/2"]


def test_a_damaged_checkpoint_is_named(trained, tmp_path):
  folder = tmp_path / "stage"
  shutil.copytree(trained, folder)
  shutil.rmtree(folder / "checkpoints" / "6")
  newest = folder / "checkpoints" / "4"
  for file in (newest / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"junk")
  with pytest.raises(ValueError, match="cannot be read.*damaged"):
    train.fit(stage(), folder)
  with pytest.raises(ValueError, match="cannot be read"):
    tj.load(folder)


def test_a_missing_checkpoint_is_named(tmp_path):
  with pytest.raises(ValueError, match="no such checkpoint"):
    tj.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="found no checkpoint"):
    tj.load(tmp_path)
  with pytest.raises(ValueError, match="train that stage first"):
    train.fit(stage(init="nowhere"), tmp_path / "stage")


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(tmp_path):
  bad = stage(8, optim=dict(learning_rate=1e30, clip_norm=0.0))
  with pytest.raises(
    ValueError, match="loss of step .* expected finite numbers"
  ):
    train.fit(bad, tmp_path / "stage")
  saved = {p.name for p in (tmp_path / "stage" / "checkpoints").iterdir()}
  assert not saved & {"4", "6", "8"}


def test_a_gradient_that_is_not_finite_stops_under_a_finite_loss(tmp_path):
  rows = [{"loss": 1.0, "grad_norm": 2.0}, {"loss": 1.0, "grad_norm": np.nan}]
  with pytest.raises(
    ValueError, match="step 7 is 1.0, its gradient's norm nan"
  ):
    train._interval_means(rows, 7, tmp_path)


def test_another_config_in_the_folder_is_refused(trained):
  other = stage(noise=dict(kind="gaussian"))
  with pytest.raises(ValueError, match="noise.kind: was 'categorical'"):
    train.fit(other, trained)
  # What is written how often may change.
  train.fit(stage(train=dict(log_every=1)), trained)


def test_weights_of_another_model_are_refused(trained, tmp_path):
  wider = stage(init=str(trained), backbone=dict(width=32))
  with pytest.raises(ValueError, match="does not fit"):
    train.fit(wider, tmp_path / "a")
  base = stage(init=str(trained), tensorar=dict(window=1))
  with pytest.raises(ValueError, match="encoder/gain|is not in this model"):
    train.fit(base, tmp_path / "b")


@pytest.mark.parametrize(
  "section, value, words",
  [
    ("train", dict(checkpoint_every=3), "checkpoint_every=3"),
    ("train", dict(nmu_steps=3), "Did you mean 'num_steps'"),
    ("optim", dict(schedule="steep"), "steep"),
    ("optim", dict(learning_rate="high"), "learning_rate='high'"),
    ("backbone", dict(name="lamagen"), "Did you mean 'llamagen'"),
    ("backbone", dict(variant="XS"), "XXL"),
    ("backbone", dict(num_heads=3), "num_heads=3"),
    ("tokenizer", dict(name="vqq"), "Did you mean 'vq'"),
    ("conditioning", dict(name="sound"), "class"),
    ("loss", dict(condition_dropout=2.0), "condition_dropout=2.0"),
    ("noise", dict(schedule=[0.0, 0.5]), "3 slots"),
    ("tensorar", dict(windows=3), "Did you mean 'window'"),
    ("loss", dict(random_order=(5, 5)), "random_order=\\(5, 5\\)"),
    ("loss", dict(random_order=(0, 5)), "neighbours in raster order"),
  ],
)
def test_bad_settings_say_what_was_expected(section, value, words):
  with pytest.raises(ValueError, match=words):
    train.check(stage(**{section: value}))


def test_stages_overlay_the_shared_sections():
  from configs import digits

  stages = build.stages(digits.get_config())
  assert stages["tensorar"]["init"] == "base"
  assert stages["drafts"]["noise"]["kind"] == "drafts"
  assert stages["drafts"]["noise"]["schedule"] == "exponential"
  assert stages["base"]["tensorar"]["window"] == 1
  for one in stages.values():
    train.check(one)
