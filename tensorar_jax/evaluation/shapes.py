"""Reads drawings back and says whether they fulfil their captions, exactly.

Every pixel goes to the nearest colour of the palette, connected pixels of one
colour are an object, and its shape is the one whose drawing in the same box
overlaps most. Real drawings come back without an error; what the thresholds
below are for is the blur of a tokenizer.

An image is right by GenEval's rule (Ghosh et al., arXiv:2310.11513): every
object that the caption names is there, as often and in the colour and place
that it says. More objects than asked for are wrong where the caption counts.
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
  """The objects of a drawing, in no order; what has no shape is left out."""
  away = image[:, :, None].astype(int) - _PALETTE
  nearest = np.argmin((away**2).sum(axis=-1), axis=-1)
  found = []
  for number, colour in enumerate(shapes.COLOURS, start=1):
    parts = np.zeros(nearest.shape, np.int32)
    scipy.ndimage.label(nearest == number, output=parts)
    for i, box in enumerate(scipy.ndimage.find_objects(parts), start=1):
      pixels = parts[box] == i
      shape = _shape(pixels) if pixels.sum() >= MIN_AREA else None
      if shape:
        corner = (side.start for side in box)
        found.append(Object(shape, colour, *corner, *pixels.shape))
  return found


def _shape(pixels: Bool[np.ndarray, "h w"]) -> str | None:
  """The name of the shape that looks most like this, if one does."""
  overlap = {}
  for shape in shapes.SHAPES:
    mask = shapes.mask(shape, *pixels.shape)
    overlap[shape] = (pixels & mask).sum() / (pixels | mask).sum()
  best = max(overlap, key=overlap.__getitem__)
  return best if overlap[best] >= MIN_OVERLAP else None


def fulfils(objects: Sequence[Object], prompt: Prompt) -> bool:
  """Whether a drawing with these objects is what the prompt asks for."""
  fitting = [
    [one for one in objects if one.shape == d.shape and _tinted(one, d.colour)]
    for d in prompt.demands
  ]
  for demand, own in zip(prompt.demands, fitting, strict=True):
    exactly = prompt.category == "counting"
    if len(own) < demand.count or exactly and len(own) > demand.count:
      return False
  if prompt.relation is None:
    return True
  pairs = itertools.product(*fitting)
  return any(shapes.holds(prompt.relation, *pair) for pair in pairs)


def _tinted(one: Object, colour: str | None) -> bool:
  return colour in (None, one.colour)


def score(
  images: UInt8[np.ndarray, "n 32 32 3"], prompts: Sequence[Prompt]
) -> Bool[np.ndarray, " n"]:
  """Whether each image fulfils its prompt."""
  pairs = zip(images, prompts, strict=True)
  return np.array([fulfils(read(image), prompt) for image, prompt in pairs])
