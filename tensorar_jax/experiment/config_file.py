"""Config files: `configs/digits.py`, `configs/NAME.py:ARGUMENT`, or a name.

A config file is a Python file with `get_config()`, which returns a ConfigDict.
What follows a colon after its name is an argument of that function. Names and
`configs/NAME.py` are looked up in the working directory, then among the configs
of this project: they are found from any directory.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from tensorar_jax.experiment.parse import parse
from tensorar_jax.experiment.schema import Experiment

FOLDER = pathlib.Path("configs")
_PACKAGE = pathlib.Path(__file__).parents[1]
# A wheel has the project's configs inside the package, a clone beside it.
_PROJECT = _PACKAGE if (_PACKAGE / FOLDER).is_dir() else _PACKAGE.parent


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
  inside = (FOLDER / name, FOLDER / f"{name}.py")
  ours = [_PROJECT / path for path in inside]
  if pathlib.Path(name).parts[:1] == FOLDER.parts:
    ours.append(_PROJECT / name)
  for path in (pathlib.Path(name), *inside, *ours):
    if path.is_file():
      return path
  parent = pathlib.Path(name).parent
  alone = parent in (pathlib.Path(), FOLDER) or not parent.is_dir()
  known = _known(_PROJECT / FOLDER, FOLDER) | _known(FOLDER, FOLDER)
  if not alone:
    known = _known(parent, parent) or known
  close = difflib.get_close_matches(pathlib.Path(name).stem, known, n=1)
  hint = f" Did you mean {known[close[0]]}?" if close else ""
  there = ", ".join(known.values())
  raise ValueError(f"--config={name}: no such file.{hint} There are: {there}.")


def _known(folder: pathlib.Path, shown: pathlib.Path) -> dict[str, str]:
  """The configs of a folder by name, each with its path below `shown`."""
  return {
    path.stem: str(shown / path.relative_to(folder))
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")])
    # Configs say how to run them; files that they share do not.
    if "--config=" in path.read_text(errors="ignore")
  }


def read(path: pathlib.Path, argument: str | None = None) -> ConfigDict:
  """Calls `get_config()` of a file, with `argument` if there is one."""
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"--config={path}: expected a Python file, NAME.py.")
  module = importlib.util.module_from_spec(spec)
  with _configs_are_importable(path), _wrong_keys_have_lines(path):
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


@contextlib.contextmanager
def _wrong_keys_have_lines(path: pathlib.Path) -> Iterator[None]:
  """Turns ConfigDict's error about a key into a ValueError with its line.

  Its own text is that of an error inside an error, with every quote escaped.
  """
  try:
    yield
  except (AttributeError, KeyError, TypeError) as error:
    frames = traceback.extract_tb(error.__traceback__)
    if "ml_collections" not in pathlib.Path(frames[-1].filename).parts:
      raise
    inner: Any = error
    while isinstance(inner, Exception) and inner.args:
      inner = inner.args[0]
    lines = [f.lineno for f in frames if pathlib.Path(f.filename) == path]
    where = f", line {lines[-1]}" if lines else ""
    raise ValueError(
      f"--config={path}{where}: no such key: {' '.join(str(inner).split())}"
    ) from error


@contextlib.contextmanager
def _configs_are_importable(path: pathlib.Path) -> Iterator[None]:
  """Gives `from configs import digits` in a file a meaning from any directory.

  For that time `configs` is a package of the files in the working directory's
  configs/ and in this project's; the folder with the file comes first. Whatever
  else has that name, such as an installed package, is put back.
  """
  root = str(pathlib.Path.cwd())
  if root not in sys.path:  # for other modules of the user
    sys.path.insert(0, root)
  folders = [FOLDER.absolute(), (_PROJECT / FOLDER).absolute()]
  if path.absolute().is_relative_to(folders[1]):
    folders.reverse()
  others = _take_away_configs()
  package = types.ModuleType("configs")
  package.__path__ = [str(folder) for folder in folders]
  sys.modules["configs"] = package
  try:
    yield
  finally:
    _take_away_configs()
    sys.modules.update(others)


def _take_away_configs() -> dict[str, types.ModuleType]:
  """Removes `configs` from the imported modules, and returns what it was."""
  names = [n for n in sys.modules if n == "configs" or n.startswith("configs.")]
  return {name: sys.modules.pop(name) for name in names}
