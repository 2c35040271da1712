"""Token shards: what `tokenize` writes and training reads.

A folder of ArrayRecord files, one record per image, little-endian:

  "TOK1" | label int32 | A uint16 | T uint32 | F uint8 | bytes per code uint8 |
  A T F codes, uint16 or uint32

for A variants of an image (crops, flips) in T tokens of F sub-tokens. Behind
them stand, for an image with a text, whose label is -1, the features of the
text's own tokens, [P, E] for a P that differs from text to text: no padding is
stored. They have the type that the text encoder gave them, so none is rounded.

Beside the files `manifest.json` says what they have in common: vocabularies,
grid, classes or text features, recipe, and the records of every shard. It is
written last; a folder without it is not complete.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import math
import pathlib
import struct
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
from array_record.python import array_record_module
from jaxtyping import Integer, Num

from tensorar_jax.conditioning import conditions
from tensorar_jax.data import codes as codes_lib

MANIFEST = "manifest.json"
FORMAT = 1
# Codes are close to random bits: compression would save 4 % of 14-bit codes.
WRITER_OPTIONS = "group_size:1,uncompressed"
_HEADER = struct.Struct("<4siHIBB")
_MAGIC = b"TOK1"
_CODE_TYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_KEYS = {"shards", "grid", "num_variants", "vocab_sizes", "class_names"}
_KEYS |= {"format", "num_classes"}

Codes = Integer[np.ndarray, "A T F"]
# What an image is of: its class, or the features of its text.
Subject = int | Num[np.ndarray, "P E"]


@dataclasses.dataclass(frozen=True)
class TextFormat:
  """The features of texts: `width` of a token, at most `length` tokens."""

  width: int
  length: int
  dtype: str

  def rows(self, data: bytes) -> Num[np.ndarray, "P E"] | None:
    """The features in what stands behind the codes, None if it is not them."""
    dtype = jnp.dtype(self.dtype)
    count, rest = divmod(len(data), self.width * dtype.itemsize)
    if rest or not 1 <= count <= self.length:
      return None
    return np.frombuffer(data, dtype).reshape(count, self.width)


def code_type(vocab_sizes: Sequence[int]) -> np.dtype:
  """The type in which codes of these vocabularies are stored."""
  return _CODE_TYPES[2 if max(vocab_sizes) <= 2**16 else 4]


def pack(subject: Subject, codes: Codes, dtype: np.dtype) -> bytes:
  """The record of an image; `dtype` is of `code_type`."""
  is_label = isinstance(subject, int | np.integer)
  label, text = (subject, b"") if is_label else (-1, subject.tobytes())
  header = _HEADER.pack(_MAGIC, label, *codes.shape, dtype.itemsize)
  return header + codes.astype(dtype).tobytes() + text


def unpack(
  record: bytes, where: str, text: TextFormat | None = None
) -> tuple[Subject, Codes]:
  """(subject, codes [A, T, F]) of a record; `where` is named in errors."""
  problem = f"{len(record)} bytes are fewer than a header's {_HEADER.size}"
  if len(record) >= _HEADER.size:
    magic, label, *shape, width = _HEADER.unpack_from(record)
    size = _HEADER.size + math.prod(shape) * width
    behind = record[size:]
    subject = text.rows(behind) if text else None if behind else label
    fits = subject is not None and len(record) >= size
    if magic == _MAGIC and width in _CODE_TYPES and fits:
      codes = np.frombuffer(record[:size], _CODE_TYPES[width], -1, _HEADER.size)
      return subject, codes.reshape(shape)
    expected = f" and rows of {text}" if text else ""
    problem = (
      f"header {record[: _HEADER.size]!r} with {len(record)} bytes in all; "
      f"expected {_MAGIC!r} and {size} bytes{expected}"
    )
  raise ValueError(f"{where} is no record of tokens: {problem}")


@dataclasses.dataclass(frozen=True)
class TokenShards:
  """See `codes.TokenSource`; the class of every variant is the image's."""

  folder: pathlib.Path
  names: tuple[str, ...]
  ends: tuple[int, ...]  # position after the last image of each shard
  records: Any  # random access to bytes
  grid: tuple[int, int]
  num_variants: int
  vocab_sizes: tuple[int, ...]
  num_classes: int | None
  class_names: tuple[str, ...]
  text: TextFormat | None = None  # of images with texts in place of classes

  @property
  def num_tokens(self) -> int:
    return math.prod(self.grid)

  def __len__(self) -> int:
    return self.ends[-1]

  def fetch(
    self,
    positions: Integer[np.ndarray, " b"],
    variants: Integer[np.ndarray, " b"],
  ) -> dict[str, Any]:
    """See `codes.TokenSource`."""
    shape = (self.num_tokens, len(self.vocab_sizes))
    tokens = np.empty((len(positions), *shape), np.int32)
    subjects = []
    for i, (position, variant) in enumerate(zip(positions, variants)):
      # One by one: grain's reading of many at once costs three times as much.
      subject, tokens[i] = self._read(int(position), int(variant))
      subjects.append(subject)
    if not self.text:
      return {"tokens": tokens, "label": np.array(subjects, np.int32)}
    text, mask = conditions.pad_left(subjects, self.text.length)
    return {"tokens": tokens, "text": text, "text_mask": mask}

  def check(self) -> None:
    """ValueError for the first damaged record; reads all of them."""
    for position in range(len(self)):
      self._read(position, ...)

  def _read(self, position: int, variant: int | EllipsisType):
    """(subject, codes) of one variant, or of all; only those are checked."""
    where = self._where(position)
    try:
      record = self.records[position]
    except RuntimeError as error:  # what Riegeli raises, for instance
      raise ValueError(
        f"{where} is damaged ({error}): delete the shard and tokenize again, "
        "which replaces it"
      ) from error
    subject, codes = unpack(record, where, self.text)
    shape = (self.num_variants, self.num_tokens, len(self.vocab_sizes))
    if codes.shape != shape:
      raise ValueError(
        f"{where} holds codes {codes.shape}; expected {shape} as {MANIFEST} "
        "says: the shard is of another folder"
      )
    codes = codes[variant]
    codes_lib.check_codes(where, codes, self.vocab_sizes)
    if not self.text:
      codes_lib.check_label(where, subject, self.num_classes)
    return subject, codes

  def _where(self, position: int) -> str:
    shard = bisect.bisect_right(self.ends, position)
    start = self.ends[shard - 1] if shard else 0
    return f"{self.folder}/{self.names[shard]}, record {position - start}"


def open_shards(folder: pathlib.Path) -> TokenShards:
  """The shards of a complete folder; ValueError where something is missing."""
  manifest = read_manifest(folder)
  # An empty shard, all of whose images were broken, has nothing to read.
  counts = {name: n for name, n in manifest["shards"].items() if n}
  if not counts:
    raise ValueError(f"{folder / MANIFEST} lists no image; expected some")
  for name, expected in counts.items():
    found = count_records(folder / name)
    if found != expected:
      raise ValueError(
        f"{folder / name} holds {found} records; expected {expected} as "
        f"{MANIFEST} says: copy the folder again"
      )
  text = manifest.get("text")
  fields = [field.name for field in dataclasses.fields(TextFormat)]
  return TokenShards(
    folder=folder,
    names=tuple(counts),
    ends=tuple(itertools.accumulate(counts.values())),
    records=grain.sources.ArrayRecordDataSource(
      [str(folder / name) for name in counts]
    ),
    grid=tuple(manifest["grid"]),
    num_variants=manifest["num_variants"],
    vocab_sizes=tuple(manifest["vocab_sizes"]),
    num_classes=manifest["num_classes"],
    class_names=tuple(manifest["class_names"]),
    text=TextFormat(**{name: text[name] for name in fields}) if text else None,
  )


def count_records(file: pathlib.Path) -> int:
  """The number of records of a shard; ValueError if it is cut short."""
  if not file.is_file():
    raise ValueError(f"{file} is missing; {MANIFEST} lists it")
  try:
    reader = array_record_module.ArrayRecordReader(str(file))
    count = reader.num_records()
    reader.close()
  except RuntimeError as error:
    raise ValueError(
      f"{file} is no complete shard ({error}): copy the folder again"
    ) from error
  return count


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """What `tokenize` wrote last."""
  file = folder / MANIFEST
  if not file.is_file():
    raise ValueError(
      f"{file} is missing; expected a folder that --mode=tokenize has "
      "completed: run it again, it continues where it stopped"
    )
  try:
    manifest = json.loads(file.read_text())
  except ValueError as error:
    raise ValueError(f"{file} is no JSON ({error})") from error
  if not isinstance(manifest, dict) or (missing := _KEYS - manifest.keys()):
    lacks = sorted(missing) if isinstance(manifest, dict) else "all keys"
    raise ValueError(f"{file} is no manifest of token shards: it lacks {lacks}")
  if manifest["format"] != FORMAT:
    raise ValueError(
      f"{file} is of format {manifest['format']}; expected {FORMAT}: tokenize "
      "again"
    )
  return manifest
