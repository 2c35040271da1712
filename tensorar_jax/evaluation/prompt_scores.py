"""Scores of prompts -> the row of a paper's table, and how sure it is.

The scorers of text-to-image benchmarks judge images; what a benchmark says is
of prompts, of which it has a few hundred. So the spread is a bootstrap over the
prompts of a category, each with all of its images.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from tensorar_jax.data import shapes
from tensorar_jax.evaluation import scores

# (categories, factor, decimals) of the tables.
TABLES = {
  "geneval": (shapes.CATEGORIES, 1, 3),
  "dpg": (("global", "entity", "attribute", "relation", "other"), 100, 2),
}

Totals = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PromptScores:
  """What a scorer says, by prompt; scores are shares.

  Attributes:
    benchmark: a key of TABLES.
    categories: by name, (sums, counts) over what is judged of each prompt.
    overall: the same of all; None: it is the mean of the categories.
    num_images: that were judged.
    missing: what is not there of the benchmark, in words.
    extra: other shares, without an interval.
  """

  benchmark: str
  categories: dict[str, Totals]
  overall: Totals | None
  num_images: int
  missing: list[str]
  extra: dict[str, float]

  def metrics(self) -> dict[str, dict[str, Any]]:
    """{name: {"value", "std", "interval"}}, times the table's factor."""
    rng, factor = np.random.RandomState(0), TABLES[self.benchmark][1]
    values, drawn = {}, {}
    totals = dict(self.categories)
    if self.overall:
      totals["overall"] = self.overall
    for name, (sums, counts) in totals.items():
      values[name] = sums.sum() / counts.sum()
      drawn[name] = scores.resample_prompts(sums, counts, rng)
    if not self.overall:
      values["overall"] = np.mean(list(values.values()))
      drawn["overall"] = np.mean(list(drawn.values()), axis=0)
    found = {
      name: {
        "value": float(factor * value),
        "std": float(factor * drawn[name].std()),
        "interval": (factor * np.percentile(drawn[name], (2.5, 97.5))).tolist(),
      }
      for name, value in values.items()
    }
    extra = {name: {"value": factor * v} for name, v in self.extra.items()}
    return extra | found

  @property
  def num_prompts(self) -> int:
    totals = [self.overall] if self.overall else self.categories.values()
    return sum(len(sums) for sums, _ in totals)


def read_lines(path: pathlib.Path) -> list[str]:
  """The lines of a text file in UTF-8, without their ends."""
  text = path.read_text("utf-8").removesuffix("\n")
  return text.split("\n") if text else []
