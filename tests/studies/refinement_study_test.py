"""The study's bookkeeping and its tables; training and sampling are not run."""

import json

import numpy as np
import pytest

from studies import refinement_report, refinement_study
from studies.refinement_study import PLANS, Run
from tensorar_jax.training import loop


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("data", PLANS)
def test_every_run_has_a_stage_that_can_be_trained(data, quick):
  stages = refinement_study.stages_of(data, 2, quick)
  for stage in stages.values():
    loop.check(stage)
  assert stages["classifier"].seed == 0
  runs = [run for run in refinement_study.all_runs() if run.data == data]
  assert {run.stage for run in runs} <= set(stages)
  for run in runs:
    stage = stages[run.stage]
    assert (stage.seed, stage.init) == (2, "base")
    # Nothing but the method differs: equal steps, equal learning rates.
    base = stages["continued"]
    assert stage.train == base.train and stage.optim == base.optim
    assert stage.tensorar.window == run.window
    if run.window > 1:
      kind = stage.noise.kind
      assert kind == ("drafts" if run.recipe == "drafts" else "categorical")
  assert stages["control-k2"].noise.schedule == (0, 1)


def names(*patterns):
  return [run.name for run in refinement_study.select(list(patterns))]


def test_only_selects_and_brings_the_reference_along():
  assert len(names()) == 3 * 6 + 4
  assert names("digits/k4/seed1") == [
    "digits/k1/seed1/continued",
    "digits/k4/seed1/categorical",
    "digits/k4/seed1/drafts",
  ]
  assert names("digits/*/seed0/drafts", "digits/k2/seed0/control/") == [
    "digits/k1/seed0/continued",
    "digits/k2/seed0/control",
    "digits/k2/seed0/drafts",
    "digits/k4/seed0/drafts",
  ]
  assert len(names("fashion_mnist")) == 4
  with pytest.raises(ValueError, match="digits/k3: no such run"):
    names("digits/k3")
  with pytest.raises(ValueError, match="no such run"):
    names("digits/k2/seed")  # not half a word


def record(value=1.0, window=1):
  row = dict.fromkeys(("accuracy", "precision", "recall", "entropy"), value / 4)
  row |= {"frechet": value, "guidance": 1.0}
  kinds = {"training_noise": [value] * window, "own_drafts": [value] * window}
  slots = {"cross_entropy": kinds, "window_accuracy": kinds}
  slots["copy_rate"] = [value] * window
  matched = {**row, "frechet": value + 1, "temperature": 0.8}
  return {
    "metrics": row,
    "diagnostics": slots,
    "settings": {"num_images": 5000, "scan_images": 1000},
    **({"matched": matched} if window > 1 else {}),
  }


def test_records_are_added_in_order_and_kept(tmp_path):
  path = tmp_path / "new" / "results.json"
  assert refinement_study.read(path) == {}
  order = [run.name for run in refinement_study.all_runs()]
  for name in (order[3], order[0], order[5]):
    refinement_study.add(path, name, {"of": name})
  found = refinement_study.read(path)
  assert list(found) == [order[0], order[3], order[5]]
  assert found[order[3]] == {"of": order[3]}
  assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_records_of_other_settings_are_refused():
  run = Run("digits", 2, 1, "control")
  settings = refinement_study.describe(run, quick=False)
  assert settings["num_images"] == PLANS["digits"].num_images
  assert settings["noise"]["schedule"] == [0, 1]
  results = {run.name: {"settings": json.loads(json.dumps(settings))}}
  refinement_study.check(results, quick=False)
  with pytest.raises(ValueError, match="seed1/control was measured with other"):
    refinement_study.check(results, quick=True)


def test_the_table_compares_within_a_seed():
  results = {
    "digits/k1/seed0/continued": record(4.0),
    "digits/k2/seed0/drafts": record(5.0, window=2),
    "digits/k1/seed1/continued": record(1.0),
    "digits/k2/seed1/drafts": record(4.0, window=2),
    "fashion_mnist/k1/seed0/continued": record(3.0),
  }
  models = refinement_report.by_model(results)["digits"]
  head, base, drafts, matched = refinement_report.comparison_rows(models)
  assert base[:4] == ["base, trained on", "1", "1", "2.500 ± 2.121"]
  assert drafts[1:4] == ["2", "1", "4.500 ± 0.707"]
  assert drafts[-2:] == ["+2.00 ± 1.41", "-1.00 ± 0.00"]
  assert matched[0].endswith("temperature 0.800 ± 0.000")
  assert {len(line) for line in (base, drafts, matched)} == {len(head)}
  head, *slots = refinement_report.slot_rows(models)
  assert [line[2] for line in slots] == ["0", "1"]
  assert {len(line) for line in slots} == {len(head)}
  text = refinement_report.markdown(results)
  assert "### fashion_mnist\n\n1 training seed; 5,000 images" in text
  assert text.count("| ---") >= 4
  # No seed of the base yet: nothing to compare with, no failure.
  del results["digits/k1/seed0/continued"], results["digits/k1/seed1/continued"]
  assert refinement_report.markdown(results).count("+") == 0


def test_the_picture_pairs_models_with_the_base_at_their_entropy(tmp_path):
  results = {
    "digits/k1/seed0/continued": record(4.0),
    "digits/k2/seed0/drafts": record(5.0, window=2),
  }
  groups = refinement_report.groups(results)
  pair = groups["digits"]["TensorAR, own drafts as noise, k = 2"]
  assert [rows[0]["frechet"] for rows in pair] == [5.0, 6.0]
  refinement_report.render(results, tmp_path)
  assert (tmp_path / "refinement.png").stat().st_size > 1000
  assert "| ↳ base" in (tmp_path / "refinement.md").read_text()
  with pytest.raises(ValueError, match="no records"):
    refinement_report.render({}, tmp_path)


def test_the_matched_temperature_is_interpolated(monkeypatch):
  """Between the two of the scan whose entropies enclose the wanted one."""
  seen = {}

  class Sampler:
    def draw(self, scale, seed, labels):
      seen.update(scale=scale, seed=seed, count=len(labels))
      return {"images": np.zeros(1)}

  class Yardstick:
    def labels(self, first, count):
      return np.arange(first, first + count)

    def measure_set(self, images, labels):
      return {"frechet": 7.0}

  study = refinement_study.Study.__new__(refinement_study.Study)
  study.settings = refinement_study.settings_of("digits", False)
  study.__dict__["yardstick"] = Yardstick()
  monkeypatch.setattr(
    refinement_study.Study, "_sampler", lambda self, name, t: Sampler()
  )
  monkeypatch.setattr(
    refinement_study.Study, "_entropy", lambda self, name, t, scale: t
  )
  reference = {
    "metrics": {"guidance": 1.25},
    "temperatures": [[0.6, 1.0], [0.8, 2.0], [1.0, 2.5]],
  }
  for entropy, want in ((1.5, 0.7), (2.25, 0.9), (9.0, 1.0), (0.1, 0.6)):
    found = study._matched(entropy, reference)
    assert found["temperature"] == pytest.approx(want)
    assert found["frechet"] == 7.0
  assert seen == {"scale": 1.25, "seed": 0, "count": 10_000}
