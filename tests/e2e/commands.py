"""The command line in processes of its own, from the root of the project."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def words(*flags: str) -> list[str]:
  """Returns a command line that `run` or `subprocess` starts in ROOT."""
  return [sys.executable, "-m", "tensorar_jax.main", *flags]


def run(*flags: str) -> subprocess.CompletedProcess:
  """Runs a command line to its end, with what it prints as text."""
  return subprocess.run(words(*flags), cwd=ROOT, capture_output=True, text=True)


def succeed(*flags: str) -> subprocess.CompletedProcess:
  """Runs a command line that must end well."""
  done = run(*flags)
  assert done.returncode == 0, done.stderr[-3000:]
  return done
