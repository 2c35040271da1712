"""Parses a command line into a mode, its options, and changes of the config.

Flags are `--name=value` or `--name value`; `--name` and `--noname` are enough
for one that is true or false. The last of several counts. A flag of another
mode is an error that names the mode, an unknown one names its neighbours.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tensorar_jax.cli.modes import MODES
from tensorar_jax.cli.options import (
  Flag,
  Shared,
  flags_of,
  groups_of,
  summary,
)

PROGRAM = "python -m tensorar_jax.main"
OVERVIEW = """\
usage: {program} --config=FILE [--mode=MODE] [FLAGS]

Trains TensorAR models, draws images from them and measures them. The config, a
file of configs/, is the experiment; the mode is what to do with it.

Modes:
{modes}

A mode's flags with an example:
  {program} --mode=sample --help

Examples:
  {program} --config=configs/digits.py
  {program} --config=configs/digits.py --mode=sample \\
    --stage=tensorar --num_images=100

Any value of the config can be set from here, for all stages or for one:
  {program} --config=configs/digits.py --workdir=runs/k8 \\
    --config.train.batch_size=32 --config.stages.tensorar.tensorar.window=8

Several processes train, import, sample and tokenize together, and evaluate
against a --reference: the same command in each with --coordinator=HOST:PORT,
--num_processes and --process_id. Under SLURM and Open MPI they find one
another. launch/ has a script for each of these. --config.mesh.data, .fsdp and
.tensor say over how many devices what is split.

SIGTERM makes training save and exit with 75: the same command continues. Any
other failure exits with 1 after one line that says what to do.
"""


@dataclasses.dataclass(frozen=True)
class Command:
  """A command line that was understood.

  Attributes:
    mode: of MODES.
    options: the values of the mode's flags.
    overrides: {"SECTION.KEY": value} of --config.SECTION.KEY=VALUE, in order.
  """

  mode: str
  options: Shared
  overrides: dict[str, str]


def parse(words: Sequence[str]) -> Command:
  """Parses a command line, without its first word, the program.

  Raises:
    ValueError: says in one line what is wrong, and what to do.
    SystemExit: after --help was printed.
  """
  words, overrides = _split_overrides(words)
  mode_parser = _Parser()
  mode_parser.add_argument("--mode")
  mode_parser.add_argument("--help", "-h", action="store_true")
  given, rest = mode_parser.read(words)
  if given.mode is None and given.help:
    print(overview(), end="")
    raise SystemExit(0)
  mode = given.mode or "run"
  if mode not in MODES:
    raise ValueError(
      f"--mode={mode} is unknown.{_neighbours(mode, MODES)} Modes:"
      f" {', '.join(MODES)}; --help says what they do."
    )
  if given.help:
    print(help_page(mode), end="")
    raise SystemExit(0)
  values, unknown = _parser(mode).read(rest)
  if unknown:
    raise ValueError(_explain(unknown, mode))
  options = MODES[mode].options(**vars(values))
  if options.needs_config() and not options.config:
    alternative = ""
    if mode == "evaluate":
      alternative = " Without one it takes --samples=FILE.npz or --scores=FILE."
    raise ValueError(
      f"--mode={mode} needs --config=FILE, such as --config=configs/digits.py."
      f"{alternative} --help lists the modes."
    )
  return Command(mode=mode, options=options, overrides=overrides)


def overview() -> str:
  """Returns the page of --help without a mode."""
  lines = [
    f"  {name:<11}{summary(mode.options)}" for name, mode in MODES.items()
  ]
  lines[0] += " The default."
  return OVERVIEW.format(program=PROGRAM, modes="\n".join(map(_fold, lines)))


def help_page(mode: str) -> str:
  """Returns the page of --help with a mode."""
  return _parser(mode).format_help()


class _Parser(argparse.ArgumentParser):
  """Takes flags by their full names, and raises ValueError where one is bad."""

  def __init__(self, **kwargs):
    super().__init__(
      prog=PROGRAM,
      add_help=False,
      allow_abbrev=False,
      exit_on_error=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      **kwargs,
    )

  def read(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the values that are given, and the words that are unknown."""
    try:
      return self.parse_known_args(words)
    except argparse.ArgumentError as error:
      raise ValueError(f"{error.argument_name}: {error.message}.") from error


def _parser(mode: str) -> _Parser:
  """Makes the parser of a mode's flags; it leaves out those not given."""
  options = MODES[mode].options
  parser = _Parser(
    usage=f"{PROGRAM} --config=FILE --mode={mode} [FLAGS]",
    description=(
      f"{inspect.getdoc(options)}\n\nExample:\n  {PROGRAM} {options.example}"
    ),
    argument_default=argparse.SUPPRESS,
  )
  for title, flags in groups_of(options).items():
    group = parser.add_argument_group(title or f"Flags of --mode={mode}")
    for _, flag in flags:
      _add(group, flag)
  # These two are read before the others, and here for the help page.
  group.add_argument(
    "--mode",
    help=f"What to do: {', '.join(MODES)}. Default: run.",
    metavar="MODE",
  )
  group.add_argument("--help", action="store_true", help="Show this page.")
  return parser


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
  """Adds a flag to a group of the help page."""
  text = flag.help.replace("%", "%%")
  if flag.default is not None:
    text += f" Default: {_shown(flag.default)}."
  name = f"--{flag.name}"
  if flag.kind is bool:
    group.add_argument(
      name, type=_boolean, nargs="?", const=True, help=text, metavar="BOOL"
    )
    group.add_argument(
      f"--no{flag.name}",
      dest=flag.name,
      action="store_const",
      const=False,
      help=argparse.SUPPRESS,
    )
    return
  metavar = flag.metavar or {int: "N", float: "X", str: "TEXT"}[flag.kind]
  if flag.choices:
    metavar = "|".join(flag.choices)
  elif flag.is_list and not flag.repeat and not flag.metavar:
    metavar = f"{metavar},..."
  group.add_argument(
    name,
    type=_reader(flag),
    action=_Append if flag.repeat else "store",
    help=text,
    metavar=metavar,
  )


class _Append(argparse.Action):
  """Adds an entry to a tuple."""

  def __call__(self, parser, namespace, values, option_string=None):
    before = getattr(namespace, self.dest, ())
    setattr(namespace, self.dest, (*before, values))


def _reader(flag: Flag) -> Callable[[str], Any]:
  """Makes what reads the value of a flag; its error says what is expected."""
  names = {int: "a whole number", float: "a number", str: "text"}
  name = flag.expected or names[flag.kind]

  def read_one(text: str) -> Any:
    value: Any
    try:
      value = flag.kind(text)
    except ValueError as error:
      raise argparse.ArgumentTypeError(
        f"expected {name}, got {text!r}"
      ) from error
    if flag.rule:
      try:
        value = flag.rule(text)
      except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if flag.least is not None and value < flag.least:
      raise argparse.ArgumentTypeError(
        f"expected at least {flag.least}, got {text}"
      )
    if flag.choices and value not in flag.choices:
      raise argparse.ArgumentTypeError(
        f"expected one of {', '.join(flag.choices)}, got {text!r}"
      )
    return value

  def read_list(text: str) -> tuple:
    words = [word.strip() for word in text.split(",")]
    return tuple(read_one(word) for word in words if word)

  return read_list if flag.is_list and not flag.repeat else read_one


def _boolean(text: str) -> bool:
  for words, value in (("true", "t", "1"), True), (("false", "f", "0"), False):
    if text.lower() in words:
      return value
  raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def _shown(default: Any) -> str:
  """Writes a default as one would on the command line."""
  if isinstance(default, tuple):
    return ",".join(map(str, default)) or "none"
  return str(default).lower() if isinstance(default, bool) else str(default)


def _fold(line: str) -> str:
  return textwrap.fill(line, width=79, subsequent_indent=" " * 13)


def _split_overrides(
  words: Sequence[str],
) -> tuple[list[str], dict[str, str]]:
  """Splits off all --config.KEY=VALUE: (other words, {key: value})."""
  others, overrides, waiting = [], {}, list(words)
  while waiting:
    word = waiting.pop(0)
    key, equals, value = word.partition("=")
    name = key.lstrip("-").removeprefix("no")
    if not (key.startswith("--") and name.startswith("config.")):
      others.append(word)
      continue
    if key.startswith("--noconfig."):
      value = "false"
    elif not equals:
      alone = not waiting or waiting[0].startswith("--")
      value = "true" if alone else waiting.pop(0)
    overrides[name.removeprefix("config.")] = value
  return others, overrides


def _explain(unknown: Sequence[str], mode: str) -> str:
  """Says what is wrong with words that a mode does not understand."""
  word = next((w for w in unknown if w.startswith("--")), unknown[0])
  if not word.startswith("--"):
    return (
      f"{word!r} is no flag: expected --NAME=VALUE. --help lists the modes."
    )
  name = word[2:].partition("=")[0]
  known = {n: flags_of(m.options) for n, m in MODES.items()}
  for spelling in (name, name.removeprefix("no")):
    modes = [f"--mode={n}" for n, flags in known.items() if spelling in flags]
    if modes:
      *most, last = modes
      listed = f"{', '.join(most)} and {last}" if most else last
      return f"--{name} with --mode={mode}: it belongs to {listed}."
  if "." in name:
    return (
      f"--{name} is unknown: a value of the config is set with"
      f" --config.{name}=VALUE."
    )
  every_flag = {flag for flags in known.values() for flag in flags}
  hint = _neighbours(name, every_flag, "--")
  return f"--{name} is unknown.{hint} --mode={mode} --help lists the flags."


def _neighbours(word: str, known: Iterable[str], dashes: str = "") -> str:
  """Returns " Did you mean ...?", or "" if no known word is close."""
  near = difflib.get_close_matches(word, sorted(known), n=3)
  listed = " or ".join(f"{dashes}{name}" for name in near)
  return f" Did you mean {listed}?" if near else ""
