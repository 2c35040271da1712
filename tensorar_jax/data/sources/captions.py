"""Images with captions in a folder, as Hugging Face's imagefolder lays it out.

`metadata.jsonl`, with {"file_name": "a/1.jpg", "text": "A red cat."} in each
line, or `metadata.csv` with the columns file_name and text. Names are relative
to the folder; other keys and columns are ignored.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, SupportsIndex

from tensorar_jax.conditioning import captions
from tensorar_jax.data import images, splits

USAGE = "captions:<path> of images, with a metadata file of captions"
FILES = ("metadata.jsonl", "metadata.csv")
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
  """Strips a caption; BrokenSampleError if it has no words."""
  # A text encoder would refuse the whole batch.
  if not isinstance(text, str) or not captions.clean(text):
    reason = f"the caption {str(text)[:60]!r} has no words"
    raise images.BrokenSampleError(where, reason)
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
  captions: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, position: SupportsIndex, /) -> dict[str, Any]:
    file = self.folder / self.names[position]
    caption = check(self.captions[position], str(file))
    if not file.is_file():
      raise images.BrokenSampleError(str(file), "there is no such file")
    return {"image": images.decode_image(file), "caption": caption}

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
  file = folder / present[0]
  read = _read_jsonl if file.suffix == ".jsonl" else _read_csv
  try:
    rows = list(read(file))
  except (UnicodeDecodeError, csv.Error) as error:
    raise ValueError(
      f"{file} is no text in UTF-8 ({error}): write it again"
    ) from error
  if not rows:
    raise ValueError(f"{file} is empty; expected lines such as {_FORM}")
  names, texts = zip(*rows)
  return CaptionedFolder(folder=folder, names=names, captions=texts)


def _read_jsonl(file: pathlib.Path) -> Iterator[tuple[str, str]]:
  with file.open(encoding="utf-8-sig") as lines:
    for number, line in enumerate(lines, start=1):
      try:
        content = json.loads(line)
      except (ValueError, RecursionError):
        content = None
      yield _row(content, f"{file}, line {number}", line)


def _read_csv(file: pathlib.Path) -> Iterator[tuple[str, str]]:
  with file.open(encoding="utf-8-sig", newline="") as lines:
    for row in (reader := csv.DictReader(lines)):
      yield _row(row, f"{file}, line {reader.line_num}", str(row))


def _row(content: Any, where: str, shown: str) -> tuple[str, str]:
  content = content if isinstance(content, dict) else {}
  row = content.get("file_name"), content.get("text")
  if not all(isinstance(value, str) for value in row) or not row[0]:
    raise ValueError(
      f"{where} is not of the form {_FORM}: {shown[:60].strip()!r}: correct it,"
      " or write the file again"
    )
  return row
