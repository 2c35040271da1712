"""The files of folders: every regular file once, and nothing else.

Left out, counted and named are: names that begin with a dot and those of
operating systems; pipes, devices and sockets, which have no end; links to
nothing; links to a place in the same tree, where the file is found anyway;
and further links to one file or folder. Links that lead out of the tree, or to
a hidden store in it (as git-annex has one), are followed. Hard links cannot
loop, and are files like any other.
"""

from __future__ import annotations

import os
import pathlib
import stat
from collections.abc import Container, Iterator

from tensorar_jax.data import leftovers

# What Macs, Windows, Linux, NAS systems and Python put beside files.
SYSTEM = {"__MACOSX", "__pycache__", "lost+found", "@eaDir", "#recycle"}
SYSTEM |= {"$RECYCLE.BIN", "System Volume Information", "Thumbs.db"}
SYSTEM |= {"desktop.ini"}
HIDDEN = "hidden, or of the system"
_ENDLESS = "no regular file, but a pipe, socket or device"


def is_hidden(path: str) -> bool:
  """Whether a part of a relative path is hidden or of the system."""
  parts = path.split("/")
  return any(
    part in SYSTEM or (part.startswith(".") and part not in (".", ".."))
    for part in parts
  )


class Tree:
  """A folder and all below it; `left_out` grows as it is looked through."""

  def __init__(self, root: str | os.PathLike):
    self.root = pathlib.Path(root)
    self.left_out: leftovers.Counts = {}
    self._real = os.path.realpath(root)
    self._seen: set[tuple[int, int]] = set()  # (device, inode) of targets

  def entries(self, folder: str = "") -> tuple[list[str], list[str]]:
    """The names of (folders, files) in a folder, sorted; not of those below.

    `folder` and the results are relative to the root.
    """
    folders, files = [], []
    with os.scandir(self.root / folder) as entries:
      for entry in sorted(entries, key=lambda entry: entry.name):
        path = os.path.join(folder, entry.name)
        kind = self._kind(entry, path)
        if kind in ("folder", "file"):
          (folders if kind == "folder" else files).append(path)
        else:
          self.leave_out(kind, path)
    return folders, files

  def walk(self, folder: str = "") -> Iterator[str]:
    """The files below a folder, sorted by directory and then by name."""
    found, waiting = {}, [folder]
    while waiting:
      inner = waiting.pop()
      folders, found[inner] = self.entries(inner)
      waiting += folders
    for inner in sorted(found):
      yield from found[inner]

  def with_ending(self, ending: str, ours: Container[str] = ()) -> list[str]:
    """The files in the root with this ending, sorted; counts the others.

    But not those of the names `ours`, which this project has put there.
    """
    folders, files = self.entries()
    chosen = [name for name in files if name.lower().endswith(ending)]
    for name in sorted({*folders, *files} - {*chosen}):
      if name not in ours:
        self.leave_out(f"not {ending} by the name", name)
    return chosen

  def leave_out(self, reason: str, path: str) -> None:
    """Counts a file or folder as left out."""
    leftovers.add(self.left_out, reason, path)

  def _kind(self, entry: os.DirEntry, path: str) -> str:
    """ "folder", "file", or the reason for which an entry is left out."""
    if is_hidden(path):
      return HIDDEN
    if not entry.is_symlink():
      if entry.is_dir():
        return self._once(entry.stat(), "folder")
      return "file" if entry.is_file() else _ENDLESS
    try:
      target = entry.stat()
    except OSError:
      return "a link to nothing"
    real = os.path.realpath(entry.path)
    if _is_in(real, self._real) and not is_hidden(real[len(self._real) :]):
      return "a link into the folder itself"
    if stat.S_ISREG(target.st_mode):
      return self._once(target, "file")
    if not stat.S_ISDIR(target.st_mode):
      return _ENDLESS
    here = os.path.realpath((self.root / path).parent)
    if _is_in(here, real) or _is_in(self._real, real):
      return "a link to a folder above"
    return self._once(target, "folder")

  def _once(self, target: os.stat_result, kind: str) -> str:
    key = (target.st_dev, target.st_ino)
    if target.st_ino and key in self._seen:
      return "a further link to what is there"
    self._seen.add(key)
    return kind


def _is_in(path: str, folder: str) -> bool:
  return os.path.commonpath([path, folder]) == folder
