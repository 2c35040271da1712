"""The folders of images that the scorers of text-to-image benchmarks read.

GenEval (Ghosh et al., arXiv:2310.11513) has a folder for each line of its
prompt file, named by the line's number from 0:

  00000/metadata.jsonl      the line, an object with `tag` and `prompt`
  00000/samples/0000.png    and so on, four images
  00000/grid.png            the four in a row, for people

DPG-Bench (Hu et al., arXiv:2403.05135) has one picture ITEM_ID.png for each
prompt file ITEM_ID.txt: four images, two by two, or a single one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8


class Layout(Protocol):
  """A layout of the images of one prompt in files.

  `source` identifies the prompt to the benchmark: a line of its file, or an id.
  """

  @property
  def counts(self) -> Collection[int]:
    """The allowed numbers of images of a prompt."""
    ...

  def names(self, number: int, source: str, count: int) -> list[str]:
    """The files of prompt `number` with `count` images."""
    ...

  def contents(
    self, source: str, images: UInt8[np.ndarray, "n h w C"]
  ) -> Sequence[Any]:
    """The content of each of these files: an image, or text."""
    ...


class GenEvalLayout:
  """A folder for each prompt: its line, its images, and these in a row."""

  counts = range(1, 10_000)

  def names(self, number: int, source: str, count: int) -> list[str]:
    pictures = [f"samples/{image:04d}.png" for image in range(count)]
    return [
      f"{number:05d}/{name}"
      for name in ("metadata.jsonl", *pictures, "grid.png")
    ]

  def contents(
    self, source: str, images: UInt8[np.ndarray, "n h w C"]
  ) -> list[Any]:
    return [source, *images, np.concatenate(images, axis=1)]


class DPGLayout:
  """One picture for each prompt."""

  counts = (1, 4)

  def names(self, number: int, source: str, count: int) -> list[str]:
    return [f"{source}.png"]

  def contents(
    self, source: str, images: UInt8[np.ndarray, "n h w C"]
  ) -> list[Any]:
    if len(images) == 1:
      return [images[0]]
    rows = [np.concatenate(images[i : i + 2], axis=1) for i in (0, 2)]
    return [np.concatenate(rows)]


LAYOUTS: dict[str, Layout] = {"geneval": GenEvalLayout(), "dpg": DPGLayout()}


def parse_line(
  line: str, where: str, fields: dict[str, type]
) -> dict[str, Any]:
  """Reads a line of JSON; ValueError unless it is an object with `fields`."""
  try:
    value = json.loads(line)
  except (ValueError, RecursionError) as error:
    reason = getattr(error, "msg", error)  # without json's own "line 1"
    raise ValueError(
      f"{where} is not JSON ({reason}): {line[:60]!r}; expected an object on"
      " each line."
    ) from error
  for name, kind in fields.items():
    if not isinstance(value, dict) or not isinstance(value.get(name), kind):
      raise ValueError(
        f"{where}: expected an object with the key {name!r}, a"
        f" {kind.__name__}; got {line[:60]!r}."
      )
  return value
