"""What a compiled program does, read from its optimised HLO text.

XLA's own cost analysis takes the body of a loop once, and these programs are
loops over layers and tokens. Here a computation counts as often as it runs:

    runs(entry) = 1,  runs(body) = runs(caller) x trips of the loop

The text is for people and differs between compilers; what is read of it is
names, shapes, operands and the computations that an instruction calls.
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
SLICES = ("dynamic-slice", "slice", "gather")  # read what they put out
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
_ON_CHIP = re.compile(r"T\(.*S\(1\)")  # a TPU's tiles, in its vector memory


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape; a `pred` takes a byte."""

  dtype: str
  dims: tuple[int, ...]
  in_memory: bool  # False: in a TPU's vector memory, which costs no traffic

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
  """One line: `name = arrays op(operands), rest`."""

  name: str
  op: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  rest: str

  @property
  def kind(self) -> str | None:
    """Which of COLLECTIVES it is, or starts."""
    op = self.op.removesuffix("-start")
    return op if op in COLLECTIVES else None


@dataclasses.dataclass(frozen=True)
class Program:
  """The computations of a text by name, each with its last line its result."""

  computations: dict[str, dict[str, Instruction]]
  entry: str

  def runs(self) -> tuple[dict[str, int], set[str]]:
    """(how often each computation runs, loops whose length is not known).

    With what fusions hold; a loop of unknown length counts as one turn.
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
    """What it runs; not the scalar function of a reduction, or a condition."""
    if instruction.op.endswith(("-done", "-update")):
      return []
    return [
      name
      for key, names in _CALLS.findall(instruction.rest)
      for name in re.findall(r"[\w.\-]+", names)
      if key != "to_apply" or instruction.op == "call"
    ]

  def trips(self, loop: Instruction) -> int | None:
    """Turns of a `while`: what the compiler says, or the bound it counts to."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
      return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    if condition is None:
      return None
    bounds = {
      int(found[1])
      for line in self.computations[condition[1]].values()
      if line.op == "constant" and line.arrays[0].dims == ()
      if (found := re.match(r"(\d+)\)", line.rest))
    }
    return bounds.pop() if len(bounds) == 1 else None


def parse(text: str) -> Program:
  """The program of `compiled.as_text()`."""
  computations, entry, lines = {}, "", {}
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
    if head:
      lines = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
    elif found := _LINE.match(line):
      instruction = _instruction(*found.groups())
      if instruction:
        lines[instruction.name] = instruction
  if not entry:
    raise ValueError(f"no ENTRY in a text of {len(text)} characters: no HLO.")
  return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction | None:
  end = _closing(text, 0) if text[0] == "(" else text.find(" ")
  found = re.match(r" ([\w\-]+)\(", text[end:])
  if not found:
    return None
  start = end + found.end()
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
  numbered = found[1] in ("constant", "parameter")
  rest = text[start if numbered else stop :]
  return Instruction(name, found[1], arrays, operands, rest)


def _closing(text: str, start: int) -> int:
  """Behind the parenthesis that closes the one at `start`."""
  depth = 0
  for at in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[at], 0)
    if depth == 0:
      return at + 1
  return len(text)


# --- collectives -------------------------------------------------------------


def group_size(rest: str, devices: int) -> int:
  """How many devices a collective joins, in the notations of replica groups."""
  if found := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", rest):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    axes = re.findall(r"'([^']+)'", found[2])
    return math.prod(int(sizes[axis]) for axis in axes)
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
    return int(found[1])
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return len(found[1].split(","))
  return devices


def sent(instruction: Instruction, devices: int) -> int:
  """Bytes that one device sends for a collective, around a ring."""
  n = group_size(instruction.rest, devices)
  total = sum(a.bytes for a in instruction.arrays if a.dtype != "u32")
  if instruction.kind == "collective-permute":
    return total // 2 if instruction.op.endswith("-start") else total
  if instruction.op == "all-gather-start":  # its operands stand there as well
    total = total * n // (n + 1)
  shares = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}
  return int(total * shares.get(instruction.kind or "", (n - 1) / n))


def collectives(program: Program, devices: int) -> list[dict]:
  """{kind, dtype, count, bytes} of each kind and type, on one device.

  `bytes` are what a device sends in a ring; loops count with their turns.
  """
  runs, _ = program.runs()
  continued = _continued(program)
  found = collections.defaultdict(lambda: [0, 0])
  for name, times in runs.items():
    for instruction in program.computations[name].values():
      if not instruction.kind or name in continued:
        continue
      kind, total = instruction.kind, sent(instruction, devices)
      if name.startswith("all-reduce-scatter"):  # a sum of which a part is kept
        kind, total = "reduce-scatter", total // 2
      row = found[kind, instruction.arrays[0].dtype]
      row[0] += times
      row[1] += times * total
  return [
    dict(kind=kind, dtype=dtype, count=count, bytes=total)
    for (kind, dtype), (count, total) in sorted(found.items())
  ]


def _continued(program: Program) -> set[str]:
  """Fusions that a TPU carries a collective on in, which another started.

  The text repeats it in each of them, also in loops that run meanwhile.
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
  """How many `copy` instructions of so many elements stand in loops."""
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
  """Bytes that all instructions together read from memory and write to it.

  What a fusion holds moves nothing. Slices read, and updates in place write,
  the part that they touch.
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
  if line.op == "async-start":  # what it calls is counted where it stands
    return 0
  if line.op == "fusion":
    inner = program.computations[program.called(line)[0]]
    read = sum(_read(program, inner, parameter) for parameter in inner.values())
    return read + _written(program, inner, list(inner.values())[-1])
  if line.op.endswith("-start") and not line.kind:  # a copy, or of a slice
    ends = line.arrays[:2]
    return min(a.bytes for a in ends) * sum(a.in_memory for a in ends)
  written = sum(array.moved for array in line.arrays)
  if line.op in SLICES:
    return 2 * written
  if line.op in ("dynamic-update-slice", "scatter"):
    return 2 * _update(lines, line)
  operands = [lines[name] for name in line.operands if name in lines]
  return written + sum(a.moved for one in operands for a in one.arrays)


def _update(lines, line) -> int:
  """Bytes of what a dynamic-update-slice or a scatter puts in."""
  at = 1 if line.op == "dynamic-update-slice" else -1
  source = lines.get(line.operands[at])
  return sum(a.bytes for a in source.arrays) if source else 0


def _users(lines, name) -> Iterator[tuple[Instruction, str]]:
  """Who reads an instruction and as what, looking through views."""
  for line in lines.values():
    if name in line.operands:
      if line.op in VIEWS:
        yield from _users(lines, line.name)
      else:
        yield line, name


def _read(program, lines, parameter) -> int:
  """Bytes of a fusion's parameter that the fusion reads."""
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
    elif user.op != "dynamic-update-slice" or name != user.operands[0]:
      return whole
  return min(total, whole)


def _written(program, lines, root) -> int:
  """Bytes of a fusion's result that the fusion writes."""
  if not any(array.in_memory for array in root.arrays):
    return 0
  if root.op in VIEWS:
    sources = [lines[name] for name in root.operands if name in lines]
    return sum(_written(program, lines, source) for source in sources)
  if root.op == "dynamic-update-slice":
    return _update(lines, root)
  return sum(array.moved for array in root.arrays)
