"""What `import tensorar_jax` offers: made on first use, seen by editors."""

import ast
import pathlib

import pytest

import tensorar_jax as tj


def test_every_public_name_is_there():
  homes = {name: getattr(tj, name).__module__ for name in tj.__all__}
  assert homes == {n: f"tensorar_jax.{home}" for n, home in tj._HOMES.items()}
  assert dir(tj) == tj.__all__
  with pytest.raises(AttributeError, match="no attribute 'lod'"):
    tj.lod  # noqa: B018


def test_type_checkers_see_the_same_names():
  tree = ast.parse(pathlib.Path(tj.__file__).read_text())
  (block,) = [node for node in tree.body if isinstance(node, ast.If)]
  seen = {
    alias.name: line.module for line in block.body for alias in line.names
  }
  assert seen == {n: f"tensorar_jax.{home}" for n, home in tj._HOMES.items()}
