"""What a benchmark says follows from what it timed, and it runs to its end."""

import dataclasses
import json

import numpy as np
import pytest

from tensorar_jax.backbones import open_magvit2
from tensorar_jax.conditioning.conditions import (
  PromptConditioning,
  TextConditioning,
)
from tensorar_jax.experiment import parse
from tensorar_jax.performance import (
  benchmark,
  benchmark_report,
  machine,
  peer_torch,
  workloads,
)
from tensorar_jax.performance.workloads import Case, Work
from tests import tiny
from tests.e2e import tiny_digits

WORK = Work("decode", 2, 1, 1, True, tokens=10, flops=60, bytes=30)


def digits():
  config = tiny_digits.get_config()
  with config.unlocked():
    config.backbone.update(num_layers=1, grid=(4, 4))
    config.tokenizer.update(image_size=(4, 4))
  return parse.parse(config).stages


# --- pure functions ----------------------------------------------------------


def row(program=workloads.OURS, seconds=(1.0, 2.0), **fields):
  runs = [{"seconds": s, "extra_bytes": None} for s in seconds]
  limits = [{"flops": 120.0, "read": 60.0}, {"flops": 60.0, "read": 60.0}]
  work = dataclasses.replace(WORK, **fields)
  case = Case(work, program, dict, dict)
  return benchmark_report.case_record(case, {"seconds": 9.0}, runs, limits)


def test_figures_are_medians_of_the_rounds():
  found = row(seconds=(1.0, 4.0))
  assert found["ms_per_step"] == {"median": 250, "min": 100, "max": 400}
  assert found["images_per_second"]["median"] == (2 + 0.5) / 2
  assert found["tokens_per_second"]["max"] == 20
  # 60 FLOPs in 1 s of 120 FLOP/s, then in 4 s of 60 FLOP/s.
  assert found["of_flops"] == {"median": 0.375, "min": 0.25, "max": 0.5}
  assert found["of_read"] == {"median": 0.3125, "min": 0.125, "max": 0.5}


def test_what_no_limit_bounds_has_no_share():
  found = row(kind="train", bytes=0)
  assert "of_read" not in found and "ms_per_step" not in found
  assert "of_flops" in found


def test_utilisation_is_of_the_peak_of_all_devices():
  case = Case(dataclasses.replace(WORK, flops=60), workloads.OURS, dict, dict)
  runs = [{"seconds": 2.0, "extra_bytes": None}]
  limits = [{"flops": 120.0, "read": 60.0}]
  found = benchmark_report.case_record(
    case, {"seconds": 9.0, "device_bytes": 7}, runs, limits, peak=300.0
  )
  assert found["mfu"]["median"] == 0.1 and found["device_bytes"] == 7
  assert "mfu" not in row()  # of a chip without a data sheet


def test_compilation_of_the_peer_is_what_the_first_run_took_longer():
  assert row("torch compile")["compile_seconds"] == 7.5
  assert row("torch eager")["compile_seconds"] is None


def test_ratios_are_of_the_rounds():
  rows = [
    row(seconds=(1.0, 2.0)),
    row(seconds=(2.0, 2.0), window=4, flops=90, bytes=33),
    row("torch eager", seconds=(3.0, 1.0)),
    row(seconds=(5.0, 5.0), batch=8),  # another batch: no partner
    {**row(window=2), "error": "out of memory"},
  ]
  wider, peer = benchmark_report.ratios(rows)
  assert (wider["of"], wider["over"]) == (workloads.OURS, "k=1")
  assert (wider["median"], wider["min"], wider["max"]) == (1.5, 1.0, 2.0)
  assert wider["flops"] == 1.5 and wider["bytes"] == 1.1
  assert (peer["of"], peer["over"]) == ("torch eager", workloads.OURS)
  assert (peer["median"], peer["min"], peer["max"]) == (1.75, 0.5, 3.0)


def test_the_plan_is_a_list_and_no_cross_product():
  settings = benchmark.Settings(batches=(1, 8))
  works = benchmark.plan(settings, (4, 1), train_batch=3)
  names = [work.name for work in works]
  assert len({*names}) == len(names) == 18
  assert "decode 2x8 k=4 depth 2" in names and "decode 1x8 k=1" in names
  assert "decode 2x8 k=2 depth 2" not in names  # depths of one window
  assert names[-2:] == ["train 3 k=1", "train 3 k=4 depth 1"]
  guided = dataclasses.replace(settings, unguided=False)
  fewer = [work.name for work in benchmark.plan(guided, (4, 1), train_batch=3)]
  assert {*names} - {*fewer} == {"decode 1x1 k=1", "decode 1x8 k=1"}


def test_a_step_reads_what_it_uses():
  model = tiny.fresh(window=3)
  cond = tiny.cond(batch=2)
  count, read = workloads.step_work(model, cond, guided=True)
  c = tiny.CONFIG
  block = c.width * (4 * c.width + 3 * c.block.mlp_width + 2)
  weights = c.num_layers * block + c.width * (c.vocab_size + 1)
  # Q_in: 4 projections, an MLP of 4 units, 3 + 3 rows and norms; Q_out alike,
  # but its queries and keys meet one row and are not computed.
  small = c.width * (2 * 4 + 4)
  q_in = c.width * (4 * c.width) + small + c.width * (3 + 1)
  q_out = c.width * (2 * c.width) + small + c.width * (3 - 1 + 2)
  assert read == pytest.approx(4 * (weights + q_in + q_out), rel=0.02)
  assert read > 4 * weights
  alone, _ = workloads.step_work(model, cond, guided=False)
  assert alone < count < 2 * alone  # the input encoder runs once for both


def test_limits_can_be_measured_once(quick):
  once = machine.Limits("float32", once=True)
  first = once.measure()
  assert first["flops"] > 0 and once.measure() is first
  again = machine.Limits("float32")
  assert again.measure() is not again.measure()


def test_conditions_and_tokens_are_random(tmp_path):
  """Else all gradients of an embedding would meet in one row."""
  loads = workloads.Workloads(digits()["tensorar"], tmp_path)
  tokens = loads.tokens(64, loads.model(1, 1))
  assert tokens.shape == (64, 16, 1)
  assert {*tokens.ravel()} == {*range(loads.backbone.vocab_sizes[0])}
  rows = loads.rows(64)
  assert {*rows["label"]} == {*range(10)} and not rows["is_null"].any()
  np.testing.assert_array_equal(loads.rows(64)["label"], rows["label"])
  loads.conditioning = PromptConditioning(length=3, vocab_size=7)
  rows = loads.rows(50)
  assert rows["text"].shape == (50, 3, 2)
  assert {*rows["text"].ravel()} == {*range(7)}
  assert not rows["is_padding"].any()
  loads.conditioning = TextConditioning(width=4, length=3)
  assert loads.rows(50)["text"].std() > 0.9


# --- errors ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (dict(windows=(0,)), r"--windows=\(0,\): expected numbers from 1 on"),
    (dict(depths=(1, 1)), "each once"),
    (dict(rounds=0), "--rounds=0: expected at least 1"),
    (dict(parts=("decodes",)), "Did you mean 'decode'"),
    (dict(peer="touch"), "Did you mean 'torch'"),
    (dict(peer_modes=("graph",)), "Did you mean 'graphs'"),
    (dict(profile=("decode", "trains")), "Did you mean 'train'"),
  ],
)
def test_bad_flags_are_explained(given, words):
  with pytest.raises(ValueError, match=words):
    benchmark.Settings(**given)


def test_a_plan_without_cases_is_an_error():
  settings = benchmark.Settings(windows=(2,), parts=("train",))
  with pytest.raises(ValueError, match="nothing to measure"):
    benchmark.plan(settings, (4, 1), 1)


def test_a_folder_is_not_overwritten(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="is there already"):
    benchmark.run(
      digits(), tmp_path, benchmark.Settings(), output=str(tmp_path)
    )


def test_a_stage_that_draws_nothing_is_refused(tmp_path):
  with pytest.raises(ValueError, match="--stage=classifier: expected one"):
    benchmark.run(digits(), tmp_path, benchmark.Settings(), stage="classifier")


def test_the_peer_has_no_other_kind_of_model():
  config = open_magvit2.Config(grid=(2, 2), width=16, num_heads=2)

  class Factorised:
    vocab_sizes = (64, 4096)

  Factorised.config = config
  with pytest.raises(ValueError, match="not those of a LLaMA"):
    peer_torch.sizes_of(Factorised(), {})


# --- a run -------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(machine, "MATMUL", {"cpu": 64})
  monkeypatch.setattr(machine, "READ_BYTES", 2**20)
  monkeypatch.setattr(machine, "LIMIT_SECONDS", 0.0)
  monkeypatch.setattr(machine, "RUN_SECONDS", 0.0)
  monkeypatch.setattr(machine, "cores", lambda: 1)


def test_a_run_leaves_its_files_and_numbers(tmp_path, quick, capsys):
  settings = benchmark.Settings(
    (1,),
    windows=(1, 2),
    depths=(1,),
    rounds=2,
    train_batch=1,
    peer="torch",
    peer_modes=("eager",),
    precision="float32",
    profile=("decode",),
  )
  folder = benchmark.run(digits(), tmp_path, settings, stage="base")
  assert folder == tmp_path / "benchmark" / "000"
  found = json.loads((folder / "benchmark.json").read_text())
  programs = [(case["name"], case["program"]) for case in found["cases"]]
  ours = [name for name, program in programs if program == workloads.OURS]
  assert ours == [
    "decode 2x1 k=1",
    "decode 2x1 k=2 depth 1",
    "decode 1x1 k=1",
    "tokenizer 1",
    "train 1 k=1",
  ]
  assert ("decode 2x1 k=1", "torch eager") in programs
  assert ("train 1 k=1", "torch eager") in programs
  for case in found["cases"]:
    assert "error" not in case and len(case["seconds"]) == 2
    assert (np.array(case["seconds"]) > 0).all()
  assert len(found["ratios"]) == 3
  assert found["settings"]["precision"] == found["products"] == "float32"
  (profile,) = found["profiles"]
  assert profile["name"] == "decode 2x1 k=1"
  assert profile["launches"] > 16 and profile["busy_seconds"] > 0
  assert sum(k["count"] for k in profile["kernels"]) <= profile["launches"]
  page = (folder / "benchmark.md").read_text()
  printed = capsys.readouterr().out
  assert all(name in page and name in printed for name, _ in programs)
  assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
  # The next one gets a number of its own.
  assert benchmark._new_folder(None, folder.parent).name == "001"


def test_no_case_begins_when_the_time_is_over(tmp_path, quick, capsys):
  """But one round is measured, of what is warm."""
  settings = benchmark.Settings((1,), rounds=3, seconds=1e-6)
  folder = benchmark.run(digits(), tmp_path, settings, stage="base")
  found = json.loads((folder / "benchmark.json").read_text())
  assert {case["error"] for case in found["cases"]} == {"no time was left"}
  assert "no time was left" in capsys.readouterr().out


def test_what_fails_is_a_line_of_the_table(tmp_path):
  failed = {"error": "no compiler"}
  case = Case(WORK, "torch compile", dict, dict)
  rows = [row(), benchmark_report.case_record(case, failed, [], [])]
  limit = benchmark_report.summary([1e9])
  record = {
    **{"stage": "base", "dtype": "float32", "settings": {"rounds": 2}},
    **{"products": "tensorfloat32", "peak_flops": 494.5e12},
    **{"software": {}, "limits": {"flops": limit, "read": limit}},
    **{"device_peak_bytes": None, "cases": rows, "ratios": []},
    "machine": machine.describe(),
  }
  benchmark_report.write(tmp_path, record)
  page = (tmp_path / "benchmark.md").read_text()
  assert "| torch compile | failed: no compiler |" in page


# --- the peer ----------------------------------------------------------------


def test_the_peer_draws_with_the_same_settings():
  import torch

  logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [0.0, 0.0, 3.0, 0.0]])
  options = dict(guidance=2.0, temperature=0, top_k=0, top_p=1.0)
  # 2 cond - null is [0, 6, 1, 2].
  assert peer_torch.draw(logits, options).tolist() == [[1]]
  logits = logits.repeat_interleave(200, dim=0)
  for limit in (dict(top_k=2), dict(top_p=0.9999)):
    drawn = peer_torch.draw(logits, options | dict(temperature=3.0) | limit)
    drawn = set(drawn[:, 0].tolist())
    assert drawn == ({1, 3} if "top_k" in limit else {0, 1, 2, 3})
  options |= dict(temperature=3.0, top_p=0.5)  # token 1 alone has 0.6
  assert set(peer_torch.draw(logits, options)[:, 0].tolist()) == {1}
