"""Published weights by name: `hf://OWNER/REPOSITORY/FILE`, or a path.

A name is looked up in this order: the folder for files that were fetched by
hand (`weights/OWNER/REPOSITORY/FILE`), the cache of `huggingface_hub`, the hub.
That library's variables, such as HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, work as
usual. `@REVISION`, a branch, tag or commit, follows the repository or ends the
name; a name without a file stands for a folder. Downloads must have the digest
that the hub gives, and nothing in them is ever run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable
from typing import Literal, overload

from absl import logging

from tensorar_jax.checkpoints.files import read_json
from tensorar_jax.checkpoints.locations import DIGESTS, LOCATIONS, SCHEME

BY_HAND = pathlib.Path("weights")  # of the directory that a command runs in
INDEX = ".index.json"  # names the file of each tensor of a divided model
# The files of a published folder that are read, and the first weights it has.
SETTINGS = "config.json"
EXTRAS = ("tokenizer.json", "preprocessor_config.json")
WEIGHTS = (
  "model.safetensors",
  f"model.safetensors{INDEX}",
  "pytorch_model.bin",
  f"pytorch_model.bin{INDEX}",
)
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # of git, of large files


@dataclasses.dataclass(frozen=True)
class Name:
  """A repository of the hub and a file in it, or all of it: file=''."""

  repository: str
  file: str = ""
  revision: str | None = None

  @property
  def by_hand(self) -> pathlib.Path:
    """Where to put a copy that was downloaded by hand."""
    at = f"@{self.revision}" if self.revision else ""
    return (BY_HAND / f"{self.repository}{at}" / self.file).absolute()

  @property
  def url(self) -> str:
    from huggingface_hub import constants, hf_hub_url

    if self.file:
      return hf_hub_url(self.repository, self.file, revision=self.revision)
    tree = f"/tree/{self.revision}" if self.revision else ""
    return f"{constants.ENDPOINT}/{self.repository}{tree}"


def is_name(source: str | pathlib.Path) -> bool:
  """Whether `source` is a name on the hub, not a path."""
  return bool(re.match("hf:/", str(source)))


def parse(source: str | pathlib.Path) -> Name:
  """The parts of `hf://OWNER/REPOSITORY[@REVISION][/FILE][@REVISION]`."""
  from huggingface_hub import parse_hf_uri

  # A pathlib.Path has one slash left of two.
  text = SCHEME + re.sub("^hf:/+", "", str(source))
  try:
    uri = parse_hf_uri(text)
  except ValueError as error:
    raise ValueError(
      f"{source}: expected {SCHEME}OWNER/REPOSITORY/FILE, with @REVISION at the"
      f" end if not the newest. ({error})"
    ) from error
  file, _, revision = uri.path_in_repo.partition("@")
  if uri.type != "model" or ".." in file.split("/"):
    raise ValueError(
      f"{source}: expected a file of a model's repository, as"
      f" {SCHEME}OWNER/REPOSITORY/FILE."
    )
  return Name(repository=uri.id, file=file, revision=revision or uri.revision)


def find(source: str | pathlib.Path) -> pathlib.Path:
  """The local file or folder of a name or path; downloads what is missing.

  A path is returned as it is, whether or not it exists. ValueError for a name
  that cannot be downloaded, with the URL and where to put the file by hand, and
  for a digest that differs from the hub's or the known one.
  """
  if not is_name(source):
    path = pathlib.Path(source)
  else:
    name = parse(source)
    by_hand = name.by_hand if name.file else name.by_hand / SETTINGS
    path = name.by_hand if by_hand.is_file() else _fetch(name)
  if path.is_file():
    _verify_known(path)
  return path


def _fetch(name: Name) -> pathlib.Path:
  if not name.file:
    return _download_folder(name)
  path = _download(name)
  if name.file.endswith(INDEX):
    _download_parts(name, path)
  return path


def location(path: str | pathlib.Path) -> str | None:
  """The hub name or URL of what is published under the file name of `path`.

  A file whose name many models share is recognised by its folder.
  """
  path = pathlib.Path(path)
  folder = path.parent.name
  in_folder = f"{folder}/{path.name}"
  if folder in LOCATIONS and in_folder not in LOCATIONS:
    return f"{LOCATIONS[folder]}/{path.name}"
  return LOCATIONS.get(in_folder, LOCATIONS.get(path.name))


def advice(path: pathlib.Path) -> str:
  """Says how to get a published file or folder that is missing at `path`."""
  source = location(path)
  if source is None:
    return "Download the published checkpoint and pass its path."
  if not is_name(source):
    return f"Download {source} and put it there."
  return (
    f"Download {parse(source).url} and put it there, or give its name,"
    f" {source}, to have it downloaded."
  )


def weights_of(folder: pathlib.Path) -> pathlib.Path:
  """The file in a published folder that holds, or divides, its weights."""
  for name in WEIGHTS:
    if (folder / name).is_file():
      return folder / name
  raise ValueError(
    f"{folder}: found none of {WEIGHTS}. Download the weights into it."
  )


def parts_of(index: pathlib.Path) -> dict[pathlib.Path, set[str]]:
  """file -> names of its tensors, of every file that an index names."""
  try:
    files = read_json(index)["weight_map"]
    beside = all(
      pathlib.Path(f).name == f != index.name for f in files.values()
    )
  except (ValueError, KeyError, TypeError, AttributeError):
    files, beside = {}, False
  if not (files and beside):
    raise ValueError(
      f"{index}: no index of a divided model, which has a 'weight_map' from the"
      " names of tensors to files beside it. Download it again."
    )
  parts = {index.parent / file: set() for file in sorted({*files.values()})}
  for name, file in files.items():
    parts[index.parent / file].add(name)
  return parts


# --- downloads -------------------------------------------------------------


def _download_folder(name: Name) -> pathlib.Path:
  """Downloads what is read of a published folder; returns the folder."""

  def beside(file: str, commit: str | None = name.revision) -> Name:
    return dataclasses.replace(name, file=file, revision=commit)

  folder = _download(beside(SETTINGS), whole=name).parent
  # One commit for all, also if the branch moves in between.
  for file in EXTRAS:
    _download(beside(file, folder.name), whole=name, optional=True)
  for file in WEIGHTS:
    at = beside(file, folder.name)
    if path := _download(at, whole=name, optional=True):
      if file.endswith(INDEX):
        _download_parts(at, path, whole=name)
      return folder
  raise ValueError(
    _refusal(name, f"it has none of {WEIGHTS}, or the cache has none of them")
  )


def _download_parts(
  name: Name, index: pathlib.Path, whole: Name | None = None
) -> None:
  """Downloads the files that an index names."""
  folder = pathlib.PurePosixPath(name.file).parent
  for part in parts_of(index):
    file = str(folder / part.name)
    commit = _commit_of(index, name)
    _download(
      dataclasses.replace(name, file=file, revision=commit), whole=whole
    )


def _commit_of(path: pathlib.Path, name: Name) -> str:
  return path.parents[len(pathlib.PurePosixPath(name.file).parts) - 1].name


@overload
def _download(
  name: Name, *, whole: Name | None = None, optional: Literal[False] = False
) -> pathlib.Path: ...


@overload
def _download(
  name: Name, *, whole: Name | None = None, optional: Literal[True]
) -> pathlib.Path | None: ...


def _download(
  name: Name, *, whole: Name | None = None, optional: bool = False
) -> pathlib.Path | None:
  """Downloads and verifies a file; None for an optional one that is missing.

  `whole` is the folder that the file is fetched for, which errors then name.
  """
  import huggingface_hub
  from huggingface_hub import errors

  try:
    path = huggingface_hub.hf_hub_download(
      name.repository, name.file, revision=name.revision
    )
  except errors.EntryNotFoundError as error:  # also: offline and not cached
    if optional:
      return None
    raise ValueError(_refusal(whole or name, _reason(name, error))) from error
  except Exception as error:  # of the library, its HTTP client or the disk
    raise ValueError(_refusal(whole or name, _reason(name, error))) from error
  _verify_download(name, pathlib.Path(path))
  return pathlib.Path(path)


def _refusal(name: Name, reason: str) -> str:
  at = f"@{name.revision}" if name.revision else ""
  file = f"/{name.file}" if name.file else ""
  what = "" if name.file else f" ({SETTINGS}, {', '.join(EXTRAS)}, weights)"
  return (
    f"{SCHEME}{name.repository}{at}{file}: {reason}. By hand: download"
    f" {name.url}{what} and put it at {name.by_hand}."
  )


def _reason(name: Name, error: Exception) -> str:
  """Why a download failed, in a few words."""
  from huggingface_hub import constants, errors

  if isinstance(error, errors.GatedRepoError):
    page = f"{constants.ENDPOINT}/{name.repository}"
    return (
      f"access is restricted: accept the conditions on {page} and set HF_TOKEN"
    )
  if isinstance(error, errors.RepositoryNotFoundError):
    return (
      f"there is no repository {name.repository}, or it is private and HF_TOKEN"
      " does not open it"
    )
  if isinstance(error, errors.RevisionNotFoundError):
    return f"the repository has no revision {name.revision!r}"
  if isinstance(error, errors.LocalEntryNotFoundError):
    cause = error.__cause__ or error
    why = (
      "HF_HUB_OFFLINE is set"
      if constants.is_offline_mode()
      else f"{constants.ENDPOINT} does not answer ({_first_line(cause)})"
    )
    return f"{why}, and {name.file} is not in {constants.HF_HUB_CACHE}"
  if isinstance(error, errors.EntryNotFoundError):
    return f"the repository has no file {name.file}"
  return f"the download of {name.file} failed ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
  return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --- digests ---------------------------------------------------------------


def _verify_download(name: Name, path: pathlib.Path) -> None:
  """ValueError unless a file of the cache has the digest that the hub gave.

  The file is a link to content that the cache names by its digest. On a file
  system without links the digest is not known, and nothing is compared.
  """
  want = pathlib.Path(os.readlink(path)).name if path.is_symlink() else ""
  if not _ETAG.fullmatch(want):
    logging.warning("%s: without a digest of the hub, not verified", path)
    return
  digest = _digest(path, git=len(want) == 40)
  if digest != want:
    content = path.parent / os.readlink(path)
    raise ValueError(
      _refusal(
        name,
        f"the digest is {digest}, the hub's {want}: the download is damaged."
        f" Remove {path} and {content.resolve()}, and start again",
      )
    )


def _verify_known(path: pathlib.Path) -> None:
  want = DIGESTS.get(path.name)
  if want and not (digest := _digest(path)).startswith(want):
    raise ValueError(
      f"{path}: the sha256 is {digest}, expected it to start with {want}. The"
      f" file is damaged or another one: {advice(path)}"
    )


def _digest(path: pathlib.Path, git: bool = False) -> str:
  status = path.stat()
  return _digest_once(path, status.st_size, status.st_mtime_ns, git)


@functools.cache  # weights are opened more than once by one import
def _digest_once(path, size, changed, git) -> str:
  del changed
  digest: Callable = hashlib.sha256
  if git:
    digest = lambda: hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
  with path.open("rb") as file:
    return hashlib.file_digest(file, digest).hexdigest()
