"""Locks on files that die with their owner, on one host or on a shared disk.

A lock is `flock` on a file of its own, which holds host and process id of the
owner. The kernel frees it when the owner ends, however it ends. NFS passes it
to the server, so that it holds between hosts; where a file system has no locks
(some mounts of Lustre, some of FUSE), a warning says so and nothing is locked.
A released lock leaves no file, that of a killed owner stays until the next one.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from absl import logging

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTTY)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_SECONDS_TO_SIGN = 1.0


@contextlib.contextmanager
def lock(path: pathlib.Path, wait: bool = True) -> Iterator[bool]:
  """Holds the lock file `path`; yields whether it does.

  With `wait` False it does not if another process, or another context of this
  one, holds it. In a folder that nobody may write to, it locks nothing.
  """
  try:
    handle = _acquire(path, wait)
  except OSError as error:
    if error.errno not in _READ_ONLY:
      raise
    yield True
    return
  if handle is None:
    yield False
    return
  try:
    _sign(handle)
    yield True
  finally:
    _release(handle, path)


def create(path: pathlib.Path) -> int:
  """Makes a file that is not there yet, locked until its handle is closed."""
  while True:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    _flock(handle, path, wait=True)
    if _is_at(handle, path):  # not taken for a leftover in between
      return handle
    os.close(handle)


def remove_if_free(path: pathlib.Path) -> None:
  """Removes a file unless somebody holds it, or nobody can tell."""
  with contextlib.suppress(OSError):
    handle = os.open(path, os.O_RDWR)
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if _is_at(handle, path):
        path.unlink()
    finally:
      os.close(handle)


def _release(handle: int, path: pathlib.Path) -> None:
  """Removes a lock file that is held, and frees it."""
  with contextlib.suppress(OSError):
    if _is_at(handle, path):
      path.unlink()
  os.close(handle)


def owner(path: pathlib.Path) -> str:
  """Who holds a lock file: host, process id and since when, in words."""
  end = time.monotonic() + _SECONDS_TO_SIGN
  while time.monotonic() < end:
    time.sleep(_SECONDS_TO_SIGN / 20)  # it signs right after it has locked
    with contextlib.suppress(OSError):
      if text := path.read_text(errors="replace").strip():
        return text[:300]
  return "another process"


def _acquire(path: pathlib.Path, wait: bool) -> int | None:
  while True:
    try:
      handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # another process has removed the empty folder
      path.parent.mkdir(parents=True, exist_ok=True)
      continue
    try:
      locked = _flock(handle, path, wait)
      if locked and _is_at(handle, path):
        return handle
    except BaseException:
      os.close(handle)
      raise
    os.close(handle)
    if not locked:
      return None
    # Its owner has removed it between our opening and our locking it.


def _flock(handle: int, path: pathlib.Path, wait: bool) -> bool:
  """Whether the lock is held now; True, with a warning, without locks."""
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except (BlockingIOError, PermissionError):
    return False
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    logging.log_first_n(
      logging.WARNING,
      "%s: this file system has no locks (%s): see to it yourself that no"
      " other process writes there",
      1,
      path.parent,
      error,
    )
  return True


def _is_at(handle: int, path: pathlib.Path) -> bool:
  """Whether the open file has this name, and was not removed meanwhile."""
  try:
    # Opening asks a file server again, `stat` might not.
    other = os.open(path, os.O_RDONLY)
  except FileNotFoundError:
    return False
  try:
    return os.path.samestat(os.fstat(handle), os.fstat(other))
  finally:
    os.close(other)


def _sign(handle: int) -> None:
  now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
  text = f"process {os.getpid()} on host {socket.gethostname()}, since {now}"
  os.ftruncate(handle, 0)
  os.pwrite(handle, f"{text}\n".encode(), 0)
