"""Paths that users write: flags, values of a config, names in data files.

`~` is expanded, and a URL is refused where no file of that kind can be read or
written, before anything is done. A field says which paths it takes by its type:
`LocalPath`, `PublishedPath` or `DataName` in place of `str`.
"""

from __future__ import annotations

import functools
import operator
import os
import pathlib
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
Rule = Callable[[str], str]  # raises ValueError, in words


def local(text: str) -> str:
  """Returns a path of this machine, `~` expanded; ValueError for a URL."""
  if scheme := _SCHEME.match(text):
    remedy = "mount the bucket, or copy the files, and give that path"
    if scheme[1] == "file":
      remedy = "give the path itself, from its / on"
    elif scheme[1] == "hf":
      remedy = "published weights are named by --init or a stage's `source`"
    raise ValueError(
      f"{text!r} is a URL, and {scheme[1]}:// is neither read nor written"
      f" here; expected a path on a disk of this machine: {remedy}"
    )
  expanded = os.path.expanduser(text)
  if text.startswith("~") and expanded == text:
    raise ValueError(
      f"{text!r}: the home folder of {text.split('/')[0]} is not known;"
      f" expected a path without ~, or ./{text} for a folder of that name"
    )
  return expanded


def published(text: str) -> str:
  """As `local`, but names on the hub, hf://OWNER/REPOSITORY, stay."""
  return text if text.startswith("hf:/") else local(text)


def data(text: str) -> str:
  """As `local`, of the place in KIND:PLACE, the name of a data set."""
  kind, colon, place = text.partition(":")
  if place.startswith("//"):
    raise ValueError(
      f"{text!r} is a URL, which is not read here; expected KIND:PLACE with a"
      " path on a disk of this machine, such as folder:/data/images: mount the"
      " bucket, or copy the files"
    )
  return f"{kind}{colon}{local(place)}"


LocalPath = Annotated[str, local]
PublishedPath = Annotated[str, published]
DataName = Annotated[str, data]


def unmark(hint: Any) -> tuple[Any, Rule | None]:
  """Splits a type into that without marks, and the rule of its paths."""
  if typing.get_origin(hint) is Annotated:
    kind, rule = typing.get_args(hint)
    return kind, rule
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    kinds, rules = zip(*map(unmark, typing.get_args(hint)))
    rule = next(filter(None, rules), None)
    return functools.reduce(operator.or_, kinds), rule
  return hint, None


def check_inside(folder: pathlib.Path, name: str, where: str) -> None:
  """Raises ValueError if a name in a data file leads out of its folder.

  Args:
    folder: that all the names of the file are relative to.
    name: as it is written.
    where: what names it, for messages.
  """
  if ".." not in name and not os.path.isabs(name):
    return  # nearly always
  # What .. means after a link is known to the disk alone.
  whole = os.path.realpath if ".." in name.split("/") else os.path.abspath
  if not pathlib.Path(whole(folder / name)).is_relative_to(whole(folder)):
    raise ValueError(
      f"{where} names {name!r}, which is not inside {folder}: expected a path"
      " relative to that folder. Correct it, or copy the file into the folder."
    )
