"""Families by name: the modules of `backbones/` and `tokenizers/`.

A new file there is known at once. No other file imports one by its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from tensorar_jax.experiment import values
from tensorar_jax.experiment.schema import choose


def family(kind: str, name: str) -> ModuleType:
  """Imports `tensorar_jax.<kind>.<name>`.

  Args:
    kind: "backbones" or "tokenizers".
    name: of the module.

  Raises:
    ValueError: there is no such module; it lists those that there are.
  """
  package = importlib.import_module(f"tensorar_jax.{kind}")
  known = [module.name for module in pkgutil.iter_modules(package.__path__)]
  choose(kind.removesuffix("s"), name, known)
  return importlib.import_module(f"tensorar_jax.{kind}.{name}")


def base_of(module: ModuleType, variant: str | None, where: str) -> Any:
  """Returns the Config of a published size; None: that of the defaults."""
  if variant is None:
    return module.Config()
  return choose(f"{where}: variant", variant, module.VARIANTS)


def config_of(
  module: ModuleType, variant: str | None, fields: Mapping, where: str
) -> Any:
  """Makes a family's Config: `fields` on top of a size, or of the defaults."""
  base = base_of(module, variant, where)
  return values.make(module.Config, {**vars(base), **fields}, where)
