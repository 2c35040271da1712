"""The research script for a GPU: tiny, on a CPU, and what it plans."""

import json
import time

import numpy as np
import pytest

from launch import gpu_report
from studies import gpu_fashion
from studies.gpu_fashion import Next
from tensorar_jax.data import codes, sources
from tensorar_jax.experiment import build
from tensorar_jax.generation import batches
from tensorar_jax.parallel import preemption
from tensorar_jax.training import loop


def names(summary, kind):
  return [line["group"] for line in summary[kind]]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """Options of a tiny study that is complete: one seed, two rounds."""
  folder = tmp_path_factory.mktemp("gpu_fashion")
  options = gpu_fashion.parse_options([f"--folder={folder}", "--tiny"])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gpu_fashion, "SEEDS", 1)
    patch.setattr(gpu_fashion, "ROUNDS", 2)
    gpu_fashion.prepare(options)
    gpu_fashion.Study(options, time.monotonic() + 1000).run()
  return options


@pytest.fixture
def one_seed(monkeypatch):
  monkeypatch.setattr(gpu_fashion, "SEEDS", 1)


def read(options):
  return json.loads((options.output / "summary.json").read_text())


def test_the_tokens_are_those_of_the_images(done):
  folder = f"tokens:{done.folder / 'tokens'}"
  kept, images = (sources.load(n, "test") for n in (folder, "digits"))
  assert isinstance(kept, codes.TokenSource)
  assert isinstance(images, sources.ArraySource)
  tokenizer = build.frozen_tokenizer(
    gpu_fashion.stages_of(tiny=True)["base"], done.folder
  )
  positions = np.arange(20)
  found = kept.fetch(positions, 0 * positions)
  want = images[positions]
  np.testing.assert_array_equal(
    found["tokens"], batches.encode(tokenizer, want["image"])
  )
  np.testing.assert_array_equal(found["label"], want["label"])


def test_both_models_start_from_the_best_round_for_equal_steps(done):
  summary = read(done)
  assert names(summary, "rounds") == ["base-1", "base-2"]
  first, second = summary["rounds"]
  assert (first["init"], second["init"]) == (None, "base-1")
  assert (first["decays"], second["decays"]) == (False, True)
  best = min(summary["rounds"], key=lambda one: one["loss"])["group"]
  assert summary["plan"]["base"] == best
  assert names(summary, "models") == [
    "base",
    "continued-seed0",
    "tensorar-seed0",
  ]
  configs = [
    json.loads((done.folder / name / "config.json").read_text())
    for name in ("continued-seed0", "tensorar-seed0")
  ]
  for config in configs:
    assert config["init"] == best and config["train"] == configs[0]["train"]
    assert config["train"]["num_steps"] == summary["plan"]["steps"]
  assert [c["tensorar"]["window"] for c in configs] == [1, 2]
  assert configs[1]["noise"]["kind"] == "categorical"


def test_the_page_has_a_row_for_each_model(done):
  page = (done.output / "summary.md").read_text()
  lines = [line.split(" | ") for line in page.splitlines()]
  rows = {line[0].removeprefix("| "): line for line in lines if len(line) > 9}
  assert {"base", "base, trained on", "TensorAR, published recipe"} <= {*rows}
  assert {"held-out real images"} <= {*rows}
  base, tensorar = (
    model["metrics"]["frechet"] for model in read(done)["models"][1:]
  )
  assert rows["TensorAR, published recipe"][-1] == f"{tensorar - base:+.2f} |"


def test_what_is_done_is_not_done_again_nor_are_images_read(
  done, one_seed, monkeypatch
):
  before = read(done)
  load = sources.load

  def only_tokens(name, split, **options):
    assert name.startswith("tokens:"), name
    return load(name, split, **options)

  monkeypatch.setattr(sources, "load", only_tokens)
  monkeypatch.setattr(loop, "fit", None)
  lines = done.output / gpu_report.RESULTS
  text = lines.read_text()
  gpu_fashion.Study(done, time.monotonic() + 1000).run()
  added = gpu_report.read(lines)[len(text.splitlines()) :]
  assert [line["line"] for line in added] == ["about"]
  assert read(done)["models"] == before["models"]


def test_nothing_begins_when_the_time_is_over(done, monkeypatch):
  monkeypatch.setattr(gpu_fashion, "SEEDS", 2)
  monkeypatch.setattr(loop, "fit", None)
  before = read(done)["models"]
  gpu_fashion.Study(done, time.monotonic() - 1).run()
  assert read(done)["models"] == before


def test_a_folder_that_was_not_prepared_is_refused(tmp_path):
  options = gpu_fashion.parse_options([f"--folder={tmp_path}"])
  with pytest.raises(ValueError, match="run the same command with --prepare"):
    gpu_fashion.Study(options, time.monotonic())


def test_a_training_under_way_is_asked_to_stop_at_the_end_of_the_time():
  now = time.monotonic()
  with (
    pytest.raises(SystemExit) as stopped,
    preemption.watch("base") as asked,
    gpu_fashion.stopped_at(now + 0.05),
  ):
    while not asked() and time.monotonic() < now + 10:
      time.sleep(0.01)
  assert stopped.value.code == preemption.EXIT_CODE


def a_round(number, loss, decays=False):
  return dict(group=f"base-{number}", loss=loss, decays=decays, seconds=10.0)


def test_the_base_trains_until_its_loss_stops_falling_then_decays():
  plan = gpu_fashion.next_round
  assert plan([], seconds=100) == Next(None, decays=False)
  falling = [a_round(1, 2.0), a_round(2, 1.9)]
  assert plan(falling, seconds=100) == Next("base-2", decays=False)
  # The time is enough for one round more, not for two.
  assert plan(falling, seconds=19) == Next("base-2", decays=True)
  flat = [*falling, a_round(3, 1.899)]
  assert plan(flat, seconds=100) == Next("base-3", decays=True)
  rising = [*falling, a_round(3, 1.95)]
  assert plan(rising, seconds=100) == Next("base-2", decays=True)
  complete = [*rising, a_round(4, 1.96, decays=True)]
  assert plan(complete, seconds=100) is None
  assert gpu_fashion.best(complete)["group"] == "base-2"
  assert gpu_fashion.converged(complete) and not gpu_fashion.converged(falling)


def test_the_steps_of_a_seed_fit_into_the_time():
  plan = gpu_fashion.steps_of_seed
  # The first round compiled for 8 s; beside its steps a round takes 4 s.
  first = dict(steps=2000, step_seconds=0.002, seconds=16)
  rounds = [first, dict(steps=5000, step_seconds=0.002, seconds=14)]
  steps = plan(rounds, measurement=15, seconds=200)
  training = 3 * steps * 0.002 * (1 + gpu_fashion.STEP_RATIO)
  beside = 2 * (12 + 2 * 4)
  measuring = 15 * (1.5 + 5 * 0.4)
  assert training + beside + measuring == pytest.approx(180, rel=0.01)
  assert plan(rounds, measurement=15, seconds=10) == 200


def test_the_real_stages_can_be_trained():
  stages = gpu_fashion.stages_of(tiny=False)
  for name in ("base", "tensorar"):
    loop.check(stages[name])
  assert stages["tensorar"].tensorar.window == 4
  config = stages["tensorar"].backbone.config
  assert (config.width, config.num_layers, config.grid) == (256, 6, (7, 7))
  settings = gpu_fashion.settings_of(tiny=False)
  assert settings.num_images == 10_000
  # One compiled shape for the scan and for the images that count.
  assert settings.scan_images % settings.batch_size == 0
