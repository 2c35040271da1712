"""The GPU check on a CPU: what it plans, what it keeps, and that it ends."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from launch import gpu_check, gpu_report
from tensorar_jax.performance import benchmark, machine

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def tiny(monkeypatch):
  """Limits that take no time to measure."""
  monkeypatch.setattr(machine, "MATMUL", {"cpu": 64})
  monkeypatch.setattr(machine, "READ_BYTES", 2**20)
  monkeypatch.setattr(machine, "LIMIT_SECONDS", 0.0)
  monkeypatch.setattr(machine, "RUN_SECONDS", 0.0)


@pytest.mark.parametrize("part", ["speed", "more"])
@pytest.mark.parametrize("is_tiny", [False, True])
def test_every_group_can_be_planned(part, is_tiny):
  found = gpu_check.groups(part, is_tiny)
  assert len({group.name for group in found}) == len(found)
  for group in found:
    settings = benchmark.Settings(**{"windows": (1, 4), **group.settings})
    assert benchmark.plan(settings, (4, 1), train_batch=2)


def test_the_first_groups_are_worth_most():
  names = [group.name for group in gpu_check.groups("speed", tiny=False)]
  assert names[:2] == ["decode 128 bfloat16", "decode 1 bfloat16"]
  assert names.index("peer 128 bfloat16") < names.index("train B 128")


def test_the_parity_tests_are_where_the_check_looks_for_them():
  tests = gpu_check.PARITY_TESTS
  assert [path for path in tests if not (ROOT / path).exists()] == []
  # Those that no GPU has passed come before the folder of all families.
  assert tests.index("tests/backbones") == len(tests) - 1


def test_what_is_measured_is_kept_and_not_measured_again(
  tiny, tmp_path, monkeypatch
):
  one = gpu_check.decode("float32", 1, windows=(1,))
  bad = gpu_check.Group("bad", "no such model", "float32", {})
  monkeypatch.setattr(gpu_check, "groups", lambda part, tiny: [bad, one])
  results = gpu_check.Results(tmp_path)
  options = gpu_check.Options("speed", output=str(tmp_path), tiny=True)
  late = time.monotonic() + 1000
  gpu_check.run_groups(options, results, late)
  assert results.done() == {one.name}
  page = gpu_report.write(tmp_path)
  summary = json.loads((tmp_path / "summary.json").read_text())
  (case,) = summary["cases"]
  assert case["precision"] == "float32" and case["ms_per_step"]["median"] > 0
  assert "| 1 | 1 | float32 | tensorar_jax |" in page
  (error,) = summary["errors"]  # of one group; the next went on
  assert error["group"] == "bad" and "no such model" in error["error"]
  before = len(gpu_report.read(tmp_path / gpu_report.RESULTS))
  monkeypatch.setattr(gpu_check, "groups", lambda part, tiny: [one])
  gpu_check.run_groups(options, results, late)
  assert len(gpu_report.read(tmp_path / gpu_report.RESULTS)) == before
  # Nothing begins when the time is over.
  other = gpu_check.decode("float32", 2)
  monkeypatch.setattr(gpu_check, "groups", lambda part, tiny: [other])
  gpu_check.run_groups(options, results, time.monotonic() - 1)
  assert len(gpu_report.read(tmp_path / gpu_report.RESULTS)) == before


def test_parity_is_counted_from_a_log_that_ends_anywhere():
  log = """
[gw0] [ 10%] PASSED tests/backbones/a_test.py::test_one[2 x 3]
tests/backbones/a_test.py::test_two
[gw1] [ 20%] FAILED tests/backbones/a_test.py::test_two
[gw1] [ 30%] SKIPPED tests/tokenizers/b_test.py::test_three
FAILED tests/backbones/a_test.py::test_two - AssertionError
[gw0] [ 40%] PASS"""
  first, second = gpu_check.parity_rows(log)
  assert (first["passed"], first["failed"], first["skipped"]) == (1, 1, 0)
  assert first["failures"] == ["test_two"]
  assert (second["passed"], second["skipped"]) == (0, 1)


def test_the_newest_line_counts_and_a_torn_one_does_not(tmp_path):
  results = gpu_check.Results(tmp_path)
  results.add("check", name="losses", passed=0, failed=1)
  results.add("check", name="losses", passed=1, failed=0)
  path = tmp_path / gpu_report.RESULTS
  path.write_text(path.read_text() + '{"line": "check", "name": "to')
  (check,) = gpu_report.summarise(gpu_report.read(path))["checks"]
  assert (check["passed"], check["failed"]) == (1, 0)


def test_the_page_shows_what_is_committed(tmp_path):
  text = gpu_report.PAGE.read_text()
  assert text == gpu_report.page(text)
  empty = f"Words.\n\n{gpu_report.BEGIN}\nOld.\n{gpu_report.END}\n\nMore.\n"
  found = gpu_report.page(empty, tmp_path)
  assert "Not measured yet." in found and "Old." not in found
  assert found.startswith("Words.\n") and found.endswith("\n\nMore.\n")
  case = dict(kind="decode", batch=128, window=4, precision="float32")
  case |= dict(program="ours", images_per_second={"median": 50.0})
  case |= dict(ms_per_step={"median": 10.0}, mfu={"median": 0.125})
  about = dict(card="NVIDIA H100", versions={"jax": "0.11.2", "torch": None})
  lines = dict.fromkeys(("ratios", "checks", "profiles", "errors"), [])
  summary = dict(about=about, cases=[case], **lines)
  (tmp_path / "h100.json").write_text(json.dumps(summary))
  run = dict(card="H100", batch=1, window=4, precision="bfloat16")
  run |= dict(command_buffers="default", tokens_equal=1.0)
  run |= dict(ms_a_step={"stacked": 0.5, "single": 0.25})
  (tmp_path / "h100_single_layers.jsonl").write_text(json.dumps(run) + "\n")
  found = gpu_report.page(empty, tmp_path)
  assert "### h100\n\nNVIDIA H100, jax 0.11.2\n" in found
  assert "| 1 | 4 | bfloat16 | default | 0.5 | 0.25 | 100% |" in found
  # 0.12 s an image in the paper, 0.02 s here.
  assert (
    "| 128 | 4 | float32 | ours | 0.02 | 50 | 10 | 6.0 x | 12.5% |" in found
  )


def run(folder, *options):
  """The script's own console, tiny and on the CPU."""
  env = {**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
  command = ["launch/gpu_check.sh", f"--output={folder}", "--tiny", *options]
  done = subprocess.run(
    command, cwd=ROOT, env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_a_part_is_stopped_and_the_summary_is_written(tmp_path):
  console = run(tmp_path, "--parts=speed", "--seconds=1", "--nopeer")
  assert "speed: stopped, code" in console
  assert "# GPU check" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path, parity):
  run(tmp_path, "--seconds=600", f"--cache={tmp_path / 'cache'}")
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["errors"] == []
  assert not any("error" in case for case in summary["cases"])
  assert {case["kind"] for case in summary["cases"]} == {
    "decode",
    "tokenizer",
    "train",
  }
  assert any(case["program"] == "torch eager" for case in summary["cases"])
  checks = {check["name"]: check for check in summary["checks"]}
  parity = "parity tests/training/optimizer_test.py"
  assert {"tokens of base, drafts included", parity} <= {*checks}
  assert all(c["passed"] and not c["failed"] for c in checks.values())
  assert [p["group"] for p in summary["profiles"]] == [
    "kernels of decode 2",
    "kernels of train B",
  ]
