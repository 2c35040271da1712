"""Images with captions in tar files, as the WebDataset layout has them.

  000000.jpg  000000.txt  000001.jpg  000001.json  ...

Members with one key are a sample: an image, and a caption in `.txt` or as
"caption" of `.json`. The key is the name without its ending, so that it may
have dots (`photo_1.5x.jpg`). WebDataset itself ends it at the first dot: so a
member that is alone under its key, `0.seg.png`, belongs to the sample `0` if
there is one, and is not read. Of members with one name the last is read, as
when a tar is unpacked; of several images of a sample, the first. Archives
that were joined to one file are read one after the other, each with its own
keys. What is not read is in `left_out`.

Tars stay as they are: only the position of each image and caption is in
memory. Those of a large folder are looked up once and kept in it, in
`webdataset.index.npz`, as long as names, sizes and times of change stay.

A tar that is cut or damaged gives the samples before the damage; the other tars
are read as usual. `damaged` lists the damage.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import tarfile
import time
import zipfile
from concurrent import futures
from typing import Any, BinaryIO, SupportsIndex, cast

import numpy as np
from absl import logging
from jaxtyping import Bool, Int64

from tensorar_jax.data import cache, folders, images, leftovers, splits
from tensorar_jax.data.sources import captions

USAGE = "webdataset:<path> of images with captions in tar files"
INDEX = "webdataset.index.npz"
_WORTH_KEEPING = 2**26  # bytes; in smaller tars members are found at once
_CAPTIONS = (".txt", ".json")
_SCAN = 2  # of the rules above: another number discards the old index
_HEADER = 2**20  # bytes of a long name, and more than any
_MAX_CAPTION = 2**20  # bytes, and the JSON around it
_EXPECTED = (
  "KEY.jpg (or .png, .webp, ...) and KEY.txt (or .json with a caption)"
)
_NONE = (0, -1)  # start and size of a missing part
_DAMAGED_INDEX = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
# Besides its own errors, tarfile has these for damaged extended headers.
_DAMAGED_TAR = (tarfile.TarError, ValueError, LookupError, RecursionError)

Place = tuple[int, int]  # start and size in bytes


def load(argument: str, split: str, data_dir: str | None) -> WebDataset:
  """The samples of `<argument>/<split>`, or of `argument` without splits."""
  del data_dir
  return open_webdataset(splits.split_folder(argument, split))


@dataclasses.dataclass(frozen=True)
class WebDataset(captions.Captioned):
  """Captioned images by position, decoded when asked for.

  Attributes:
    files: the tars, in the order of their names.
    ends: position after the last sample of each.
    places: start and size in bytes of each image, then of each caption; a size
      is -1 where that is missing.
    is_json: how each caption is stored.
    damaged: {"name", "reason", "num_samples" read} of tars that lack their end.
    left_out: files and members that are not read; see `leftovers`.
  """

  folder: pathlib.Path
  files: tuple[pathlib.Path, ...]
  ends: Int64[np.ndarray, " tars"]
  places: Int64[np.ndarray, "n 4"]
  is_json: Bool[np.ndarray, " n"]
  damaged: tuple[dict[str, Any], ...]
  left_out: leftovers.Counts = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, position: SupportsIndex, /) -> dict[str, Any]:
    position = int(position)
    tar = int(np.searchsorted(self.ends, position, side="right"))
    file, places = self.files[tar], self.places[position].tolist()
    where = self.where(position)
    # Opened each time: threads and processes then have nothing to share.
    with file.open("rb") as opened:
      image_data = _read(opened, "image", where, *places[:2])
      caption_data = _read(opened, "caption", where, *places[2:])
    is_json = bool(self.is_json[position])
    caption = captions.decode(caption_data, where, is_json)
    try:
      image = images.decode_image(image_data)
    except images.BrokenImageError as error:
      raise images.BrokenImageError(where, error.reason) from error
    return {"image": image, "caption": caption}

  def where(self, position: int) -> str:
    """The tar of a sample and its number there, for messages."""
    tar = int(np.searchsorted(self.ends, position, side="right"))
    first = self.ends[tar - 1] if tar else 0
    name = leftovers.shown(self.files[tar].name)
    return f"{name}, sample {position - first}"

  def fingerprint(self) -> str:
    """A digest of names and sizes: it changes where tars do."""
    return _digest([(f.name, f.stat().st_size) for f in self.files])


def _read(opened, part: str, where: str, start: int, size: int) -> bytes:
  """Reads a part of a sample; BrokenSampleError at `where` if it is missing."""
  if size < 0:
    reason = f"the {part} is missing; expected {_EXPECTED}"
    raise images.BrokenSampleError(where, reason)
  most = images.MAX_BYTES if part == "image" else _MAX_CAPTION
  if size > most:
    reason = f"the {part} has {size:,} bytes, more than {most:,}"
    raise images.BrokenSampleError(where, reason)
  data = os.pread(opened.fileno(), size, start)
  if len(data) < size:
    raise ValueError(
      f"{opened.name} has become shorter since it was looked through: put the"
      " file back, or start again"
    )
  return data


def open_webdataset(folder: pathlib.Path) -> WebDataset:
  """The samples of all `*.tar` of a folder.

  ValueError where there is no tar, or no sample with image and caption.
  """
  tree = folders.Tree(folder)
  names = tree.with_ending(".tar", ours=(INDEX,))
  files = tuple(folder / name for name in names)
  if not files:
    leftovers.say(folder, tree.left_out)
    raise ValueError(
      f"{folder} holds no .tar files; expected some with members {_EXPECTED};"
      " compressed ones have to be unpacked to .tar first"
    )
  ends, places, is_json, damaged, left_out = _places(folder, files)
  damaged = tuple(json.loads(str(entry)) for entry in damaged)
  left_out = leftovers.merged([tree.left_out, json.loads(str(left_out))])
  leftovers.say(folder, left_out)
  for tar in damaged:
    logging.warning(
      "%s: %s; %d samples before that are used",
      folder / tar["name"],
      tar["reason"],
      tar["num_samples"],
    )
  if not len(places):
    first = f"{damaged[0]['name']}: {damaged[0]['reason']}" if damaged else ""
    raise ValueError(
      f"none of the {len(files)} tars of {folder} holds a sample; expected"
      f" members {_EXPECTED}. {first}"
    )
  if not (places[:, [1, 3]] >= 0).all(axis=1).any():
    kinds = _kinds(files[0])
    raise ValueError(
      f"no sample in the {len(files)} tars of {folder} has an image and a"
      f" caption: {files[0].name} has members {kinds}; expected {_EXPECTED}"
    )
  return WebDataset(
    folder=folder,
    files=files,
    ends=ends,
    places=places,
    is_json=is_json,
    damaged=damaged,
    left_out=left_out,
  )


def _kinds(file: pathlib.Path) -> str:
  """Counts the kinds of members, as "3 x .jpg, 3 x .cls"."""
  with tarfile.open(file, "r:") as tar:
    names = [member.name for member in tar]
  kinds = collections.Counter(os.path.splitext(n)[1] or n for n in names)
  return ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(5))


def _digest(value) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# --- the index ---------------------------------------------------------------


def _places(folder: pathlib.Path, files: tuple[pathlib.Path, ...]):
  """(ends, places, is_json, damaged, left_out), from the cache if it is there.

  Writes the cache if need be.
  """
  stats = [(file.name, file.stat()) for file in files]
  files_now = [(n, s.st_size, s.st_mtime_ns) for n, s in stats]
  stamp = _digest([_SCAN, files_now])
  names = ("ends", "places", "is_json", "damaged", "left_out")
  index = folder / INDEX
  try:
    with np.load(index) as stored:
      if str(stored["stamp"]) == stamp:
        return [stored[name] for name in names]
  except FileNotFoundError:
    pass
  except _DAMAGED_INDEX as error:
    logging.warning("%s is damaged and will be replaced: %s", index, error)
  started, scanned = time.monotonic(), []
  with futures.ThreadPoolExecutor() as pool:
    for done, tar in enumerate(pool.map(_scan, files), start=1):
      scanned.append(tar)
      message = "%s: looked through %d of %d tars"
      logging.log_every_n_seconds(
        logging.INFO, message, 5, folder, done, len(files)
      )
  counts, places, is_json, damaged, left_out = zip(*scanned)
  arrays = {
    "ends": np.cumsum(counts, dtype=np.int64),
    "places": np.concatenate(places),
    "is_json": np.concatenate(is_json),
    "damaged": np.array([json.dumps(tar) for tar in damaged if tar], str),
    "left_out": np.array(json.dumps(leftovers.merged([*left_out]))),
  }
  seconds = time.monotonic() - started
  logging.info(
    "%s: %d samples in %d tars found in %.1f s",
    folder,
    sum(counts),
    len(files),
    seconds,
  )
  if sum(stat.st_size for _, stat in stats) >= _WORTH_KEEPING:
    cache.save(index, stamp=np.array(stamp), **arrays)
  return list(arrays.values())


def _scan(file: pathlib.Path):
  """Scans a tar.

  Returns (number of samples, places, is_json, its damage or None, left_out).
  """
  parts, problem, left_out = [], None, {}
  with file.open("rb") as opened:
    start, headers = 0, _Headers(opened)
    while start is not None:
      archive = _Archive(file.name, left_out)
      end, problem = archive.read(headers, start)
      parts += archive.samples(is_cut=problem is not None)
      start = headers.next_archive(end) if problem is None else None
  places = [(*image, *caption) for image, caption, _ in parts]
  places = np.array(places, np.int64).reshape(-1, 4)
  is_json = np.array([is_json for *_, is_json in parts], bool)
  if problem:
    name = leftovers.shown(file.name)
    problem = {"name": name, "reason": problem, "num_samples": len(places)}
  return len(places), places, is_json, problem, left_out


class _Headers:
  """A tar as `tarfile` reads it, which has to read headers only.

  Other sizes than such a file can have are errors of tarfile's own: it would
  seek to them, or read as much.
  """

  def __init__(self, file: BinaryIO):
    self._file, self.size = file, os.fstat(file.fileno()).st_size
    self.tell = file.tell

  def seek(self, position: int) -> int:
    if not 0 <= position <= self.size:
      raise tarfile.ReadError(f"the file has no byte {position}")
    return self._file.seek(position)

  def read(self, size: int) -> bytes:
    if not 0 <= size <= _HEADER:
      raise tarfile.ReadError(f"a header of {size} bytes")
    return self._file.read(size)

  def next_archive(self, end: int) -> int | None:
    """Where the next archive of the file begins: the first byte not zero."""
    self._file.seek(end)
    while block := self._file.read(_HEADER):
      if rest := block.lstrip(b"\0"):
        return end + len(block) - len(rest)
      end += len(block)
    return None


class _Archive:
  """The samples of one archive, as its members come."""

  def __init__(self, tar: str, left_out: leftovers.Counts):
    self._tar, self._left_out = tar, left_out
    self._samples: dict[str, dict[str, Place]] = {}
    self._last = ""  # the key of the last member

  def read(self, file: _Headers, start: int) -> tuple[int, str | None]:
    """Reads the members: (where they end, what is wrong there or None)."""
    end = start
    try:
      file.seek(start)
      with tarfile.open(fileobj=cast(BinaryIO, file), mode="r:") as tar:
        for member in tar:
          self._add(member, file.size)
        end = tar.offset  # after the last member, whatever its type
    except _DAMAGED_TAR as error:
      return end, f"it cannot be read to its end ({error})"
    return end, _wrong_end(file, end)

  def _add(self, member: tarfile.TarInfo, file_size: int) -> None:
    name = os.path.normpath(member.name)
    key, kind = os.path.splitext(name)
    kind = kind.lower()
    if member.isdir():
      return
    if folders.is_hidden(name):
      return self._leave_out(folders.HIDDEN, name)
    if not member.isreg() or member.issparse():
      return self._leave_out("a link, or another special member", name)
    if kind not in images.EXTENSIONS + _CAPTIONS:
      return self._leave_out("no image or caption by its name", name)
    self._last = key
    if not 0 <= member.size <= file_size - member.offset_data:
      raise tarfile.ReadError(
        f"{name} has {member.size} bytes by its header, the file only"
        f" {file_size}"
      )
    sample = self._samples.setdefault(key, {})
    if kind in sample:
      self._leave_out("followed by another member of that name", name)
    sample[kind] = member.offset_data, member.size

  def _leave_out(self, reason: str, name: str) -> None:
    leftovers.add(self._left_out, reason, f"{self._tar}: {name}")

  def samples(self, is_cut: bool) -> list[tuple[Place, Place, bool]]:
    """(place of the image, of the caption, whether that is JSON) of each.

    The last one is left out where the tar is cut in the middle of it.
    """
    found = []
    for key, sample in self._samples.items():
      pictures = [kind for kind in sample if kind not in _CAPTIONS]
      is_whole = pictures and len(pictures) < len(sample)
      if not is_whole and is_cut and key == self._last:
        continue
      if not is_whole and self._continues(key):
        for kind in sample:
          self._leave_out("a further part of a sample", key + kind)
        continue
      for kind in pictures[1:]:
        self._leave_out("a further image of a sample", key + kind)
      image = sample[pictures[0]] if pictures else _NONE
      caption = sample.get(".txt", sample.get(".json", _NONE))
      is_json = ".txt" not in sample and ".json" in sample
      found.append((image, caption, is_json))
    return found

  def _continues(self, key: str) -> bool:
    """Whether a key is that of another sample, a dot, and more."""
    folder, slash, key = key.rpartition("/")
    while "." in key:
      key = key.rpartition(".")[0]
      if folder + slash + key in self._samples:
        return True
    return False


def _wrong_end(file: _Headers, end: int) -> str | None:
  """What is wrong at the end of the members of a tar, or None.

  Python takes any block that is no header for the end, a block of zeros.
  """
  file.seek(min(end, file.size))
  block = file.read(512)
  if block == bytes(512):
    return None
  problem = "a damaged member" if len(block) == 512 else "the end of the file"
  return (
    f"{problem} at byte {end}, where a member or the mark of the end belongs"
  )
