"""Config files: `configs/digits.py`, `configs/NAME.py:ARGUMENT`, or a name.

A config file is a Python file with `get_config()`, which returns a ConfigDict.
What follows a colon after its name is an argument of that function.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Mapping

from ml_collections import ConfigDict

from tensorar_jax.experiment.parse import parse
from tensorar_jax.experiment.schema import Experiment

FOLDER = pathlib.Path("configs")


def load(
  path_or_name: str, overrides: Mapping[str, str] | None = None
) -> Experiment:
  """Reads and checks the experiment of a config file.

  Args:
    path_or_name: a file, or the name of one of configs/, with `:ARGUMENT` after
      it if its get_config() takes one.
    overrides: values as written on the command line, by dotted name, such as
      {"noise.schedule_start": "1", "stages.base.train.num_steps": "10"}.

  Raises:
    ValueError: no such config, key or type of value; it says what there is.
  """
  name, colon, argument = path_or_name.partition(":")
  path = find(name)
  config = read(path, argument if colon else None)
  return parse(config, overrides, path.stem)


def find(name: str) -> pathlib.Path:
  """Finds the file of a path, or of the name of a file in configs/."""
  for path in (pathlib.Path(name), FOLDER / name, FOLDER / f"{name}.py"):
    if path.is_file():
      return path
  parent = pathlib.Path(name).parent
  has_folder = parent != pathlib.Path() and parent.is_dir()
  folder = parent if has_folder else FOLDER
  known = {
    path.stem: str(path)
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")])
    # Configs say how to run them; files that they share do not.
    if "--config=" in path.read_text(errors="ignore")
  }
  close = difflib.get_close_matches(pathlib.Path(name).stem, known, n=1)
  hint = f" Did you mean {known[close[0]]}?" if close else ""
  listed = ", ".join(known.values()) or f"none; {folder}/ has no configs"
  raise ValueError(f"--config={name}: no such file.{hint} There are: {listed}.")


def read(path: pathlib.Path, argument: str | None = None) -> ConfigDict:
  """Calls `get_config()` of a file, with `argument` if there is one."""
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"--config={path}: expected a Python file, NAME.py.")
  module = importlib.util.module_from_spec(spec)
  root = str(pathlib.Path.cwd())
  if root not in sys.path:  # for `from configs import digits`
    sys.path.insert(0, root)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"--config={path}: the file has no get_config().")
  arguments = () if argument is None else (argument,)
  signature = inspect.signature(module.get_config)
  try:
    signature.bind(*arguments)
  except TypeError as error:
    given = "nothing" if argument is None else repr(argument)
    expected = ", ".join(signature.parameters) or "nothing"
    raise ValueError(
      f"--config={path} with {given} after a colon: expected {expected}."
    ) from error
  return module.get_config(*arguments)
