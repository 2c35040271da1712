"""Digests of the files of a checkpoint: written with it, compared by readers.

A disk, a cable or a copy may flip a bit, and the arrays still load. The file
`digests.json` of a checkpoint folder has the sha256 of every file in its items.
It is there before the folder gets its name, so every checkpoint has it, apart
from those of earlier versions, which are read without a comparison.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Sequence
from concurrent import futures

from tensorar_jax.checkpoints import files

FILE = "digests.json"
_THREADS = min(8, os.cpu_count() or 1)  # hashing holds no lock of Python's
_REMEDY = "The checkpoint is damaged."


def write(folder: pathlib.Path, items: Sequence[str]) -> None:
  """Writes the digests of all files of a checkpoint's items."""
  files.write_json(folder / FILE, _digests(folder, _list(folder, items)))


def verify(
  folder: pathlib.Path, items: Sequence[str], share: tuple[int, int] = (0, 1)
) -> None:
  """Compares the files of some items with their digests.

  Args:
    folder: of a checkpoint.
    items: of those it holds.
    share: (p, P) compares only the files p, p + P, ... of them.

  Raises:
    ValueError: a file is missing or has changed, or the digests have.
  """
  like = {...: str}
  known = files.read_json(folder / FILE, like, default=None, remedy=_REMEDY)
  if known is None:
    return
  named = {name for name in known if name.split("/")[0] in items}
  if differ := named ^ {*_list(folder, items)}:
    raise ValueError(f"{min(differ)} is not in the folder, or not in {FILE}")
  chosen = sorted(named)[share[0] :: share[1]]
  for name, digest in _digests(folder, chosen).items():
    if digest != known[name]:
      raise ValueError(
        f"{name} has changed since it was written: its sha256 begins with"
        f" {digest[:8]}, that in {FILE} with {known[name][:8]}"
      )


def _list(folder: pathlib.Path, items: Sequence[str]) -> list[str]:
  """The names of all files of the items, relative to the folder."""
  return sorted(
    path.relative_to(folder).as_posix()
    for item in items
    for path in (folder / item).rglob("*")
    if path.is_file()
  )


def _digests(folder: pathlib.Path, names: Sequence[str]) -> dict[str, str]:
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    digests = pool.map(lambda name: _digest(folder / name), names)
    return dict(zip(names, digests))


def _digest(path: pathlib.Path) -> str:
  status = path.stat()
  return _digest_once(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(2**14)  # shapes and weights are read one after the other
def _digest_once(path: pathlib.Path, size: int, changed: int) -> str:
  del size, changed
  return files.sha256(path)
