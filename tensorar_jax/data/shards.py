"""Token shards: what `tokenize` writes and training reads.

A folder of ArrayRecord files, one record per image, little-endian:

  "TOK1" | label int32 | A uint16 | T uint32 | F uint8 | bytes per code uint8 |
  A T F codes, uint16 or uint32

for A variants of an image (crops, flips) in T tokens of F sub-tokens. An image
with a text has the label -1, and after its codes the features of the text's own
tokens, [P, E] for a P that differs from text to text: no padding is stored. The
features keep the type that the text encoder gave them, so none is rounded.

`manifest.json`, beside the files, says what they have in common: vocabularies,
grid, classes or text features, recipe, and the records of every shard. It is
written last; a folder without it is not complete.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from array_record.python import (
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]: compiled
)
from jaxtyping import Integer, Num

from tensorar_jax.checkpoints import files

MANIFEST = "manifest.json"
FORMAT = 1
# Codes are close to random bits: compression would save 4 % of 14-bit codes.
WRITER_OPTIONS = "group_size:1,uncompressed"
_HEADER = struct.Struct("<4siHIBB")
_MAGIC = b"TOK1"
_CODE_TYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_LIKE = {
  **{"format": int, "shards": {...: int}, "grid": [int], "num_variants": int},
  **{"vocab_sizes": [int], "class_names": [str], "num_classes": None},
}

Codes = Integer[np.ndarray, "A T F"]
# What an image is of: its class, or the features of its text.
Subject = int | Num[np.ndarray, "P E"]


@dataclasses.dataclass(frozen=True)
class TextFormat:
  """The features of texts: `width` of a token, at most `length` tokens."""

  width: int
  length: int
  dtype: str

  @classmethod
  def of(cls, entry: Mapping[str, Any]) -> TextFormat:
    """The format that the entry "text" of a manifest states."""
    return cls(
      width=entry["width"], length=entry["length"], dtype=entry["dtype"]
    )

  def rows(self, data: bytes) -> Num[np.ndarray, "P E"] | None:
    """The features in the bytes after the codes; None if these do not fit."""
    dtype = jnp.dtype(self.dtype)
    count, rest = divmod(len(data), self.width * dtype.itemsize)
    if rest or not 1 <= count <= self.length:
      return None
    return np.frombuffer(data, dtype).reshape(count, self.width)


def code_type(vocab_sizes: Sequence[int]) -> np.dtype:
  """The type in which codes of these vocabularies are stored."""
  return _CODE_TYPES[2 if max(vocab_sizes) <= 2**16 else 4]


def pack(subject: Subject, codes: Codes, dtype: np.dtype) -> bytes:
  """Packs the record of an image; `dtype` comes from `code_type`."""
  is_label = isinstance(subject, int | np.integer)
  label, text = (subject, b"") if is_label else (-1, subject.tobytes())
  header = _HEADER.pack(_MAGIC, label, *codes.shape, dtype.itemsize)
  return header + codes.astype(dtype).tobytes() + text


def unpack(
  record: bytes, where: str, text: TextFormat | None = None
) -> tuple[Subject, Codes]:
  """Unpacks a record to (subject, codes [A, T, F]); errors name `where`."""
  problem = f"{len(record)} bytes are fewer than a header's {_HEADER.size}"
  if len(record) >= _HEADER.size:
    magic, label, *shape, width = _HEADER.unpack_from(record)
    size = _HEADER.size + math.prod(shape) * width
    rest = record[size:]
    subject = text.rows(rest) if text else None if rest else label
    is_record = magic == _MAGIC and width in _CODE_TYPES
    if is_record and subject is not None and len(record) >= size:
      codes = np.frombuffer(record[:size], _CODE_TYPES[width], -1, _HEADER.size)
      return subject, codes.reshape(shape)
    expected = f" and rows of {text}" if text else ""
    problem = (
      f"header {record[: _HEADER.size]!r} with {len(record)} bytes in all; "
      f"expected {_MAGIC!r} and {size} bytes{expected}"
    )
  raise ValueError(f"{where} is no record of tokens: {problem}")


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
  """The checked manifest that `tokenize` writes last."""
  file = folder / MANIFEST
  if not file.is_file():
    raise ValueError(
      f"{file} is missing; expected a folder that --mode=tokenize has "
      "completed: run it again, it continues where it stopped"
    )
  remedy = "Copy the folder again, or run --mode=tokenize again."
  manifest = files.read_json(file, _LIKE, remedy=remedy)
  if text := manifest.get("text"):
    like = {"width": int, "length": int, "dtype": str}
    files.check_shape(text, like, f"{file}, text", remedy=remedy)
  if manifest["format"] != FORMAT:
    raise ValueError(
      f"{file} is of format {manifest['format']}; expected {FORMAT}: tokenize "
      "again"
    )
  return manifest
