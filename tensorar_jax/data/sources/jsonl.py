"""Tokens in JSON lines, as RAR's extraction writes them (1d-tokenizer).

  {"class_id": 7, "tokens": [95, 14, 78, ...]}

Each line is one crop of an image, and nothing tells which lines are of one
image: an epoch passes over all ten crops of an image, or over an image and its
mirror image. A published file has 12.8 M lines and stays on disk. Only where
each line starts is in memory; for a large file that is looked up once and kept
beside it, in `<file>.lines.npz`, as long as its size and time of change stay.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
import zipfile
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int64

from tensorar_jax.data import cache, codes, leftovers, splits

USAGE = "jsonl:<file> of published lines of tokens"
_CHUNK = 2**24  # bytes looked through at once for the ends of lines
_PARSING_ERRORS = (
  ValueError,
  LookupError,
  TypeError,
  OverflowError,
  RecursionError,
)
_WORTH_KEEPING = 2**26  # bytes; in smaller files lines are found at once
_Starts = Int64[np.ndarray, "_"]  # see `JsonLines.starts`
_FORM = '{"class_id": integer, "tokens": [integers]}'


def load(argument: str, split: str, data_dir: str | None) -> JsonLines:
  """The lines of the file `argument`; its split may have any plain name."""
  del data_dir
  return open_jsonl(splits.whole_file(argument, split))


@dataclasses.dataclass(frozen=True)
class JsonLines:
  """See `codes.TokenSource`; a line is an image of a single variant."""

  file: pathlib.Path
  starts: _Starts  # in bytes; then the end of the last line
  num_tokens: int
  vocab_sizes: tuple[int, ...] | None = None
  num_classes: int | None = None

  @property
  def num_variants(self) -> int:
    """1: nothing says which lines are of one image."""
    return 1

  def __len__(self) -> int:
    return len(self.starts) - 1

  def fetch(
    self, positions: codes.Positions, variants: codes.Positions
  ) -> dict[str, Any]:
    """See `codes.TokenSource`."""
    tokens = np.empty((len(positions), self.num_tokens, 1), np.int32)
    labels = np.empty(len(positions), np.int32)
    # Opened for each batch: threads and processes then have nothing to share.
    with self.file.open("rb") as file:
      for i, position in enumerate(positions):
        labels[i], tokens[i] = self._read(file.fileno(), int(position))
    return {"tokens": tokens, "label": labels}

  def check(self) -> None:
    """ValueError for the first bad line; reads all of them."""
    with self.file.open("rb") as file:
      for position in range(len(self)):
        self._read(file.fileno(), position)

  def _read(
    self, descriptor: int, position: int
  ) -> tuple[int, Int64[np.ndarray, "T 1"]]:
    where = f"{self.file}, line {position + 1}"
    start, end = self.starts[position : position + 2].tolist()
    label, tokens = _parse(os.pread(descriptor, end - start, start), where)
    if len(tokens) != self.num_tokens:
      raise ValueError(
        f"{where} holds {len(tokens)} tokens; expected {self.num_tokens} as of "
        "line 1: remove it, or keep images of another size apart"
      )
    codes.check_codes(where, tokens, self.vocab_sizes)
    codes.check_label(where, label, self.num_classes)
    return label, tokens


def open_jsonl(file: pathlib.Path) -> JsonLines:
  """The lines of a file; ValueError if it is missing, empty or cut short."""
  if not file.is_file():
    raise ValueError(f"{file} is missing; expected a file of lines {_FORM}")
  if not file.stat().st_size:
    raise ValueError(f"{file} is empty; expected lines {_FORM}")
  with file.open("rb") as first:
    _, tokens = _parse(first.readline(), f"{file}, line 1")
  starts = _without_blank_end(file, _line_starts(file))
  source = JsonLines(file, starts, len(tokens))
  # Finds blank lines, and the end of half a copy, before training starts.
  shortest = int(np.diff(source.starts).argmin())
  suspects = np.array([shortest, len(source) - 1])
  source.fetch(suspects, np.zeros(2, int))
  return source


def _without_blank_end(file: pathlib.Path, starts: _Starts) -> _Starts:
  """The starts of the lines without the blank ones at the end."""
  last = len(starts) - 1  # the end of the lines that are kept
  with file.open("rb") as opened:
    while last > 1:
      start, end = starts[last - 1 : last + 1].tolist()
      # No more than a few bytes are taken for a blank line.
      line = os.pread(opened.fileno(), min(end - start, 99), start)
      if line.strip():
        break
      last -= 1
  if blank := len(starts) - 1 - last:
    found: leftovers.Counts = {}
    leftovers.add(found, "blank lines at the end", f"line {last + 1}", blank)
    leftovers.say(file, found)
  return starts[: last + 1]


def _parse(line: bytes, where: str) -> tuple[int, Int64[np.ndarray, "T 1"]]:
  """Parses a line to (label, tokens); checks its form, not the values."""
  try:
    content = json.loads(line)
    label, tokens = content["class_id"], content["tokens"]
    # To NumPy `true` and 1.5 would pass for integers.
    if other := {type(label), *map(type, tokens)} - {int}:
      raise TypeError(f"a {other.pop().__name__} where integers belong")
    if not tokens:
      raise TypeError("no tokens")
    return label, np.array(tokens, np.int64)[:, None]
  except _PARSING_ERRORS as error:
    shown = line[:60].decode(errors="replace").strip()
    reason = getattr(error, "msg", error)  # without json's own "line 1"
    raise ValueError(
      f"{where} is not of the form {_FORM}: {shown!r} "
      f"({type(error).__name__}: {reason}): remove it or make the file again"
    ) from error


def _line_starts(file: pathlib.Path) -> _Starts:
  """The start of each line, from the cache, which is written if need be."""
  stat = file.stat()
  stamp = np.array([stat.st_size, stat.st_mtime_ns])
  index = file.with_name(f"{file.name}.lines.npz")
  try:
    with np.load(index) as stored:
      if np.array_equal(stored["stamp"], stamp):
        return stored["starts"]
  except FileNotFoundError:
    pass
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    logging.warning("%s is damaged and will be replaced: %s", index, error)
  started = time.monotonic()
  starts = _find_lines(file)
  seconds = time.monotonic() - started
  logging.info("%s: %d lines found in %.1f s", file, len(starts) - 1, seconds)
  if stat.st_size >= _WORTH_KEEPING:
    cache.save(index, stamp=stamp, starts=starts)
  return starts


def _find_lines(file: pathlib.Path) -> _Starts:
  """Reads the whole file for the start of each line, and its size."""
  starts, size = [np.zeros(1, np.int64)], 0
  with file.open("rb", buffering=0) as unread:
    while chunk := unread.read(_CHUNK):
      ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
      starts.append(ends + (size + 1))
      size += len(chunk)
  starts = np.concatenate(starts)
  # The last line may lack its end.
  return starts if starts[-1] == size else np.append(starts, size)
