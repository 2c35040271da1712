"""Drawings with captions: GenEval's six kinds of prompt, small and exact.

Each caption comes from a grammar (the categories are those of Ghosh et al.,
arXiv:2310.11513); colours, sizes and places that it leaves open are random:

| category            | caption                          |
| ------------------- | -------------------------------- |
| `single_object`     | a circle                         |
| `two_objects`       | a circle and a square            |
| `counting`          | three squares                    |
| `colors`            | a green triangle                 |
| `position`          | a circle left of a square        |
| `color_attribution` | a red circle and a blue square   |

Scene i is a function of (seed, i) alone, so the data set needs no disk and has
random access. Objects never touch, edges are hard, and all colours are corners
of the RGB cube, on black: a drawing can be read back without an error, even if
it is a little blurred.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, UInt8

SIDE = 32  # pixels
GAP = 2  # free pixels between any two objects
STEP = 2  # objects start at multiples of so many pixels
SIZES = {1: (8, 10, 12), 2: (8, 10, 12), 3: (8, 10), 4: (8, 10)}  # by number
COLOURS = {
  "red": (255, 0, 0),
  "green": (0, 255, 0),
  "blue": (0, 0, 255),
  "yellow": (255, 255, 0),
  "purple": (255, 0, 255),
  "white": (255, 255, 255),
}
PLURALS = {
  "circle": "circles",
  "square": "squares",
  "triangle": "triangles",
  "cross": "crosses",
}
SHAPES = tuple(PLURALS)
NUMBERS = {"two": 2, "three": 3, "four": 4}
# The first object against the second.
RELATIONS = ("left of", "right of", "above", "below")
CATEGORIES = (
  "single_object",
  "two_objects",
  "counting",
  "colors",
  "position",
  "color_attribution",
)
WORDS = frozenset(
  {"a", "and", *COLOURS, *PLURALS, *PLURALS.values(), *NUMBERS}.union(
    *(relation.split() for relation in RELATIONS)
  )
)


@dataclasses.dataclass(frozen=True)
class Demand:
  """`count` objects that a caption asks for; colour None: any."""

  shape: str
  colour: str | None = None
  count: int = 1


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A caption and what it asks for; `relation`: of the first to the second."""

  caption: str
  category: str
  demands: tuple[Demand, ...]
  relation: str | None = None


@dataclasses.dataclass(frozen=True)
class Object:
  """One object of a drawing; its box in pixels, from the top left corner."""

  shape: str
  colour: str
  top: int
  left: int
  height: int
  width: int

  @property
  def bottom(self) -> int:
    return self.top + self.height

  @property
  def right(self) -> int:
    return self.left + self.width


@dataclasses.dataclass(frozen=True)
class Scene:
  """A prompt and objects that fulfil it."""

  prompt: Prompt
  objects: tuple[Object, ...]


# --- prompts -----------------------------------------------------------------


def draw_prompt(category: str, rng: np.random.RandomState) -> Prompt:
  """A random prompt of one of CATEGORIES."""
  one, other = (SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
  names = list(COLOURS)
  tint, second = (names[i] for i in rng.permutation(len(names))[:2])
  relation = None
  if category == "single_object":
    caption, demands = f"a {one}", (Demand(one),)
  elif category == "two_objects":
    caption, demands = f"a {one} and a {other}", (Demand(one), Demand(other))
  elif category == "counting":
    word = list(NUMBERS)[rng.randint(len(NUMBERS))]
    caption = f"{word} {PLURALS[one]}"
    demands = (Demand(one, count=NUMBERS[word]),)
  elif category == "colors":
    caption, demands = f"a {tint} {one}", (Demand(one, tint),)
  elif category == "position":
    relation = RELATIONS[rng.randint(len(RELATIONS))]
    caption = f"a {one} {relation} a {other}"
    demands = (Demand(one), Demand(other))
  elif category == "color_attribution":
    caption = f"a {tint} {one} and a {second} {other}"
    demands = (Demand(one, tint), Demand(other, second))
  else:
    raise ValueError(f"category {category!r}: expected one of {CATEGORIES}.")
  return Prompt(caption, category, demands, relation)


def holds(relation: str, one: Object, other: Object) -> bool:
  """Whether the boxes are apart in that direction."""
  return {
    "left of": one.right <= other.left,
    "right of": other.right <= one.left,
    "above": one.bottom <= other.top,
    "below": other.bottom <= one.top,
  }[relation]


# --- drawings ----------------------------------------------------------------


def scene(index: int, seed: int = 0) -> Scene:
  """Scene number `index`; the categories come in turn."""
  # A RandomState, as NumPy froze its stream: the data set stays the same.
  rng = np.random.RandomState([seed, index])
  prompt = draw_prompt(CATEGORIES[index % len(CATEGORIES)], rng)
  wanted = [d for d in prompt.demands for _ in range(d.count)]
  names = list(COLOURS)
  tints = [d.colour or names[rng.randint(len(names))] for d in wanted]
  while True:
    objects = _put(wanted, tints, rng)
    if objects and (
      prompt.relation is None or holds(prompt.relation, *objects)
    ):
      return Scene(prompt, objects)


def _put(wanted, tints, rng) -> tuple[Object, ...] | None:
  """Puts the objects at random places; None if two of them touch."""
  sizes = SIZES[len(wanted)]
  objects: list[Object] = []
  for demand, colour in zip(wanted, tints, strict=True):
    size = sizes[rng.randint(len(sizes))]
    steps = (SIDE - size) // STEP + 1
    top, left = (STEP * rng.randint(steps) for _ in range(2))
    new = Object(demand.shape, colour, top, left, size, size)
    if any(_near(new, old) for old in objects):
      return None
    objects.append(new)
  return tuple(objects)


def _near(a: Object, b: Object) -> bool:
  return (
    a.left < b.right + GAP
    and b.left < a.right + GAP
    and a.top < b.bottom + GAP
    and b.top < a.bottom + GAP
  )


@functools.cache
def mask(shape: str, height: int, width: int) -> Bool[np.ndarray, "h w"]:
  """The pixels of a shape that fills a box; it touches all four sides."""
  # Twice the distance from the middle: integers, so that no edge is in doubt.
  y = 2 * np.arange(height)[:, None] + 1 - height
  x = 2 * np.arange(width) + 1 - width
  if shape == "circle":
    return (x * height) ** 2 + (y * width) ** 2 <= (height * width) ** 2
  if shape == "square":
    return np.ones((height, width), bool)
  if shape == "triangle":
    return 2 * abs(x) * height <= (y + height + 1) * width
  if shape == "cross":
    return (5 * abs(x) <= 2 * width) | (5 * abs(y) <= 2 * height)
  raise ValueError(f"shape {shape!r}: expected one of {SHAPES}.")


def draw(objects: tuple[Object, ...]) -> UInt8[np.ndarray, "32 32 3"]:
  """Draws the objects of a scene, on black."""
  image = np.zeros((SIDE, SIDE, 3), np.uint8)
  for one in objects:
    box = image[one.top : one.bottom, one.left : one.right]
    box[mask(one.shape, one.height, one.width)] = COLOURS[one.colour]
  return image
