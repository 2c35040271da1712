"""The folders that the scorers of text-to-image benchmarks take.

GenEval (Ghosh et al., arXiv:2310.11513) has a folder for each line of its
prompt file, by the line's number from 0:

  00000/metadata.jsonl      the line, an object with `tag` and `prompt`
  00000/samples/0000.png    and so on, four images
  00000/grid.png            these in a row, for people

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
  """How the images of one prompt are laid out in files.

  `source` is what the benchmark says of the prompt: a line, or an id.
  """

  @property
  def counts(self) -> Collection[int]:
    """How many images of a prompt the layout takes."""
    ...

  def names(self, number: int, source: str, count: int) -> list[str]:
    """The files of prompt `number` with `count` images."""
    ...

  def contents(
    self, source: str, images: UInt8[np.ndarray, "n h w C"]
  ) -> Sequence[Any]:
    """What each of these files holds: an image, or text."""
    ...


class GenEvalLayout:
  """A folder a prompt: its line, its images, and these in a row."""

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
  """One picture a prompt."""

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
  """A line of JSON; ValueError unless it is an object with these fields."""
  try:
    found = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{where} is no JSON ({error.msg}): {line[:60]!r}; expected an object on"
      " each line."
    ) from error
  for name, kind in fields.items():
    if not isinstance(found, dict) or not isinstance(found.get(name), kind):
      raise ValueError(
        f"{where}: expected an object with the key {name!r}, a"
        f" {kind.__name__}; got {line[:60]!r}."
      )
  return found
