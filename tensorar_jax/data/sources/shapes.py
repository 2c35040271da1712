"""Drawings with captions, made as they are asked for; see `data.shapes`."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, SupportsIndex

import numpy as np

from tensorar_jax.data import shapes

USAGE = "shapes"
SPLITS = {"train": (0, 120_000), "test": (120_000, 132_000)}  # of scenes


def load(argument: str, split: str, data_dir: str | None) -> ShapesSource:
  """The drawings of "train" or "test"; another split is a ValueError."""
  del argument, data_dir
  return open_shapes(split)


@dataclasses.dataclass(frozen=True)
class ShapesSource:
  """Scenes first, ..., end - 1: "image", "caption", "label" (the category)."""

  first: int
  end: int
  num_classes: int = len(shapes.CATEGORIES)
  image_shape: tuple[int, int, int] = (shapes.SIDE, shapes.SIDE, 3)
  class_names: tuple[str, ...] = shapes.CATEGORIES

  def __len__(self) -> int:
    return self.end - self.first

  def scene(self, position: int) -> shapes.Scene:
    """The scene at a position of this split."""
    if not 0 <= position < len(self):
      raise IndexError(f"position {position} of {len(self)} drawings")
    return shapes.scene(self.first + position)

  def __getitem__(self, position: SupportsIndex, /) -> dict[str, Any]:
    scene = self.scene(operator.index(position))
    return {
      "image": shapes.draw(scene.objects),
      "caption": scene.prompt.caption,
      "label": np.int32(shapes.CATEGORIES.index(scene.prompt.category)),
    }


def open_shapes(split: str) -> ShapesSource:
  """The drawings of "train" or "test"; another split is a ValueError."""
  if split not in SPLITS:
    raise ValueError(
      f"unknown split {split!r} of 'shapes'; known are 'train' and 'test'"
    )
  first, end = SPLITS[split]
  return ShapesSource(first, end)
