"""Ablations: what is shared, what is skipped, and what the page says."""

import dataclasses
import importlib
import json
import pathlib
import shutil

import pytest

from tensorar_jax.ablations import runs, variants
from tensorar_jax.checkpoints import resumable
from tensorar_jax.cli import training
from tensorar_jax.cli.config import Experiment
from tensorar_jax.evaluation import protocol
from tensorar_jax.experiment import parse
from tensorar_jax.generation import requests
from tensorar_jax.method import noising
from tensorar_jax.reports import ablation_report
from tensorar_jax.training import loop
from tests.e2e import tiny_ablation

ROOT = pathlib.Path(__file__).parents[2]
FILES = {p.stem for p in (ROOT / "configs" / "ablations").glob("*.py")}
AXES = sorted(FILES - {"all", "common"})


def ablation_of(name, data="digits"):
  module = importlib.import_module(f"configs.ablations.{name}")
  return variants.Ablation(parse.parse(module.get_config(data)))


@pytest.fixture(scope="module")
def every():
  return ablation_of("all")


@pytest.mark.parametrize("data", ["digits", "fashion_mnist", "llamagen_b"])
def test_every_variant_can_be_trained_and_differs_in_its_change_only(data):
  ablation = ablation_of("all", data)
  for name, stage in ablation.stages.items():
    if not name.endswith(("-seed1", "-seed2")):
      loop.check(stage)
  centre = ablation.stage("centre", 0)[1]
  assert centre.init == "base" and "base" in ablation.shared
  for variant, changes in ablation.variants.items():
    stage = ablation.stage(variant, 0)[1]
    found = resumable.differences(parse.as_dict(centre), parse.as_dict(stage))
    assert {key for key, _, _ in found} == {path for path, _ in changes}


def test_what_axes_share_is_one_variant(every):
  assert sorted(every.axes) == AXES
  named = {
    axis: [row["variant"] for row in found["rows"]]
    for axis, found in every.axes.items()
  }
  assert all(names.count("centre") == 1 for names in named.values())
  assert named["window"][0] == every.base == "tensorar-window=1"
  # Of the rows, 7 are the centre, and one is the base of all, k = 1.
  rows = 19 + len(noising.KINDS) + len(noising.SCHEDULES)
  assert sum(map(len, named.values())) == rows
  assert len(every.variants) == rows - 6
  assert len(list(every.runs())) == 3 * (rows - 6)
  trained = every.stages.keys() - every.shared.keys()
  assert len(trained) == 3 * (
    rows - 9
  )  # three draft temperatures train nothing
  name, stage = every.stage("sampling-draft_temperature=0.5", 2)
  assert (name, stage.seed) == ("centre-seed2", 2)
  assert stage.sampling.draft_temperature == 0.5
  # An axis on its own knows the same variants by the same names.
  assert {"centre", *named["depth"]} <= every.variants.keys()
  assert ablation_of("depth").axes["depth"] == every.axes["depth"]
  timed = {axis for axis, found in every.axes.items() if found["timed"]}
  assert timed == {"window", "depth"}
  assert every.timed() == {(1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (4, 4)}


def broken(change, **fields):
  config = tiny_ablation.get_config()
  config.ablation.axes.loss.rows[0]["change"] = change
  config.ablation.update(fields)
  return variants.Ablation(parse.parse(config))


def test_bad_axes_are_named():
  with pytest.raises(ValueError, match="axis loss, 'rdm': section 'nois'"):
    broken([["nois.kind", "none"]])
  with pytest.raises(ValueError, match="'noise': expected 'section.key'"):
    broken([["noise", "none"]])
  with pytest.raises(ValueError, match="ablation.centre 'tensorer' is unknown"):
    broken([], centre="tensorer")
  with pytest.raises(ValueError, match="seeds=0"):
    broken([], seeds=0)
  with pytest.raises(ValueError, match="'rdm': noise: key 'kindd' is unknown"):
    broken([["noise.kindd", "none"]])
  with pytest.raises(ValueError, match="noise kind='salt': choose one of"):
    broken([["noise.kind", "salt"]])
  with pytest.raises(ValueError, match="variant 'k8' is unknown"):
    broken([]).stage("k8", 0)
  with pytest.raises(ValueError, match="data set 'mnist': choose one of"):
    ablation_of("window", "mnist")


def names(path):
  return json.loads(path.read_text())["records"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(ablation, workdir, output, records before the kill) of a tiny run."""
  root = tmp_path_factory.mktemp("ablation")
  ablation = variants.Ablation(parse.parse(tiny_ablation.get_config()))
  workdir, output = root / "run", root / "out"
  measure = runs.ByEvaluation(ablation, workdir)
  asked = []

  class Killed(measure.__class__):
    def __call__(self, name, stage):
      asked.append(name)
      if len(asked) == 3:
        raise KeyboardInterrupt
      return super().__call__(name, stage)

  with pytest.raises(KeyboardInterrupt):
    runs.run(ablation, workdir, output, Killed(ablation, workdir))
  before = names(output / "digits.json")
  runs.run(ablation, workdir, output, measure)
  return ablation, workdir, output, before


def test_a_killed_run_continues(finished):
  ablation, workdir, output, before = finished
  assert len(before) == 2
  after = names(output / "digits.json")
  assert {name: after[name] for name in before} == before
  assert list(after) == sorted(run.record for run in ablation.runs())
  assert len(after) == 2 * 3
  centre = [after[f"centre/seed{seed}"]["metrics"] for seed in range(2)]
  assert centre[0]["frechet"] != centre[1]["frechet"]
  assert not list(workdir.glob("sampling*"))  # nothing was trained for it
  assert len(list(workdir.glob("*-seed1"))) == 2


def test_what_is_done_is_skipped(finished):
  ablation, workdir, output, _ = finished
  page = (output / ablation_report.PAGE).read_text()
  before = (output / "digits.json").read_text()

  class Never:
    settings = runs.ByEvaluation(ablation, workdir).settings

    def __call__(self, name, stage):
      raise AssertionError(name)

  # Not even the models are needed.
  runs.run(ablation, workdir / "elsewhere", output, Never())
  assert (output / "digits.json").read_text() == before
  assert (output / ablation_report.PAGE).read_text() == page
  one = ablation.stage("centre", 0)[1]
  other = variants.Ablation(parse.parse(tiny_ablation.get_config()))
  other.centre = parse.changed(one, "sampling.guidance", 2.0)
  with pytest.raises(ValueError, match="sampling.guidance: was 1.0, is 2.0"):
    runs.run(other, workdir, output, Never())
  assert (output / "digits.json").read_text() == before


def test_the_page_and_the_picture_come_from_the_results_alone(
  finished, tmp_path
):
  _, _, output, _ = finished
  shutil.copy(output / "digits.json", tmp_path)
  ablation = finished[0]
  training.visualize(
    training.Visualize(config="unread", output=str(tmp_path)),
    Experiment(stages=ablation.stages, ablation=ablation),
    tmp_path / "nowhere",
  )
  page = (tmp_path / ablation_report.PAGE).read_text()
  assert page == (output / ablation_report.PAGE).read_text()
  assert (tmp_path / "digits.png").read_bytes()[:4] == b"\x89PNG"
  for name in ("loss", "draft_temperature"):
    command = "python -m tensorar_jax.main --config=configs/ablations/"
    assert f"```bash\n{command}{name}.py\n```" in page
  assert "2 training seeds, mean ± standard deviation; 2 steps of 8" in page
  assert page.count(f"| {ablation_report.CONTROL} |") == 2
  with pytest.raises(ValueError, match="holds no results yet"):
    ablation_report.render(tmp_path / "nowhere")


def test_times_are_measured_once_and_together(tmp_path, monkeypatch, every):
  path, asked = tmp_path / "digits.json", []

  def fake(stages, workdir, settings, *, stage):
    asked.append((settings.windows, settings.depths))
    rows = [(w, d) for w in settings.windows for d in settings.depths]
    rows = [(w, d) for w, d in rows if d == 1 or w == 4]
    stat = {"median": 2.0, "min": 1.0, "max": 3.0}
    cases = [
      dict(name=f"{w} {d}", window=w, depth=d, batch=8, guided=True)
      | {"ms_per_step": stat}
      for w, d in rows
    ]
    ratios = [{"name": c["name"], **stat} for c in cases if c["window"] > 1]
    record = {"cases": cases, "ratios": ratios}
    (tmp_path / "benchmark.json").write_text(json.dumps(record))
    return tmp_path

  monkeypatch.setattr(runs.benchmark, "run", fake)
  evaluation = dataclasses.asdict(every.evaluation)
  alone = ablation_of("window")
  runs.prepare(path, alone, evaluation)
  runs.add_times(path, alone, tmp_path)
  runs.add_times(path, alone, tmp_path)
  assert asked == [((1, 2, 4, 8), (1,))]
  runs.prepare(path, every, evaluation)
  runs.add_times(path, every, tmp_path)
  assert asked[1:] == [((1, 2, 4, 8), (1, 2, 4))]
  results = json.loads(path.read_text())
  assert ablation_report.time_of(results, "centre")["ratio"]["median"] == 2
  assert ablation_report.time_of(results, every.base)["ratio"]["median"] == 1
  assert ablation_report.time_of(results, "tensorar-depth=4")["depth"] == 4
  assert len(results["times"]) == 6


def test_a_reference_measures_as_papers_do(tmp_path, monkeypatch, every):
  judge = object.__new__(protocol.Judge)
  judge.reference, judge.network = {"sha256": "1f"}, {"file": "inception.pth"}
  asked = {}

  def sweep(judge, stages, workdir, images, *, stage, scales, batch_size):
    sampling = stages[stage].sampling
    asked.update(stage=stage, scales=scales, sampling=sampling)
    metrics = {"fid": {"value": 4.7, "std": 0.1}, "recall": {"value": 0.5}}
    return {"guidance 1": {"metrics": metrics, "num_images": 7}}

  monkeypatch.setattr(runs.protocol, "sweep", sweep)
  measure = runs.ByReference(every, tmp_path, judge, requests.Request(7))
  assert measure.settings["reference"] == "1f"
  assert measure.settings["num_images"] == 7
  found = measure(*every.stage("sampling-draft_temperature=0.5", 1))
  assert found == {"metrics": {"fid": 4.7, "recall": 0.5, "guidance": 1.0}}
  assert (asked["stage"], asked["scales"]) == ("centre-seed1", [1.0])
  assert asked["sampling"].draft_temperature == 0.5
  monkeypatch.setattr(runs.protocol, "sweep", lambda *_, **__: None)
  with pytest.raises(ValueError, match="Run ablations in one process"):
    measure(*every.stage("centre", 0))
  with pytest.raises(
    ValueError, match="name a reference batch with --referenc"
  ):
    runs.ByEvaluation(ablation_of("window", "llamagen_b"), tmp_path)


def test_a_row_compares_within_a_seed_and_stands_beside_the_papers():
  record = lambda value: {"metrics": {"frechet": value, "recall": value / 10}}
  results = {
    "base": "k1",
    "shapes": {},
    "times": [],
    "records": {
      "a/seed0": record(5.0),
      "a/seed1": record(4.0),
      "k1/seed0": record(4.0),
      "k1/seed1": record(1.0),
      "b/seed1": record(9.0),
    },
  }
  paper = {"paper": 4.7, "paper_seconds": None}
  rows = [dict(name=n.upper(), variant=n) | paper for n in ("a", "b", "c")]
  axis = {"title": "axis", "rows": rows, "timed": False}
  head, a, b, c, base = ablation_report.cells(results, axis)
  assert head[:4] == ["axis", "papers' FID ↓", "Fréchet distance ↓", "recall ↑"]
  assert a[:3] == ["A", "4.70", "4.50 ± 0.71"] and a[4] == "+2.00 ± 1.41"
  assert b[2] == "9.00" and b[4] == "+8.00"
  assert c == ["C", "4.70", "", "", "", ""]  # not measured yet
  assert (
    base[:3] == [ablation_report.CONTROL, "", "2.50 ± 2.12"] and base[4] == ""
  )


def test_the_committed_page_is_that_of_the_committed_results(tmp_path):
  committed = ROOT / "studies" / "ablations"
  files = sorted(committed.glob("*.json"))
  assert [path.stem for path in files] == ["digits", "fashion_mnist"]
  text = ablation_report.page(ablation_report.read(committed))
  assert text == (committed / ablation_report.PAGE).read_text()
  for path in files:
    picture = committed / f"{path.stem}.png"
    assert 1000 < picture.stat().st_size < 100_000
    # The configs still say what was measured.
    results = json.loads(path.read_text())
    ablation = ablation_of("all", path.stem)
    found = runs.describe(ablation, dataclasses.asdict(ablation.evaluation))
    assert found == runs.complete(results["settings"])
    for name, axis in results["axes"].items():
      # A kind of noise that is new since then has a row that is not measured.
      rows = [row for row in ablation.axes[name]["rows"] if row in axis["rows"]]
      assert {**ablation.axes[name], "rows": rows} == axis
      for row in axis["rows"]:
        measured = ablation_report.records_of(results, row["variant"])
        assert 0 < len(measured) <= ablation.seeds
