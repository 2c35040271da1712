"""Files that are whole or absent, and JSON that says when it is damaged."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from etils import epath

# TFDS has paths of its own, which need not be on a local disk.
AnyPath = TypeVar("AnyPath", pathlib.Path, epath.Path)
_REQUIRED = object()


@contextlib.contextmanager
def replacing(path: AnyPath, *, sync: bool = False) -> Iterator[AnyPath]:
  """Yields a new name beside `path`; what is written there becomes `path`.

  A reader sees the old file or the whole new one, and two writers never meet.
  An error in the block removes the new file; a killed process leaves it, as
  `<name>.<number>.partial`. `sync` waits until the content is on the disk.
  """
  partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
  try:
    yield partial
    if sync:
      with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):  # it may not be there
      partial.unlink()
    raise


def write_arrays(path: pathlib.Path, **arrays: np.ndarray) -> None:
  """Writes an .npz file, whole or not at all."""
  with replacing(path, sync=True) as partial, partial.open("wb") as file:
    np.savez(file, allow_pickle=False, **arrays)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON, whole or not at all."""
  with replacing(path) as partial:
    partial.write_text(json.dumps(value, indent=2) + "\n")


def read_json(
  path: pathlib.Path,
  *,
  default: Any = _REQUIRED,
  remedy: str = "Restore the file, or remove it to have it written again.",
) -> Any:
  """The content of a JSON file, or `default` where there is no such file.

  ValueError for a file that is missing and has no default, that cannot be read
  or is no JSON; the message ends with `remedy`.
  """
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as error:
    if default is not _REQUIRED:
      return default
    raise ValueError(f"{path}: no such file. {remedy}") from error
  except (OSError, ValueError, RecursionError) as error:
    reason = f"{type(error).__name__}: {error}"
    raise ValueError(
      f"{path}: cannot be read as JSON ({reason}). {remedy}"
    ) from error


def as_json(value: Any) -> Any:
  """The value as `read_json` gives it back: tuples are lists."""
  return json.loads(json.dumps(value))
