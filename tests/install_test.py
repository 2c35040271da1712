"""notebooks/install.sh with stand-ins for all packages: what is there stays."""

import os
import pathlib
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Within the ranges of this project and older than what the index has.
THERE = {
  "jax": "0.11.1",
  "jaxlib": "0.11.1",
  "jax_cuda12_plugin": "0.11.1",
  "jax-cuda12-pjrt": "0.11.1",
  "nvidia_cudnn_cu12": "9.10.2.21",
  "numpy": "2.1.3",
  "torch": "2.9.0+cu126",
  "tensorflow": "2.19.0",
}
STALE = {"optax": "0.2.4"}  # below the range: this is to be replaced
INDEX = {
  "jax": "0.12.9",
  "jaxlib": "0.12.9",
  "jax_cuda12_plugin": "0.12.9",
  "numpy": "2.9.0",
  "torch": "2.99.0",
  "tensorflow": "2.99.0",
}


def wheel(folder: pathlib.Path, name: str, version: str, needs=()) -> str:
  """An empty package of that name; its file."""
  stem = f"{name.replace('-', '_')}-{version}"
  info = f"{stem}.dist-info"
  metadata = [
    *("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"),
    *(f"Requires-Dist: {need}" for need in needs),
    *(f"Provides-Extra: {e}" for e in PROJECT["optional-dependencies"]),
  ]
  path = folder / f"{stem}-py3-none-any.whl"
  with zipfile.ZipFile(path, "w") as file:
    file.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    file.writestr(f"{info}/WHEEL", tags)
    file.writestr(f"{info}/RECORD", "")
  return str(path)


def some_version(requirement: Requirement) -> str:
  """A version that a requirement allows: its lower bound."""
  (least,) = [s.version for s in requirement.specifier if s.operator == ">="]
  return least


@pytest.fixture
def machine(tmp_path):
  """A virtual environment with stand-ins, and an index that has newer ones."""
  index = tmp_path / "index"
  index.mkdir()
  needs = [*PROJECT["dependencies"]]
  needs += [
    f"{need}; extra == 'torch'"
    for need in PROJECT["optional-dependencies"]["torch"]
  ]
  project = wheel(tmp_path, "tensorar_jax", "9.9.9", needs)
  for requirement in map(Requirement, PROJECT["dependencies"]):
    if requirement.name not in INDEX:
      wheel(index, requirement.name, some_version(requirement))
  for name, version in INDEX.items():
    needs = [f"jaxlib=={version}"] if name == "jax" else []
    wheel(index, name, version, needs)
  venv = tmp_path / "venv"
  subprocess.run([sys.executable, "-m", "venv", venv], check=True)
  environment = {
    **{k: v for k, v in os.environ.items() if not k.startswith("PIP_")},
    "PATH": f"{venv}/bin:{os.environ['PATH']}",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": str(index),
  }

  def run(*words, code=0) -> str:
    done = subprocess.run(
      words, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr

  def there() -> dict[str, str]:
    lines = run("python", "-m", "pip", "list", "--format=freeze").split()
    return dict(line.split("==") for line in lines if "==" in line)

  def put(packages: dict[str, str]) -> None:
    wheels = [wheel(tmp_path, *package) for package in packages.items()]
    run("python", "-m", "pip", "install", "-q", "--no-deps", *wheels)

  return run, there, put, project


def test_what_is_there_stays_and_the_rest_is_added(machine):
  run, there, put, project = machine
  put({**THERE, **STALE})
  run(str(ROOT / "notebooks" / "install.sh"), f"{project}[torch]")
  after = there()
  assert {name: after[name] for name in THERE} == THERE
  assert after["optax"] == "0.2.8" and "flax" in after
  assert after["tensorar_jax"] == "9.9.9"


def test_a_jax_that_is_too_old_is_an_error_and_stays(machine):
  run, there, put, project = machine
  put({"jax": "0.7.2", "jaxlib": "0.7.2"})
  said = run(str(ROOT / "notebooks" / "install.sh"), project, code=1)
  assert "conflicting dependencies" in said and "\njax==0.7.2\n" in said
  assert there()["jax"] == "0.7.2" and "flax" not in there()
