"""Images with captions in tar files, as the WebDataset layout has them.

  000000.jpg  000000.txt  000001.jpg  000001.json  ...

Consecutive members with one key, the name up to the first dot after the last
slash, are a sample: an image, and a caption in `.txt` or as "caption" of
`.json`. Tars stay as they are: only the position of each image and caption is
in memory. Those of a large folder are looked up once and kept in it, in
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
import re
import tarfile
import time
import zipfile
from concurrent import futures
from typing import Any, SupportsIndex

import numpy as np
from absl import logging
from jaxtyping import Bool, Int64

from tensorar_jax.data import cache, images, splits
from tensorar_jax.data.sources import captions

USAGE = "webdataset:<path> of images with captions in tar files"
INDEX = "webdataset.index.npz"
_WORTH_KEEPING = 2**26  # bytes; in smaller tars members are found at once
_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^/.]+)\.(?P<kind>[^/]*)")
_CAPTIONS = (".txt", ".json")
_EXPECTED = (
  "KEY.jpg (or .png, .webp, ...) and KEY.txt (or .json with a caption)"
)
_NONE = (0, -1)  # start and size of a missing part
_DAMAGED_INDEX = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


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
  """

  folder: pathlib.Path
  files: tuple[pathlib.Path, ...]
  ends: Int64[np.ndarray, " tars"]
  places: Int64[np.ndarray, "n 4"]
  is_json: Bool[np.ndarray, " n"]
  damaged: tuple[dict[str, Any], ...]

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, position: SupportsIndex, /) -> dict[str, Any]:
    position = int(position)
    tar = int(np.searchsorted(self.ends, position, side="right"))
    file, places = self.files[tar], self.places[position].tolist()
    first = self.ends[tar - 1] if tar else 0
    where = f"{file.name}, sample {position - first}"
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

  def fingerprint(self) -> str:
    """A digest of names and sizes: it changes where tars do."""
    return _digest([(f.name, f.stat().st_size) for f in self.files])


def _read(opened, part: str, where: str, start: int, size: int) -> bytes:
  """Reads a part of a sample; BrokenSampleError at `where` if it is missing."""
  if size < 0:
    reason = f"the {part} is missing; expected {_EXPECTED}"
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
  files = tuple(sorted(folder.glob("*.tar")))
  if not files:
    raise ValueError(
      f"{folder} holds no .tar files; expected some with members {_EXPECTED};"
      " compressed ones have to be unpacked to .tar first"
    )
  ends, places, is_json, damaged = _places(folder, files)
  damaged = tuple(json.loads(str(entry)) for entry in damaged)
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
  )


def _kinds(file: pathlib.Path) -> str:
  """Counts the kinds of members, as "3 x .jpg, 3 x .cls"."""
  with tarfile.open(file, "r:") as tar:
    names = [member.name for member in tar]
  kinds = collections.Counter(_split(name)[1] or name for name in names)
  return ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(5))


def _digest(value) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# --- the index ---------------------------------------------------------------


def _places(folder: pathlib.Path, files: tuple[pathlib.Path, ...]):
  """(ends, places, is_json, damaged), from the cache, written if need be."""
  stats = [(file.name, file.stat()) for file in files]
  stamp = _digest([(n, s.st_size, s.st_mtime_ns) for n, s in stats])
  index, names = folder / INDEX, ("ends", "places", "is_json", "damaged")
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
  counts, places, is_json, damaged = zip(*scanned)
  arrays = {
    "ends": np.cumsum(counts, dtype=np.int64),
    "places": np.concatenate(places),
    "is_json": np.concatenate(is_json),
    "damaged": np.array([json.dumps(tar) for tar in damaged if tar], str),
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
  """Scans a tar: (number of samples, places, is_json, its damage or None)."""
  samples: list[dict[str, tuple[int, int]]] = []
  size, end, key, problem = file.stat().st_size, 0, None, None
  try:
    with tarfile.open(file, "r:") as tar:
      for member in tar:
        end = member.offset_data + -(-member.size // 512) * 512
        new, kind = _split(member.name) if member.isfile() else (None, None)
        if kind is None or kind not in images.EXTENSIONS + _CAPTIONS:
          continue
        if new != key:
          samples.append({})
          key = new
        samples[-1].setdefault(kind, (member.offset_data, member.size))
    problem = _wrong_end(file, end)
  except tarfile.TarError as error:
    problem = f"it cannot be read to its end ({error})"
  parts = list(map(_parts, samples))
  if problem and parts:  # the last sample may be cut in two
    image, caption, _ = parts[-1]
    inside = all(n >= 0 and start + n <= size for start, n in (image, caption))
    parts = parts if inside else parts[:-1]
  places = [(*image, *caption) for image, caption, _ in parts]
  places = np.array(places, np.int64).reshape(-1, 4)
  is_json = np.array([is_json for *_, is_json in parts], bool)
  if problem:
    count = len(places)
    problem = {"name": file.name, "reason": problem, "num_samples": count}
  return len(places), places, is_json, problem


def _split(name: str) -> tuple[str | None, str | None]:
  """(key, ".kind" in lower case) of a member; None if it has no kind."""
  match = _MEMBER.fullmatch(name)
  return (match["key"], f".{match['kind'].lower()}") if match else (None, None)


def _parts(sample: dict[str, tuple[int, int]]):
  """(place of the image, of the caption, whether that is JSON)."""
  image = next((p for k, p in sample.items() if k not in _CAPTIONS), _NONE)
  return (
    image,
    sample.get(".txt", sample.get(".json", _NONE)),
    ".txt" not in sample and ".json" in sample,
  )


def _wrong_end(file: pathlib.Path, end: int) -> str | None:
  """What is wrong at the end of the members of a tar, or None.

  Python takes any block that is no header for the end, a block of zeros.
  """
  with file.open("rb") as opened:
    opened.seek(end)
    block = opened.read(512)
  if block == bytes(512):
    return None
  problem = "a damaged member" if len(block) == 512 else "the end of the file"
  return (
    f"{problem} at byte {end}, where a member or the mark of the end belongs"
  )
