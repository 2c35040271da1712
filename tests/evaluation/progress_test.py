"""Every kept checkpoint of a stage, measured and drawn."""

import json

import numpy as np
import pytest

from tensorar_jax.evaluation import evaluate, progress, protocol, yardsticks
from tensorar_jax.experiment import build
from tensorar_jax.generation import sample_files
from tensorar_jax.reports import progress_report
from tensorar_jax.training import loop
from tests import tiny_configs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(stages, work directory) of a stage with checkpoints at steps 2 and 4."""
  workdir = tmp_path_factory.mktemp("progress")
  stage = tiny_configs.stage(4)
  loop.fit(stage, workdir / "wrapped")
  return {"wrapped": stage}, workdir


class Brightness:
  """A yardstick that needs no classifier."""

  identity, names, notes = "brightness", ("0", "1"), ()

  def __init__(self, stages, settings, workdir):
    pass

  check = staticmethod(lambda stages, settings: None)
  conditions = staticmethod(
    lambda stage: build.conditioning(stage.conditioning)
  )
  labels = staticmethod(lambda first, count: (first + np.arange(count)) % 10)

  @staticmethod
  def measure(sets, labels):
    (images,) = sets
    return {"frechet": yardsticks.over_seeds([float(images.mean())])}


def test_every_checkpoint_is_measured_once(trained, monkeypatch):
  stages, workdir = trained
  monkeypatch.setitem(yardsticks.YARDSTICKS, "brightness", Brightness)
  settings = yardsticks.EvaluationConfig(
    "brightness", models=("wrapped",), num_images=10, batch_size=10
  )
  found = progress.by_yardstick(stages, settings, workdir, ["wrapped"])
  means = [row["frechet"]["mean"] for row in found["wrapped"].values()]
  assert list(found["wrapped"]) == [2, 4] and means[0] != means[1]
  # The newest is what the stage is measured as otherwise.
  subject = evaluate.Subject("wrapped", stages["wrapped"], workdir / "wrapped")
  drawn = evaluate.LoadedSubject(subject, 10).draw(1.0, 0, np.arange(10))
  assert means[1] == drawn["images"].mean()
  with monkeypatch.context() as once:
    once.setattr(evaluate, "LoadedSubject", None)
    again = progress.by_yardstick(stages, settings, workdir, ["wrapped"])
  assert again == found
  progress_report.draw(found, stages, workdir, "10 images")
  assert (workdir / progress_report.PICTURE).stat().st_size > 1000
  with pytest.raises(ValueError, match="'none' has no checkpoint"):
    progress.by_yardstick(
      {**stages, "none": stages["wrapped"]}, settings, workdir, ["none"]
    )


def test_a_reference_measures_every_checkpoint(trained, monkeypatch):
  stages, workdir = trained
  asked, judge = [], object.__new__(protocol.Judge)

  def measure_stage(judge, stages, workdir, request, **options):
    asked.append((judge, request.step, request.num_images, options))
    return {"metrics": {"fid": {"value": 7.0 - request.step, "std": 0.5}}}

  monkeypatch.setattr(protocol, "measure_stage", measure_stage)
  found = progress.by_reference(
    judge, stages, workdir, sample_files.Request(12), name="wrapped"
  )
  assert found == {
    "wrapped": {
      2: {"fid": {"mean": 5.0, "std": 0.5}},
      4: {"fid": {"mean": 3.0, "std": 0.5}},
    }
  }
  options = {"stage": "wrapped", "batch_size": None}
  assert asked == [(judge, step, 12, options) for step in (2, 4)]


def test_samples_of_a_checkpoint_on_the_way(trained):
  stages, workdir = trained
  places = [
    sample_files.sample(
      stages, workdir, sample_files.Request(3, step=step), pngs=False
    )
    for step in (None, 2)
  ]
  steps = [
    json.loads((place.folder / sample_files.MANIFEST).read_text())
    for place in places
  ]
  assert [found["checkpoint"]["step"] for found in steps] == [4, 2]
  assert steps[0]["sha256"] != steps[1]["sha256"]
  with pytest.raises(ValueError, match="checkpoints/3: no such checkpoint"):
    sample_files.sample(stages, workdir, sample_files.Request(3, step=3))


def test_a_stage_stands_behind_the_one_it_goes_on_from():
  stages = {
    "base": tiny_configs.stage(7),
    "tuned": tiny_configs.stage(5, init="base"),
    "again": tiny_configs.stage(3, init="tuned"),
    "imported": tiny_configs.stage(9, source="weights.pt"),
    "wrapped": tiny_configs.stage(3, init="imported"),
  }
  before = [progress_report.steps_before(stages, name) for name in stages]
  assert before == [0, 7, 12, 0, 0]
