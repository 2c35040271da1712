"""Long work in files: processes share it, and a killed run continues.

The work is a list of files. Process p of P makes the files p, p + P, ...; a
file gets its name when it is complete, so the missing files are the work that
is left. A folder is claimed for one set of settings before the work begins, and
held by one run while it works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import logging

from tensorar_jax.checkpoints import locks
from tensorar_jax.checkpoints.files import read_json, write_json
from tensorar_jax.parallel import processes

SETTINGS = "settings.json"
LOG_SECONDS = 5


def update_json(path: pathlib.Path, change: Callable[[Any], Any]) -> Any:
  """Replaces the content of a JSON file, {} if it is new, by change(content).

  Returns the new content. Several processes may do so at the same time.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with locks.lock(path.with_name(f".{path.name}.lock")):
    value = change(read_json(path, dict, default={}))
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
    with contextlib.suppress(FileExistsError):  # another process is first
      write_json(file, settings, new=True)
  before = read_json(file, dict)
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


@contextlib.contextmanager
def holding(
  folder: pathlib.Path,
  worker: Worker = Worker(),
  *,
  name: str = "lock",
) -> Iterator[None]:
  """Holds a folder for this run: no other one may write there meanwhile.

  Each process of a run calls this, and holds a file of its own: `.lock` that of
  the first. Where jax.distributed has joined them, all of them are refused if
  one is. `locks` says what is promised. A folder that is new and has stayed
  empty is removed in the end.

  Args:
    folder: made where it is missing.
    worker: this process, of those of the run.
    name: of the lock; runs that hold other names do not meet.

  Raises:
    ValueError: another run holds it; with its host and process id.
  """
  made = [path for path in (folder, *folder.parents) if not path.exists()]
  folder.mkdir(parents=True, exist_ok=True)
  share = f"-{worker.index}-of-{worker.count}"
  mine = folder / f".{name}{'' if worker.is_first else share}"
  taken = None
  try:
    with locks.lock(mine, wait=False) as held:
      if not held:
        taken = mine
      elif worker.is_first:
        taken = _share_of_another_run(folder, name, worker)
      error = taken and (
        f"{folder} is in use by {locks.owner(taken)}: wait until it has ended,"
        " or name another folder."
      )
      if worker.count == jax.process_count():
        processes.raise_together(error)
      if error:
        raise ValueError(error)
      yield
  finally:
    for path in made if worker.is_first else ():
      with contextlib.suppress(OSError):  # it is not empty
        path.rmdir()


def _share_of_another_run(
  folder: pathlib.Path, name: str, worker: Worker
) -> pathlib.Path | None:
  """The lock of another run's process, whose first one has ended before."""
  for path in folder.glob(f".{name}-*-of-*"):
    # Those of as many processes meet in the processes themselves.
    if not path.name.endswith(f"-of-{worker.count}"):
      with locks.lock(path, wait=False) as free:
        if not free:
          return path
  return None


def new_folder(parent: pathlib.Path) -> pathlib.Path:
  """Makes the next numbered folder of `parent`; no two processes get one."""
  while True:
    numbers = [int(p.name) for p in parent.glob("*") if p.name.isdigit()]
    folder = parent / f"{max(numbers, default=-1) + 1:03d}"
    with contextlib.suppress(FileExistsError):
      folder.mkdir(parents=True)
      return folder


def check_same(what: str, value: Any) -> None:
  """ValueError unless all processes of this run have the same JSON value.

  All of them have to call it. The error says which process differs from the
  first, and where.
  """
  values = processes.gather(value)
  for index, other in enumerate(values):
    changed = [
      f"{key or what}: {str(old)[:100]} in process 0, {str(new)[:100]} in"
      f" process {index}"
      for key, old, new in differences(values[0], other)
    ]
    if changed:
      listed = "\n  ".join(changed[:20])
      raise ValueError(
        f"process {index} of {len(values)} has another {what} than process 0:"
        f"\n  {listed}\nStart all processes with the same command, packages and"
        " data."
      )


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
  files: dict[pathlib.Path, range],
  worker: Worker,
  is_complete: Callable[[pathlib.Path], bool] = pathlib.Path.exists,
) -> dict[pathlib.Path, range]:
  """The worker's shards that are not there yet, or not complete."""
  mine = list(files.items())[worker.index :: worker.count]
  return {file: positions for file, positions in mine if not is_complete(file)}


def all_there(
  folder: pathlib.Path,
  files: Sequence[pathlib.Path],
  is_complete: Callable[[pathlib.Path], bool] = pathlib.Path.exists,
) -> bool:
  """Whether every file is there; if not, the log says how many are missing."""
  missing = sum(not is_complete(file) for file in files)
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
