"""Images with captions in a folder, as Hugging Face's imagefolder lays it out.

`metadata.jsonl`, with {"file_name": "a/1.jpg", "text": "A red cat."} in each
line, or `metadata.csv` with the columns file_name and text. Names are relative
to the folder; other keys and columns are ignored, and blank lines are counted.

A caption has to be a text of bounded length; whether a model can read it, its
text encoder says.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, SupportsIndex

from tensorar_jax import paths
from tensorar_jax.conditioning import captions
from tensorar_jax.data import images, leftovers, splits

USAGE = "captions:<path> of images, with a metadata file of captions"
FILES = ("metadata.jsonl", "metadata.csv")
MAX_LETTERS = 2**20  # of a caption
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_MAX_FIELD = 2**31 - 1  # of a csv: what is too long is skipped, see `check`
_FORM = '{"file_name": "a/1.jpg", "text": "A red cat."}'


def load(argument: str, split: str, data_dir: str | None) -> CaptionedFolder:
  """The images of `<argument>/<split>`, or of `argument` without splits."""
  del data_dir
  return open_captioned_folder(splits.split_folder(argument, split))


def decode(data: bytes, where: str, is_json: bool = False) -> str:
  """Decodes a caption; BrokenSampleError if it is none, or empty."""
  try:
    text = data.decode("utf-8-sig")
    text = json.loads(text)["caption"] if is_json else text
  except (ValueError, LookupError, TypeError, RecursionError) as error:
    form = 'JSON with a "caption"' if is_json else "text in UTF-8"
    reason = f"the caption is no {form} ({type(error).__name__}: {error})"
    raise images.BrokenSampleError(where, reason) from error
  return check(text, where)


def check(text: Any, where: str) -> str:
  """Strips a caption; BrokenSampleError if it is no text, too long or empty."""
  if flaw := captions.flaw(text, MAX_LETTERS):
    raise images.BrokenSampleError(where, f"the caption {flaw}")
  return text.strip()


class Captioned:
  """The properties of every source of images with captions."""

  @property
  def num_classes(self) -> None:
    """None: there are captions in place of classes."""

  @property
  def image_shape(self) -> tuple[None, None, int]:
    """(h, w, C): the sizes may differ."""
    return None, None, 3


@dataclasses.dataclass(frozen=True)
class CaptionedFolder(Captioned):
  """Captioned images by position, decoded when asked for."""

  folder: pathlib.Path
  names: tuple[str, ...]  # of the files, relative to `folder`
  captions: tuple[str | None, ...]
  left_out: leftovers.Counts = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, position: SupportsIndex, /) -> dict[str, Any]:
    name, where = self.names[position], self.where(position)
    images.check_name(name)
    caption = check(self.captions[position], where)
    file = self.folder / name
    try:
      image = images.decode_image(file)
    except OSError as error:
      if error.errno not in _NO_FILE:  # else the disk is at fault
        raise
      raise images.BrokenSampleError(where, "there is no such file") from error
    return {"image": image, "caption": caption}

  def where(self, position: SupportsIndex) -> str:
    """The file of a sample, for messages."""
    return leftovers.shown(str(self.folder / self.names[position]))

  def fingerprint(self) -> str:
    """A digest of names and captions."""
    pairs = json.dumps([self.names, self.captions])
    return hashlib.sha256(pairs.encode()).hexdigest()


def open_captioned_folder(folder: pathlib.Path) -> CaptionedFolder:
  """The images that a folder's metadata file lists; ValueError if it is bad."""
  present = [name for name in FILES if (folder / name).is_file()]
  if len(present) != 1:
    raise ValueError(
      f"{folder} holds {present}; expected exactly one of"
      f" {FILES}, with a line such as {_FORM} for each image"
    )
  file, left_out = folder / present[0], {}
  if file.suffix == ".jsonl":
    rows = list(_read_jsonl(file, left_out))
  else:
    rows = list(_read_csv(file))
  leftovers.say(file, left_out)
  if not rows:
    raise ValueError(f"{file} is empty; expected lines such as {_FORM}")
  names, texts = zip(*rows)
  for name in names:
    paths.check_inside(folder, name, str(file))
  return CaptionedFolder(
    folder=folder, names=names, captions=texts, left_out=left_out
  )


def _open(file: pathlib.Path, **options):
  """Opens a text; a byte that is no UTF-8 becomes half a character there.

  So `captions.flaw` and `images.check_name` find it in the row that has it.
  """
  return file.open(encoding="utf-8-sig", errors="surrogateescape", **options)


def _read_jsonl(file, left_out) -> Iterator[tuple[str, str | None]]:
  with _open(file) as lines:
    for number, line in enumerate(lines, start=1):
      if not line.strip():
        leftovers.add(left_out, "a blank line", f"line {number}")
        continue
      try:
        content = json.loads(line)
      except (ValueError, RecursionError):
        content = None
      yield _row(content, file, number, line)


def _read_csv(file) -> Iterator[tuple[str, str | None]]:
  csv.field_size_limit(_MAX_FIELD)
  with _open(file, newline="") as lines:
    reader = csv.DictReader(lines)
    try:
      for row in reader:
        row = {k: v for k, v in row.items() if v is not None}  # a short row
        yield _row(
          row, file, reader.line_num, ", ".join(map(str, row.values()))
        )
    except csv.Error as error:
      raise ValueError(
        f"{file}, line {reader.line_num}: {error}: write it again"
      ) from error


def _row(content, file, number: int, shown: str) -> tuple[str, str | None]:
  """(file_name, text) of a row; a text that is none is None, for `check`."""
  content = content if isinstance(content, dict) else {}
  name, text = content.get("file_name"), content.get("text")
  if isinstance(name, str) and name and "text" in content:
    return name, text if isinstance(text, str) else None
  if leftovers.shown(shown) != shown:
    raise ValueError(
      f"{file} is no text in UTF-8 (line {number}): write it again"
    )
  raise ValueError(
    f"{file}, line {number} is not of the form {_FORM}:"
    f" {shown[:60].strip()!r}: correct it, or write the file again"
  )
