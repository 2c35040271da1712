"""Families by name: the modules of `backbones/` and `tokenizers/`.

A new file there is known at once. This is the only file that reaches one.
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
  """The module `tensorar_jax.<kind>.<name>`; kind is a package's name."""
  package = importlib.import_module(f"tensorar_jax.{kind}")
  known = {m.name: m.name for m in pkgutil.iter_modules(package.__path__)}
  choose(kind.removesuffix("s"), name, known)
  return importlib.import_module(f"tensorar_jax.{kind}.{name}")


def base_of(module: ModuleType, variant: str | None, where: str) -> Any:
  """The Config of a published size; of None, Config with its defaults."""
  if variant is None:
    return module.Config()
  return choose(f"{where}: variant", variant, module.VARIANTS)


def config_of(
  module: ModuleType, variant: str | None, fields: Mapping, where: str
) -> Any:
  """A family's Config: a published size, or its defaults, and what differs."""
  base = base_of(module, variant, where)
  return values.make(module.Config, {**vars(base), **fields}, where)
