"""Converts plain values, and texts of the command line, to a field's type."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import functools
import types
import typing
from typing import Any

import numpy as np

from tensorar_jax import paths
from tensorar_jax.experiment.schema import choose

NAMES = {  # one of a type, and many
  bool: ("True or False", "True or False"),
  int: ("a whole number", "whole numbers"),
  float: ("a number", "numbers"),
  str: ("a text", "texts"),
  dict: ("a dict", "dicts"),
  type(None): ("None", "None"),
}


class Text(str):
  """A value as written on the command line, to be read as its field's type."""


@functools.cache
def fields(cls: type) -> dict[str, Any]:
  """Returns the type of each field of a dataclass, marks of paths included."""
  hints = typing.get_type_hints(cls, include_extras=True)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def make(cls: type, given: collections.abc.Mapping, where: str) -> Any:
  """Makes cls(**given), every key and type checked; `where` is for messages."""
  kinds = fields(cls)
  values = {
    key: convert(
      value, kind=choose(f"{where}: key", key, kinds), where=f"{where}.{key}"
    )
    for key, value in given.items()
  }
  return cls(**values)


def convert(value: Any, kind: Any, where: str) -> Any:
  """Converts `value` to the type `kind`.

  A `Text` is read first: `None`, `true`, numbers and tuples as Python writes
  them; where a text is expected, the text itself; where a tuple of any length
  is expected, one value stands for a tuple of it. Whole numbers pass for
  numbers, lists for tuples. A path is expanded as `paths` says.

  Raises:
    ValueError: it is none of that type; it says what was expected `where`.
  """
  given, (kind, rule) = value, paths.unmark(kind)
  value = _read(value, kind) if isinstance(value, Text) else value
  try:
    value = _fit(_plain(value), kind)
  except TypeError as error:
    raise ValueError(f"{where}={given!r}: expected {words(kind)}.") from error
  if rule and value:  # "" and None are no paths
    try:
      return rule(value)
    except ValueError as error:
      raise ValueError(f"{where}: {error}.") from error
  return value


def words(kind: Any, many: bool = False) -> str:
  """Describes the values of a type, for messages."""
  kind, _ = paths.unmark(kind)
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if kind in NAMES:
    return NAMES[kind][many]
  if _is_union(kind):
    return " or ".join(dict.fromkeys(words(one, many) for one in args))
  if origin is tuple and Ellipsis not in args:
    return f"({', '.join(map(words, args))})"
  if origin is not None:
    return f"{'tuples' if many else 'a tuple'} of {words(args[0], many=True)}"
  return getattr(kind, "__name__", str(kind))


def _is_union(kind) -> bool:
  return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _read(text: Text, kind: Any) -> Any:
  """Returns the value that a text of the command line stands for."""
  kinds = typing.get_args(kind) if _is_union(kind) else (kind,)
  written = str(text)
  if written == "None" and type(None) in kinds:
    return None
  if str in kinds and not (len(kinds) > 1 and written[:1] in ("(", "[")):
    return written
  if bool in kinds and written.lower() in ("true", "false"):
    return written.lower() == "true"
  try:
    value = ast.literal_eval(written)
  except (ValueError, SyntaxError):
    value = written
  many = typing.get_origin(kind) is tuple and Ellipsis in typing.get_args(kind)
  return (value,) if many and not isinstance(value, list | tuple) else value


def _fit(value: Any, kind: Any) -> Any:
  """Returns a plain value as a type, or raises TypeError."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if kind is Any:
    return value
  if _is_union(kind):
    # An exact type first: 0 of `float | int` stays a whole number.
    for one in sorted(args, key=lambda one: type(value) is not one):
      try:
        return _fit(value, one)
      except TypeError:
        pass
    raise TypeError
  if kind is float:
    if isinstance(value, int | float) and not isinstance(value, bool):
      return float(value)
    raise TypeError
  if origin in (tuple, collections.abc.Sequence):
    if not isinstance(value, tuple):
      raise TypeError
    if origin is tuple and Ellipsis not in args:
      if len(args) != len(value):
        raise TypeError
      return tuple(map(_fit, value, args))
    return tuple(_fit(one, args[0]) for one in value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise TypeError
  return value


def _plain(value: Any) -> Any:
  """Turns NumPy's numbers and arrays, and lists, into numbers and tuples."""
  if isinstance(value, np.ndarray | np.generic):
    value = value.tolist()
  return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
