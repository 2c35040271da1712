"""Counts the work of a compiled program from its optimised HLO text.

XLA's own cost analysis counts the body of a loop once, but these programs are
loops over layers and tokens. Here each computation counts as often as it runs:

    runs(entry) = 1,  runs(body) = runs(caller) x trips of the loop

The text is meant for people and differs between compilers. Only names, shapes,
operands and the computations that an instruction calls are read from it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
SLICES = ("dynamic-slice", "slice", "gather")  # read as much as they return
UPDATES = ("dynamic-update-slice", "scatter")  # write into their first operand
VIEWS = ("bitcast", "reshape", "get-tuple-element", "copy-done", "tuple")
MOVES_NOTHING = (
  *VIEWS,
  "parameter",
  "constant",
  "iota",
  "while",
  "call",
  "conditional",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_CALLS = re.compile(
  r"(calls|to_apply|body|branch_computations|true_computation"
  r"|false_computation)=(%?[\w.\-]+|\{[^}]*\})"
)
_ON_CHIP = re.compile(r"T\(.*S\(1\)")  # a tiled layout in TPU vector memory


@dataclasses.dataclass(frozen=True)
class Array:
  """One array in an instruction's result; a `pred` takes a byte."""

  dtype: str
  dims: tuple[int, ...]
  in_memory: bool  # False: in TPU vector memory, which costs no traffic

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    bits = re.search(r"\d+", self.dtype)
    return self.size * max(1, int(bits[0]) // 8 if bits else 1)

  @property
  def moved(self) -> int:
    return self.bytes if self.in_memory else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of the text: `name = arrays op(operands), rest`."""

  name: str
  op: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  rest: str

  @property
  def kind(self) -> str | None:
    """The one of COLLECTIVES that this is or starts; None for other ops."""
    op = self.op.removesuffix("-start")
    return op if op in COLLECTIVES else None


@dataclasses.dataclass(frozen=True)
class Program:
  """The computations of a text by name; the last line of each is its result."""

  computations: dict[str, dict[str, Instruction]]
  entry: str

  def runs(self) -> tuple[dict[str, int], set[str]]:
    """Returns (runs of each computation, loops of unknown length).

    Computations inside fusions are included. A loop of unknown length counts
    as one trip.
    """
    counts, unknown = collections.Counter(), set()

    def visit(name, times):
      counts[name] += times
      for instruction in self.computations[name].values():
        trips = 1
        if instruction.op == "while":
          trips = self.trips(instruction) or 1
          if trips == 1 and self.trips(instruction) is None:
            unknown.add(instruction.name)
        for called in self.called(instruction):
          visit(called, times * trips)

    visit(self.entry, 1)
    return dict(counts), unknown

  def called(self, instruction: Instruction) -> list[str]:
    """Lists the computations it runs, without reducers and loop conditions."""
    if instruction.op.endswith(("-done", "-update")):
      return []
    return [
      name
      for key, names in _CALLS.findall(instruction.rest)
      for name in re.findall(r"[\w.\-]+", names)
      if key != "to_apply" or instruction.op == "call"
    ]

  def trips(self, loop: Instruction) -> int | None:
    """Returns the trip count of a `while`, or None if it is not known.

    The compiler states it, or the loop's condition holds a single bound.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
      return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    if condition is None:
      return None
    bounds = {
      int(number[1])
      for line in self.computations[condition[1]].values()
      if line.op == "constant" and line.arrays[0].dims == ()
      if (number := re.match(r"(\d+)\)", line.rest))
    }
    return bounds.pop() if len(bounds) == 1 else None


def parse(text: str) -> Program:
  """Parses the text of `compiled.as_text()`; ValueError if it is not HLO."""
  computations, entry, lines = {}, "", {}
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
    if head:
      lines = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
    elif match := _LINE.match(line):
      instruction = _instruction(match[1], match[2])
      if instruction:
        lines[instruction.name] = instruction
  if not entry:
    raise ValueError(
      f"no ENTRY in a text of {len(text)} characters: expected HLO."
    )
  return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction | None:
  end = _closing(text, 0) if text[0] == "(" else text.find(" ")
  op = re.match(r" ([\w\-]+)\(", text[end:])
  if not op:
    return None
  start = end + op.end()
  stop = _closing(text, start - 1) - 1
  arrays = tuple(
    Array(
      dtype,
      tuple(map(int, filter(None, dims.split(",")))),
      not _ON_CHIP.search(layout),
    )
    for dtype, dims, layout in _SHAPE.findall(text[:end])
  )
  operands = tuple(re.findall(r"%([\w.\-]+)", text[start:stop]))
  numbered = op[1] in ("constant", "parameter")
  rest = text[start if numbered else stop :]
  return Instruction(name, op[1], arrays, operands, rest)


def _closing(text: str, start: int) -> int:
  """Returns the index after the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i + 1
  return len(text)


# --- collectives -------------------------------------------------------------


def group_size(rest: str, devices: int) -> int:
  """Reads how many devices a collective joins; `devices` if it does not say."""
  if groups := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", rest):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", groups[1]))
    axes = re.findall(r"'([^']+)'", groups[2])
    return math.prod(int(sizes[axis]) for axis in axes)
  if groups := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
    return int(groups[1])
  if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return len(groups[1].split(","))
  return devices


def sent(instruction: Instruction, devices: int) -> int:
  """Returns the bytes that one device sends for a collective in a ring."""
  n = group_size(instruction.rest, devices)
  total = sum(a.bytes for a in instruction.arrays if a.dtype != "u32")
  if instruction.kind == "collective-permute":
    return total // 2 if instruction.op.endswith("-start") else total
  if instruction.op == "all-gather-start":  # lists its operands as well
    total = total * n // (n + 1)
  shares = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}
  return int(total * shares.get(instruction.kind or "", (n - 1) / n))


def collectives(program: Program, devices: int) -> list[dict]:
  """Sums up the collectives as {kind, dtype, count, bytes} for one device.

  `bytes` is what the device sends in a ring, over all trips of loops.
  """
  runs, _ = program.runs()
  continued = _continued(program)
  totals = collections.defaultdict(lambda: [0, 0])
  for name, times in runs.items():
    for instruction in program.computations[name].values():
      if not instruction.kind or name in continued:
        continue
      kind, total = instruction.kind, sent(instruction, devices)
      if name.startswith("all-reduce-scatter"):  # keeps a part of the sum
        kind, total = "reduce-scatter", total // 2
      row = totals[kind, instruction.arrays[0].dtype]
      row[0] += times
      row[1] += times * total
  return [
    dict(kind=kind, dtype=dtype, count=count, bytes=total)
    for (kind, dtype), (count, total) in sorted(totals.items())
  ]


def _continued(program: Program) -> set[str]:
  """Returns the TPU fusions that continue a collective started elsewhere.

  The text repeats the collective in each of them, and in loops that overlap
  with it.
  """
  return {
    name
    for lines in program.computations.values()
    for line in lines.values()
    if line.op == "fusion"
    for name in program.called(line)
    if line.name.startswith("async-collective-done")
    or name.startswith("async_collective_fusion")
  }


# --- memory traffic ----------------------------------------------------------


def copies_in_loops(program: Program, sizes: set[int]) -> int:
  """Counts the `copy` instructions in loops whose size is one of `sizes`."""
  within, todo = (
    set(),
    [
      name
      for lines in program.computations.values()
      for line in lines.values()
      if line.op == "while"
      for name in program.called(line)
    ],
  )
  while todo:
    name = todo.pop()
    if name not in within:
      within.add(name)
      lines = program.computations[name].values()
      todo += [called for line in lines for called in program.called(line)]
  return sum(
    line.op in ("copy", "copy-start") and line.arrays[0].size in sizes
    for name in within
    for line in program.computations[name].values()
  )


def bytes_moved(program: Program) -> int:
  """Returns the bytes that all instructions read from memory and write to it.

  Instructions inside a fusion move nothing by themselves. Slices, and updates
  in place, count only the part that they touch.
  """
  runs, _ = program.runs()
  fused = {
    name
    for lines in program.computations.values()
    for line in lines.values()
    if line.op == "fusion"
    for name in program.called(line)
  }
  return sum(
    times * _moved(program, program.computations[name], line)
    for name, times in runs.items()
    if name not in fused
    for line in program.computations[name].values()
  )


def _moved(program, lines, line) -> int:
  if line.op in MOVES_NOTHING or line.op.endswith("-done"):
    return 0
  if line.op == "async-start":  # the called computation is counted
    return 0
  if line.op == "fusion":
    inner = program.computations[program.called(line)[0]]
    read = sum(_read(program, inner, parameter) for parameter in inner.values())
    return read + _written(program, inner, list(inner.values())[-1])
  if line.op.endswith("-start") and not line.kind:  # copies an array or slice
    ends = line.arrays[:2]
    return min(a.bytes for a in ends) * sum(a.in_memory for a in ends)
  written = sum(array.moved for array in line.arrays)
  if line.op in SLICES:
    return 2 * written
  if line.op in UPDATES:
    return 2 * _update(lines, line)
  operands = [lines[name] for name in line.operands if name in lines]
  return written + sum(a.moved for one in operands for a in one.arrays)


def _update(lines, line) -> int:
  """Returns the bytes that a dynamic-update-slice or a scatter puts in."""
  index = 1 if line.op == "dynamic-update-slice" else -1
  source = lines.get(line.operands[index])
  return sum(a.bytes for a in source.arrays) if source else 0


def _users(lines, name) -> Iterator[tuple[Instruction, str]]:
  """Yields (reader, the name it reads) of an instruction, through views."""
  for line in lines.values():
    if name in line.operands:
      if line.op in VIEWS:
        yield from _users(lines, line.name)
      else:
        yield line, name


def _read(program, lines, parameter) -> int:
  """Returns the bytes of its parameter that a fusion reads."""
  whole, total = sum(a.moved for a in parameter.arrays), 0
  if parameter.op != "parameter" or not whole:
    return 0
  for user, name in _users(lines, parameter.name):
    if user.op in SLICES and name == user.operands[0]:
      total += sum(a.bytes for a in user.arrays)
    elif user.op == "fusion":
      inner = program.computations[program.called(user)[0]]
      total += sum(
        _read(program, inner, one)
        for one in inner.values()
        if one.op == "parameter"
        and user.operands[int(one.rest.split(")")[0])] == name
      )
    elif user.op not in UPDATES or name != user.operands[0]:
      return whole
  return min(total, whole)


def _written(program, lines, root) -> int:
  """Returns the bytes of its result that a fusion writes."""
  if not any(array.in_memory for array in root.arrays):
    return 0
  if root.op in VIEWS:
    sources = [lines[name] for name in root.operands if name in lines]
    return sum(_written(program, lines, source) for source in sources)
  if root.op in UPDATES:
    return _update(lines, root)
  return sum(array.moved for array in root.arrays)
