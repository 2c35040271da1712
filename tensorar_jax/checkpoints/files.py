"""Files that are whole or absent, and JSON that says when it is damaged."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from etils import epath

from tensorar_jax.checkpoints import locks

# TFDS has paths of its own, which need not be on a local disk.
AnyPath = TypeVar("AnyPath", pathlib.Path, epath.Path)
_REQUIRED = object()
# Names of files that are being written; the second is of earlier versions.
_UNFINISHED = re.compile(r".+\.partial|\.[0-9a-f]{32}\.png")
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_RESTORE = "Restore the file, or remove it to have it written again."
_KINDS = {dict: "an object", list: "a list", str: "a text", int: "an integer"}
_KINDS |= {float: "a number", bool: "true or false"}


# --- writing -----------------------------------------------------------------


@contextlib.contextmanager
def replacing(
  path: AnyPath, *, sync: bool = False, new: bool = False
) -> Iterator[AnyPath]:
  """Yields a new name beside `path`; what is written there becomes `path`.

  A reader sees the old file or the whole new one, and two writers never meet.
  An error in the block removes the new file; a killed process leaves it, as
  `<name>.<number>.partial`, for `remove_leftovers`. `sync` waits until the
  content is on the disk. With `new`, FileExistsError if `path` is there at the
  end: the first of several writers keeps it.
  """
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
  # Locked, it is no leftover.
  local = isinstance(partial, pathlib.Path)
  handle = locks.create(partial) if local else None
  try:
    yield partial
    if sync:
      with partial.open("rb") as written:
        os.fsync(written.fileno())
    if new:
      _name_once(partial, path)
    else:
      partial.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):  # it may not be there
      partial.unlink()
    raise
  finally:
    if handle is not None:
      os.close(handle)


def _name_once(partial, path) -> None:
  """Names a file `path`, where nothing may be; of several, one succeeds."""
  try:
    os.link(partial, path)
    partial.unlink()
  except OSError as error:
    if error.errno not in _NO_LINKS:
      raise
    path.touch(exist_ok=False)
    partial.replace(path)


def remove_leftovers(paths: Iterable[pathlib.Path]) -> None:
  """Removes those of the files that a killed process left half-written.

  A file that is being written now, by any process, is left alone.
  """
  for path in list(paths):
    if _UNFINISHED.fullmatch(path.name) and path.is_file():
      locks.remove_if_free(path)


def remove_leftovers_of(path: pathlib.Path) -> None:
  """Removes what killed processes left beside a file that they were writing."""
  beside = path.parent.iterdir() if path.parent.is_dir() else ()
  remove_leftovers(p for p in beside if p.name.startswith(f"{path.name}."))


def write_arrays(path: pathlib.Path, **arrays: np.ndarray) -> None:
  """Writes an .npz file, whole or not at all."""
  with replacing(path, sync=True) as partial, partial.open("wb") as file:
    np.savez(file, allow_pickle=False, **arrays)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes text in UTF-8, whole or not at all."""
  with replacing(path) as partial:
    partial.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, value: Any, *, new: bool = False) -> None:
  """Writes JSON, whole or not at all, and waits until it is on the disk.

  With `new`, FileExistsError if the file is there already.
  """
  with replacing(path, sync=True, new=new) as partial:
    partial.write_text(json.dumps(value, indent=2) + "\n")


# --- reading -----------------------------------------------------------------


def read_json(
  path: pathlib.Path,
  like: Any = None,
  *,
  default: Any = _REQUIRED,
  remedy: str = _RESTORE,
) -> Any:
  """The content of a JSON file, or `default` where there is no such file.

  Args:
    path: of a file that this project wrote.
    like: what has to be in it: a type; {key: what} of an object, which may have
      more keys; {...: what} of all values of an object; [what] of all entries
      of a list. None takes anything.
    default: without one, the file has to be there.
    remedy: ends the message.

  Raises:
    ValueError: the file is missing and has no default, cannot be read, is no
      JSON, or holds something else.
  """
  try:
    text = path.read_text()
  except FileNotFoundError as error:
    if default is not _REQUIRED:
      return default
    raise ValueError(f"{path}: no such file. {remedy}") from error
  except (OSError, ValueError) as error:
    raise ValueError(_unreadable(path, error, remedy)) from error
  return parse_json(text, str(path), like, remedy=remedy)


def parse_json(
  text: str, where: str, like: Any = None, *, remedy: str = _RESTORE
) -> Any:
  """As `read_json`, of text; errors name `where` it is from."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(_unreadable(where, error, remedy)) from error
  check_shape(value, like, where, remedy=remedy)
  return value


def check_shape(
  value: Any, like: Any, where: str, *, remedy: str = _RESTORE
) -> None:
  """ValueError unless a value of JSON is as `like` of `read_json` says."""
  for key, found, kind in _misfits(value, like, ""):
    got = "missing" if found is _REQUIRED else f"{str(found)[:60]!r}"
    raise ValueError(
      f"{where}: {key or 'the content'} is {got}; expected {_KINDS[kind]}. The"
      f" file is damaged or another one. {remedy}"
    )


def _misfits(
  value: Any, like: Any, key: str
) -> Iterator[tuple[str, Any, type]]:
  """Yields (key, value, expected type) of all that is not as it should be."""
  if like is None:
    return
  kind = like if isinstance(like, type) else type(like)
  # In JSON 1 is a number as 1.0 is, and true is none.
  kinds = {float: {float, int}}.get(kind, {kind})
  if type(value) not in kinds:
    yield key, value, kind
  elif isinstance(like, dict):
    for name, inner in like.items():
      names = value if name is ... else [name]
      for name in names:
        inside = f"{key}.{name}".removeprefix(".")
        yield from _misfits(value.get(name, _REQUIRED), inner, inside)
  elif isinstance(like, list):
    for i, entry in enumerate(value):
      yield from _misfits(entry, like[0], f"{key}[{i}]")


_DAMAGED_ARRAYS = (
  OSError,
  ValueError,
  KeyError,
  EOFError,
  NotImplementedError,
  zipfile.BadZipFile,
  zlib.error,
)


def read_arrays(
  path: pathlib.Path,
  names: Iterable[str] | None = None,
  *,
  remedy: str = _RESTORE,
) -> dict[str, np.ndarray]:
  """The named arrays of an .npz file, or all; ValueError if it is damaged."""
  try:
    with np.load(path, allow_pickle=False) as arrays:
      chosen = arrays.files if names is None else names
      return {name: arrays[name] for name in chosen}
  except _DAMAGED_ARRAYS as error:
    raise ValueError(_unreadable(path, error, remedy, "arrays")) from error


def _unreadable(path, error, remedy, what="JSON") -> str:
  reason = f"{type(error).__name__}: {error}"
  return f"{path}: cannot be read as {what} ({reason}). {remedy}"


def as_json(value: Any) -> Any:
  """The value as `read_json` gives it back: tuples are lists."""
  return json.loads(json.dumps(value))


def sha256(path: str | os.PathLike) -> str:
  """The digest of a file, in hexadecimal digits."""
  with open(path, "rb") as data:
    return hashlib.file_digest(data, "sha256").hexdigest()
