"""Locks: one holder at a time, whoever dies, and who it is."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from tensorar_jax.checkpoints import locks

ROOT = pathlib.Path(__file__).parents[2]


def start(code: str, *args) -> subprocess.Popen:
  command = [sys.executable, "-c", code, *map(str, args)]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_lock_is_held_by_one_and_leaves_no_file(tmp_path):
  path = tmp_path / "new"
  with locks.lock(path) as mine:
    assert mine
    with locks.lock(path, wait=False) as too:
      assert not too
    assert locks.owner(path).startswith(
      f"process {os.getpid()} on host {socket.gethostname()}, since 20"
    )
  assert not path.exists()
  with locks.lock(path, wait=False) as again:
    assert again
  with pytest.raises(BlockingIOError, match="of the body"), locks.lock(path):
    raise BlockingIOError("of the body")
  assert list(tmp_path.iterdir()) == []


# Eight processes take the lock, and make a file that only one may make.
RACE = """
import os, pathlib, sys
from tensorar_jax.checkpoints import locks
folder, wait = pathlib.Path(sys.argv[1]), sys.argv[2] == "wait"
children = []
for child in range(8):
  if not (pid := os.fork()):
    held = 0
    while held < 50:
      with locks.lock(folder / "lock", wait) as mine:
        if mine:
          os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))
          held += 1
          os.unlink(folder / "alone")
    os._exit(0)
  children.append(pid)
sys.exit(max(os.waitpid(pid, 0)[1] for pid in children))
"""


@pytest.mark.parametrize("wait", ["wait", "no wait"])
def test_no_two_processes_hold_a_lock(tmp_path, wait):
  assert start(RACE, tmp_path, wait).wait(timeout=100) == 0
  assert list(tmp_path.iterdir()) == []


HOLD = """
import pathlib, sys, time
from tensorar_jax.checkpoints import files, locks
folder = pathlib.Path(sys.argv[1])
with locks.lock(folder / "lock"), files.replacing(folder / "a.txt") as partial:
  partial.write_text("half")
  print("held", flush=True)
  time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
  """A process that holds `lock` and writes `a.txt`."""
  process = start(HOLD, tmp_path)
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def test_a_lock_dies_with_its_owner(tmp_path, holder):
  path = tmp_path / "lock"
  with locks.lock(path, wait=False) as mine:
    assert not mine
  assert f"process {holder.pid} on host" in locks.owner(path)
  os.kill(holder.pid, signal.SIGKILL)
  holder.wait()
  assert path.exists()
  with locks.lock(path, wait=False) as mine:
    assert mine and f"process {os.getpid()} on" in locks.owner(path)
  assert not path.exists()


def test_leftovers_are_those_of_the_dead(tmp_path, holder):
  from tensorar_jax.checkpoints import files

  old = [tmp_path / f".{'0a' * 16}.png", tmp_path / "b.npy.partial"]
  kept = [tmp_path / "c.png", tmp_path / ".hidden.png"]
  for path in old + kept:
    path.write_text("x")
  files.remove_leftovers(tmp_path.iterdir())
  (writing,) = tmp_path.glob("a.txt.*.partial")
  assert {*tmp_path.iterdir()} == {*kept, writing, tmp_path / "lock"}
  os.kill(holder.pid, signal.SIGKILL)
  holder.wait()
  files.remove_leftovers(tmp_path.iterdir())
  assert {*tmp_path.iterdir()} == {*kept, tmp_path / "lock"}


def test_without_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
  def unsupported(*_):
    raise OSError(locks.errno.ENOLCK, "No locks available")

  monkeypatch.setattr(locks.fcntl, "flock", unsupported)
  leftover = tmp_path / "a.partial"
  leftover.touch()
  with locks.lock(tmp_path / "lock", wait=False) as mine:
    assert mine
  assert "this file system has no locks" in caplog.text
  locks.remove_if_free(leftover)  # it may be somebody's
  assert leftover.exists()
