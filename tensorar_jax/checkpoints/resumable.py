"""Long work in files: processes share it, and a killed run continues.

The work is a list of files. Process p of P makes the files p, p + P, ...; a
file gets its name when it is complete, so the missing files are the work that
is left. A folder is claimed for one set of settings before the work begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import logging

from tensorar_jax.checkpoints.files import read_json, write_json

SETTINGS = "settings.json"
LOG_SECONDS = 5


@contextlib.contextmanager
def lock(path: pathlib.Path, wait: bool = True) -> Iterator[bool]:
  """Locks a file or folder against other processes; yields whether it did.

  With `wait` False it does not if another process holds the lock. The lock of a
  process that dies is free.
  """
  mode = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
  handle = os.open(path, mode, 0o644)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    held = True
  except BlockingIOError:
    held = False
  try:
    yield held
  finally:
    os.close(handle)


def update_json(path: pathlib.Path, change: Callable[[Any], Any]) -> Any:
  """Replaces the content of a JSON file, {} if it is new, by change(content).

  Returns the new content. Several processes may do so at the same time.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with lock(path.parent):  # the file itself is replaced
    value = change(read_json(path, default={}))
    write_json(path, value)
  return value


def positions(count: int, size: int) -> list[range]:
  """Splits 0, 1, ... count - 1 in ranges of `size`; the last may be shorter."""
  return [range(i, min(i + size, count)) for i in range(0, count, size)]


def differences(
  old: Any, new: Any, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
  """(key, old value, new value) wherever two trees of settings differ."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted({*old, *new}):
      yield from differences(old.get(key), new.get(key), f"{prefix}.{key}")
  elif json.dumps(old) != json.dumps(new):
    yield prefix.removeprefix("."), old, new


def claim_settings(
  folder: pathlib.Path, settings: dict[str, Any], what: str
) -> None:
  """Marks the folder as of these settings; ValueError if it has others.

  `what` names the content of the folder in the error.
  """
  file = folder / SETTINGS
  if not file.exists():
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)
  before = read_json(file)
  changed = [
    f"{key}: was {str(old)[:100]}, is {str(new)[:100]}"
    for key, old, new in differences(before, settings)
  ]
  if changed:
    listed = "\n  ".join(changed)
    raise ValueError(
      f"{folder} holds other {what}:\n  {listed}\nChoose another folder, or "
      "undo the change to continue."
    )


@dataclasses.dataclass(frozen=True)
class Worker:
  """One of `count` processes that share the work, by its number from 0."""

  index: int = 0
  count: int = 1

  def __post_init__(self):
    if not 0 <= self.index < self.count:
      raise ValueError(
        f"process {self.index} of {self.count}: expected 0 to {self.count - 1}"
      )

  @classmethod
  def of_this_process(cls) -> Worker:
    """Among the processes that jax.distributed has joined, if it has."""
    return cls(jax.process_index(), jax.process_count())

  @property
  def is_first(self) -> bool:
    return self.index == 0


def shards(
  folder: pathlib.Path, name: str, num_images: int, shard_size: int
) -> dict[pathlib.Path, range]:
  """Every shard and the positions of its images; `name` has a {} in it."""
  parts = positions(num_images, shard_size)
  return {
    folder / name.format(f"{i:05d}-of-{len(parts):05d}"): part
    for i, part in enumerate(parts)
  }


def to_do(
  files: dict[pathlib.Path, range], worker: Worker
) -> dict[pathlib.Path, range]:
  """The worker's shards that are not there yet."""
  mine = list(files.items())[worker.index :: worker.count]
  return {file: positions for file, positions in mine if not file.exists()}


def all_there(folder: pathlib.Path, files: Sequence[pathlib.Path]) -> bool:
  """Whether every file is there; if not, the log says how many are missing."""
  missing = sum(not file.exists() for file in files)
  if missing:
    logging.info(
      "%s: done with this process's share; other processes have %d of %d "
      "shards still to write",
      folder,
      missing,
      len(files),
    )
  return not missing


class Progress:
  """Counts images, and logs count, rate and time left every few seconds."""

  def __init__(self, what: str, total: int):
    self.what, self.total, self.done = what, total, 0
    self.started = time.monotonic()

  def rate(self) -> float:
    """Images per second so far, loading and compilation included."""
    return self.done / max(time.monotonic() - self.started, 1e-9)

  def add(self, count: int = 1) -> None:
    self.done += count
    rate = self.rate()
    logging.log_every_n_seconds(
      logging.INFO,
      "%s: %d of %d images, %.3g images/s, %.1f minutes to go",
      LOG_SECONDS,
      self.what,
      self.done,
      self.total,
      rate,
      (self.total - self.done) / rate / 60,
    )
