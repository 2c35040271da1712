"""Reads drawings and decides, exactly, whether they fulfil their captions.

Every pixel goes to the nearest colour of the palette, connected pixels of one
colour are an object, and its shape is the one whose drawing in the same box
overlaps most. Real drawings are read without an error; the thresholds below
allow for the blur of a tokenizer.

An image is right by GenEval's rule (Ghosh et al., arXiv:2310.11513): every
object that the caption names is there, in the right number, colour and place.
More objects than asked for are wrong only where the caption counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, UInt8

from tensorar_jax.data import shapes
from tensorar_jax.data.shapes import Object, Prompt

MIN_AREA = 16  # pixels; the smallest object drawn has 36
MIN_OVERLAP = 0.7  # intersection over union of an object and a shape's mask

_PALETTE = np.array([(0, 0, 0), *shapes.COLOURS.values()], int)


def read(image: UInt8[np.ndarray, "32 32 3"]) -> list[Object]:
  """The objects of a drawing, in no order; blots of no shape are left out."""
  difference = image[:, :, None].astype(int) - _PALETTE
  nearest = np.argmin((difference**2).sum(axis=-1), axis=-1)
  objects = []
  for number, colour in enumerate(shapes.COLOURS, start=1):
    parts = np.zeros(nearest.shape, np.int32)
    scipy.ndimage.label(nearest == number, output=parts)
    for i, box in enumerate(scipy.ndimage.find_objects(parts), start=1):
      pixels = parts[box] == i
      shape = _shape(pixels) if pixels.sum() >= MIN_AREA else None
      if shape:
        corner = (side.start for side in box)
        objects.append(Object(shape, colour, *corner, *pixels.shape))
  return objects


def _shape(pixels: Bool[np.ndarray, "h w"]) -> str | None:
  """The name of the shape that overlaps most with these pixels, or None."""
  overlap = {}
  for shape in shapes.SHAPES:
    mask = shapes.mask(shape, *pixels.shape)
    overlap[shape] = (pixels & mask).sum() / (pixels | mask).sum()
  best = max(overlap, key=overlap.__getitem__)
  return best if overlap[best] >= MIN_OVERLAP else None


def fulfils(objects: Sequence[Object], prompt: Prompt) -> bool:
  """Whether a drawing with these objects is what the prompt asks for."""
  fitting = [
    [
      one
      for one in objects
      if one.shape == d.shape and _has_colour(one, d.colour)
    ]
    for d in prompt.demands
  ]
  exactly = prompt.category == "counting"
  for demand, matches in zip(prompt.demands, fitting, strict=True):
    if len(matches) < demand.count:
      return False
    if exactly and len(matches) > demand.count:
      return False
  if prompt.relation is None:
    return True
  pairs = itertools.product(*fitting)
  return any(shapes.holds(prompt.relation, *pair) for pair in pairs)


def _has_colour(one: Object, colour: str | None) -> bool:
  return colour in (None, one.colour)


def score(
  images: UInt8[np.ndarray, "n 32 32 3"], prompts: Sequence[Prompt]
) -> Bool[np.ndarray, " n"]:
  """Whether each image fulfils its prompt."""
  pairs = zip(images, prompts, strict=True)
  return np.array([fulfils(read(image), prompt) for image, prompt in pairs])
