"""Scores of prompts -> the row of a paper's table, and how sure it is.

The scorers of text-to-image benchmarks judge images, but a benchmark speaks of
prompts, and has only a few hundred. So the spread is a bootstrap over the
prompts of a category, each with all of its images.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from tensorar_jax.data import shapes

RESAMPLES = 1000  # of the prompts, for a standard error


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A benchmark, and the form of its table.

  Attributes:
    title: as its paper calls it.
    categories: its columns; "overall" comes after them.
    factor: what shares are multiplied by: 1, or 100 for percent.
    decimals: of the table.
    notes: what its numbers mean, for readers.
  """

  title: str
  categories: tuple[str, ...]
  factor: int
  decimals: int
  notes: tuple[str, ...]


BENCHMARKS = {
  "geneval": Benchmark(
    title="GenEval",
    categories=shapes.CATEGORIES,
    factor=1,
    decimals=3,
    notes=(
      "A category is the share of its images that are right, overall the mean"
      " of the categories.",
    ),
  ),
  "dpg": Benchmark(
    title="DPG-Bench",
    categories=("global", "entity", "attribute", "relation", "other"),
    factor=100,
    decimals=2,
    notes=(
      "Overall is in percent, after the questions whose parents were answered"
      " by no have been counted as no; the categories are the answers about the"
      " last image of each prompt, as given. Both as the scorer has them.",
      "Without --questions the categories are those that the scorer printed.",
    ),
  ),
}

Totals = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PromptScores:
  """A scorer's results, by prompt; scores are shares.

  Attributes:
    benchmark: a key of BENCHMARKS.
    categories: by name, (sums, counts) over what is judged of each prompt.
    overall: the same of all; None: it is the mean of the categories.
    num_images: how many were judged.
    missing: which parts of the benchmark are not there, in words.
    extra: other shares, without an interval.
  """

  benchmark: str
  categories: dict[str, Totals]
  overall: Totals | None
  num_images: int
  missing: list[str]
  extra: dict[str, float]

  def metrics(self) -> dict[str, dict[str, Any]]:
    """{name: {"value", "std", "interval"}}, times the benchmark's factor."""
    rng = np.random.RandomState(0)
    factor = BENCHMARKS[self.benchmark].factor
    values, resampled = {}, {}
    totals = dict(self.categories)
    if self.overall:
      totals["overall"] = self.overall
    for name, (sums, counts) in totals.items():
      values[name] = sums.sum() / counts.sum()
      resampled[name] = resample_prompts(sums, counts, rng)
    if not self.overall:
      values["overall"] = np.mean(list(values.values()))
      resampled["overall"] = np.mean(list(resampled.values()), axis=0)
    metrics = {
      name: {"value": factor * value} for name, value in self.extra.items()
    }
    for name, value in values.items():
      interval = factor * np.percentile(resampled[name], (2.5, 97.5))
      metrics[name] = {
        "value": float(factor * value),
        "std": float(factor * resampled[name].std()),
        "interval": interval.tolist(),
      }
    return metrics

  @property
  def num_prompts(self) -> int:
    totals = [self.overall] if self.overall else self.categories.values()
    return sum(len(sums) for sums, _ in totals)


def resample_prompts(
  sums: np.ndarray, counts: np.ndarray, rng: np.random.RandomState
) -> np.ndarray:
  """[RESAMPLES] means over resampled prompts, of [n] sums and [n] counts."""
  drawn = rng.randint(len(sums), size=(RESAMPLES, len(sums)))
  return sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)


def read_lines(path: pathlib.Path) -> list[str]:
  """The lines of a text file in UTF-8, without their ends."""
  try:
    text = path.read_text("utf-8").removesuffix("\n")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} is not text in UTF-8 ({error}): score again."
    ) from error
  return text.split("\n") if text else []
