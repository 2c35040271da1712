"""The options of a mode: a frozen dataclass whose every field is a flag.

  @dataclasses.dataclass(frozen=True)
  class Train(Shared):
    stage: str | None = option(None, "The only stage to train. Default: all.")

A field's annotation says what its flag takes: `int`, `float`, `str` or `bool`,
and a tuple of these for a list; a path is a `LocalPath` or another type of
`paths`. The docstring of the class begins with what the mode does, and is the
head of its help page; that of a base class is the title of the flags it adds.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from typing import Any, ClassVar

from tensorar_jax import paths
from tensorar_jax.paths import LocalPath, PublishedPath


def option(
  default: Any,
  help: str,
  *,
  metavar: str | None = None,
  choices: tuple[str, ...] | None = None,
  least: int | None = None,
  repeat: bool = False,
  expected: str | None = None,
) -> Any:
  """Declares a field of a dataclass of options.

  Args:
    default: the value without the flag; the help page states it unless None.
    help: what the flag does; for a default of None, what happens without it.
    metavar: stands for the value on the help page, such as FILE.
    choices: the words that it may be.
    least: the smallest number that it may be.
    repeat: of a tuple: the flag gives one entry and may be repeated, in place
      of a list with commas.
    expected: what a value is, for the message about another one.
  """
  metadata = dict(
    help=help,
    metavar=metavar,
    choices=choices,
    least=least,
    repeat=repeat,
    expected=expected,
  )
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag as its field describes it.

  Attributes:
    name: without dashes.
    kind: str, int, float or bool; of a list, the kind of its entries.
    is_list: whether the value is a tuple.
    rule: of a path: checks and expands it, see `paths`.
    default: the value without the flag.
    help, metavar, choices, least, repeat, expected: as of `option`.
  """

  name: str
  kind: type
  is_list: bool
  rule: paths.Rule | None
  default: Any
  help: str
  metavar: str | None
  choices: tuple[str, ...] | None
  least: int | None
  repeat: bool
  expected: str | None


@dataclasses.dataclass(frozen=True)
class Shared:
  """Flags of every mode."""

  example: ClassVar[str]  # the flags of a command that shows the mode

  config: LocalPath | None = option(
    None,
    "The experiment: a file of configs/. What follows a colon is passed to its"
    " get_config, as in configs/llamagen_xl.py:384. --config.SECTION.KEY=VALUE"
    " changes a value of it.",
    metavar="FILE[:ARGUMENT]",
  )
  workdir: LocalPath | None = option(
    None,
    "Where everything is written, and looked for. Default: runs/NAME, after the"
    " config file.",
    metavar="FOLDER",
  )
  init: PublishedPath | None = option(
    None,
    "Weights that --stage, or without it the base model, starts from: a"
    " published file, hf://OWNER/REPOSITORY/FILE, or a checkpoint. hf:// alone:"
    " all published files of the config, by name. Give it to every command of a"
    " run. Default: as the config says.",
    metavar="WEIGHTS",
  )
  coordinator: str | None = option(
    None,
    "Makes this one of several processes: the HOST:PORT of process 0, the same"
    " in all, or auto to ask a TPU pod. Default: SLURM and Open MPI are asked;"
    " elsewhere one process works alone.",
    metavar="HOST:PORT",
  )
  num_processes: int | None = option(
    None, "With --coordinator=HOST:PORT: how many processes there are.", least=1
  )
  process_id: int | None = option(
    None,
    "With --coordinator=HOST:PORT: which process this is, from 0.",
    least=0,
  )
  debug: bool = option(
    False, "Whether to end an error with the whole traceback."
  )

  def needs_config(self) -> bool:
    """Says whether the mode reads an experiment."""
    return True

  def shares_work(self) -> bool:
    """Says whether several processes may carry the mode out together."""
    return False


@dataclasses.dataclass(frozen=True)
class Products:
  """How matrices are multiplied."""

  precision: str | None = option(
    None,
    "Sets backbone.dtype, and how JAX multiplies float32: exactly, or on GPUs"
    " in TF32. Default: the config's dtype; float32 on GPUs in TF32, on TPUs in"
    " bfloat16.",
    choices=("float32", "tensorfloat32", "bfloat16"),
  )


@functools.cache
def flags_of(options: type[Shared]) -> dict[str, Flag]:
  """Lists the flags of a mode by name: its own first, shared ones last."""
  return {
    name: flag for group in groups_of(options).values() for name, flag in group
  }


def groups_of(options: type) -> dict[str, list[tuple[str, Flag]]]:
  """Groups the flags of a mode by title, in the order of the help page.

  Each base class is a group, without the flags that the mode describes anew;
  the title of the mode's own flags is empty.
  """
  fields = {field.name: field for field in dataclasses.fields(options)}
  hints = typing.get_type_hints(options, include_extras=True)
  groups = {}
  for owner in options.__mro__[:-1]:
    names = [n for n in inspect.get_annotations(owner) if n in fields]
    title = "" if owner is options else summary(owner).rstrip(".")
    groups[title] = [
      (name, _flag(fields.pop(name), hints[name])) for name in names
    ]
  return groups


def summary(options: type) -> str:
  """Returns the first paragraph of a docstring on one line."""
  return " ".join((inspect.getdoc(options) or "").split("\n\n")[0].split())


def changed(options: Shared, group: type) -> list[str]:
  """Names the flags of a group whose values are not the defaults."""
  names = [n for n in inspect.get_annotations(group) if n in vars(options)]
  defaults = type(options)()
  return [
    f"--{name}"
    for name in names
    if getattr(options, name) != getattr(defaults, name)
  ]


def _flag(field: dataclasses.Field, hint: Any) -> Flag:
  hint, rule = paths.unmark(hint)
  if isinstance(hint, types.UnionType):  # X | None
    (hint,) = [kind for kind in typing.get_args(hint) if kind is not type(None)]
  is_list = typing.get_origin(hint) is tuple
  kind = typing.get_args(hint)[0] if is_list else hint
  return Flag(
    name=field.name,
    kind=kind,
    is_list=is_list,
    rule=rule,
    default=field.default,
    **field.metadata,
  )
