"""Two processes train as one does, and one takes over what two began."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tensorar_jax.parallel import preemption
from tests.e2e import commands

STEPS = 4


def start(workdir, devices, *flags, processes=1, mode="train"):
  """The command line in processes of its own with so many devices each."""
  count = f"--xla_force_host_platform_device_count={devices}"
  command = [
    "launch/local.sh",
    f"--processes={processes}",
    "tests/e2e/tiny_digits.py",
    f"--mode={mode}",
    "--stage=base",
    f"--workdir={workdir}",
    *flags,
  ]
  return subprocess.Popen(
    command,
    cwd=commands.ROOT,
    env={**os.environ, "XLA_FLAGS": count, "PYTHON": sys.executable},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process, code: int = 0) -> tuple[str, str]:
  """Waits until all exit with the code: (what the first prints, the second)."""
  try:
    text = process.communicate(timeout=300)[0]
  finally:
    process.terminate()
  assert process.returncode == code, text[-3000:]
  lines = text.splitlines()
  second = [line for line in lines if line.startswith("[1] ")]
  return "\n".join(line for line in lines if line not in second), "\n".join(
    second
  )


def two(workdir, *flags, mode="train") -> tuple[str, str]:
  """Two processes of two devices each."""
  return finish(start(workdir, 2, *flags, processes=2, mode=mode))


def losses(workdir) -> list[dict]:
  lines = (workdir / "base" / "log.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def assert_same(rows, expected):
  assert [row["step"] for row in rows] == [row["step"] for row in expected]
  for row, want in zip(rows, expected, strict=True):
    for name in want:
      assert row[name] == pytest.approx(want[name], rel=1e-5), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A work directory that one process with one device has trained."""
  workdir = tmp_path_factory.mktemp("one")
  finish(start(workdir, 1))
  return workdir


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
  """(the same of two processes, what they printed)."""
  workdir = tmp_path_factory.mktemp("two")
  return workdir, two(workdir, "--config.mesh.fsdp=2")


def test_two_processes_compute_what_one_does(straight, shared):
  workdir, (first, second) = shared
  assert_same(losses(workdir), losses(straight))
  assert len(losses(workdir)) == STEPS
  # Only the first one reports.
  assert "4/4" in first and "4/4" not in second
  assert len(list((workdir / "base" / "tensorboard").iterdir())) == 1


def test_one_process_continues_what_two_began(straight, shared, tmp_path):
  """Another mesh as well; losses see the data, which must be the same."""
  shutil.copytree(shared[0] / "base", tmp_path / "base")
  shutil.rmtree(tmp_path / "base" / "checkpoints" / "4")
  text, _ = finish(start(tmp_path, 2, "--config.mesh.tensor=2"))
  assert "continues from step 2" in text
  assert "'tensor': 2" in text
  assert_same(losses(tmp_path), losses(straight))


def test_processes_of_other_configs_are_told_which_differs(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  together = [
    subprocess.Popen(
      commands.words(
        "--config=tests/e2e/tiny_digits.py",
        "--mode=train",
        f"--workdir={tmp_path}",
        f"--coordinator=127.0.0.1:{port}",
        "--num_processes=2",
        f"--process_id={index}",
        f"--config.seed={index}",
        f"--config.optim.learning_rate={0.003 + index / 2}",
      ),
      cwd=commands.ROOT,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in (0, 1)
  ]
  for process in together:
    text = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and "process 1 of 2 has another" in text
    assert "base.seed: 0 in process 0, 1 in process 1" in text
    assert "optim.learning_rate: 0.003 in process 0, 0.503 in" in text
  assert list(tmp_path.iterdir()) == []


def pid_of(index, workdir) -> int:
  """The process that local.sh started as number `index`."""
  wanted = f"--process_id={index}", f"--workdir={workdir}"
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    words = path.read_bytes().decode().split("\0")
    if set(wanted) <= set(words) and "tensorar_jax.main" in words:
      return int(path.parent.name)
  raise AssertionError(f"no process {wanted}")


def test_sigterm_to_one_of_two_processes_stops_both_after_one_step(tmp_path):
  flags = (
    "--config.train.checkpoint_every=100000",
    "--config.stages.base.train.num_steps=100000",
  )
  process = start(tmp_path, 2, *flags, processes=2)
  log, deadline = tmp_path / "base" / "log.jsonl", time.monotonic() + 300
  while not (log.exists() and log.stat().st_size):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.05)
  os.kill(pid_of(1, tmp_path), signal.SIGTERM)
  first, _ = finish(process, code=preemption.EXIT_CODE)
  assert "exits with 75; the same command continues" in first
  (step,) = (path.name for path in (tmp_path / "base/checkpoints").iterdir())
  # A step that only one of them had taken would not have been saved.
  assert losses(tmp_path)[-1]["step"] == int(step)


def test_two_processes_sample_what_one_does(straight, tmp_path):
  flags = ["--num_images=7", "--classes=3,5"]
  two(straight, *flags, f"--output={tmp_path / 'two'}", mode="sample")
  finish(
    start(straight, 1, *flags, f"--output={tmp_path / 'one'}", mode="sample")
  )
  got, want = (np.load(tmp_path / n / "samples.npz") for n in ("two", "one"))
  np.testing.assert_array_equal(got["arr_0"], want["arr_0"])
  np.testing.assert_array_equal(got["arr_1"], want["arr_1"])


def test_other_modes_are_for_one_process(straight):
  process = start(straight, 1, processes=2, mode="evaluate")
  text = process.communicate(timeout=120)[0]
  assert process.returncode == 1 and "2 processes: expected train" in text
