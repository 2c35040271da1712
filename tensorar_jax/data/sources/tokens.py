"""Token shards that `--mode=tokenize` has written; see `shards`."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import pathlib
from types import EllipsisType
from typing import Any

import grain
import numpy as np

from tensorar_jax import paths
from tensorar_jax.conditioning import conditions
from tensorar_jax.data import codes as codes_lib
from tensorar_jax.data import leftovers, splits
from tensorar_jax.data.shards import (
  MANIFEST,
  TextFormat,
  count_records,
  read_manifest,
  unpack,
)

USAGE = "tokens:<path> of --mode=tokenize"


def load(argument: str, split: str, data_dir: str | None) -> TokenShards:
  """The shards of `<argument>/<split>`, or of `argument` without splits."""
  del data_dir
  return open_shards(splits.split_folder(argument, split))


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
    positions: codes_lib.Positions,
    variants: codes_lib.Positions,
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
    """Reads and checks (subject, codes) of one variant, or of all."""
    where = self._where(position)
    try:
      record = self.records[position]
    except RuntimeError as error:  # raised by Riegeli, for instance
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
    if not isinstance(subject, np.ndarray):
      codes_lib.check_label(where, subject, self.num_classes)
    return subject, codes

  def _where(self, position: int) -> str:
    shard = bisect.bisect_right(self.ends, position)
    start = self.ends[shard - 1] if shard else 0
    return f"{self.folder}/{self.names[shard]}, record {position - start}"


def open_shards(folder: pathlib.Path) -> TokenShards:
  """The shards of a complete folder; ValueError where something is missing."""
  manifest = read_manifest(folder)
  leftovers.say_all(folder, manifest)
  # An empty shard, all of whose images were broken, has nothing to read.
  counts = {name: n for name, n in manifest["shards"].items() if n}
  if not counts:
    raise ValueError(f"{folder / MANIFEST} lists no image; expected some")
  for name, expected in counts.items():
    paths.check_inside(folder, name, str(folder / MANIFEST))
    count = count_records(folder / name)
    if count != expected:
      raise ValueError(
        f"{folder / name} holds {count} records; expected {expected} as "
        f"{MANIFEST} says: copy the folder again"
      )
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
    text=TextFormat.of(text) if (text := manifest.get("text")) else None,
  )
