"""GenEval (Ghosh et al., arXiv:2310.11513): the file that its scorer writes.

The scorer, `evaluate_images.py`, detects the objects in every image and writes
a line of JSON per image. The score of a category is the share of its images
that are right; the overall score is the plain mean of the categories.
"""

from __future__ import annotations

import collections
import pathlib

import numpy as np

from tensorar_jax.data import shapes
from tensorar_jax.evaluation.prompt_scores import PromptScores, read_lines
from tensorar_jax.generation import layouts

# The categories as the files call them, and their numbers of prompts.
TAGS = {
  "single_object": 80,
  "two_object": 99,
  "counting": 80,
  "colors": 94,
  "position": 100,
  "color_attr": 100,
}
NAMES = dict(zip(TAGS, shapes.CATEGORIES, strict=True))
IMAGES = 4

_FIELDS = {"filename": str, "tag": str, "correct": bool, "metadata": str}


def read_scores(path: pathlib.Path) -> PromptScores:
  """Reads the scorer's `results.jsonl`; ValueError for other files.

  Images with the same metadata are of one prompt, as for the scorer.
  """
  right = collections.defaultdict(list)  # by tag and metadata
  files = set()
  for number, line in enumerate(read_lines(path), 1):
    where = f"{path}, line {number}"
    image = layouts.parse_line(line, where, _FIELDS)
    if image["filename"] in files:
      raise ValueError(f"{where}: {image['filename']} is there twice.")
    files.add(image["filename"])
    right[image["tag"], image["metadata"]].append(image["correct"])
  if not right:
    raise ValueError(f"{path} holds no scores: expected results of GenEval.")
  if unknown := {tag for tag, _ in right} - set(TAGS):
    raise ValueError(f"{path}: tag {min(unknown)!r}; expected {list(TAGS)}.")
  categories, missing = {}, []
  for tag, expected in TAGS.items():
    prompts = [images for (kind, _), images in right.items() if kind == tag]
    if prompts:
      categories[NAMES[tag]] = (
        np.array([sum(images) for images in prompts], float),
        np.array([len(images) for images in prompts], float),
      )
    if len(prompts) != expected:
      missing.append(f"{tag}: {len(prompts)} of {expected} prompts")
  odd = sum(len(images) != IMAGES for images in right.values())
  if odd:
    missing.append(f"prompts without {IMAGES} images: {odd}")
  correct = [np.array(images) for images in right.values()]
  return PromptScores(
    benchmark="geneval",
    categories=categories,
    overall=None,
    num_images=len(files),
    missing=missing,
    extra={
      "correct_images": float(np.concatenate(correct).mean()),
      "correct_prompts": float(np.mean([images.any() for images in correct])),
    },
  )
