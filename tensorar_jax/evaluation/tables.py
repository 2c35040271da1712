"""Numbers as text, and rows of text as tables: the one writer of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table; the first row is its heading."""
  head, *body = rows
  lines = [head, ["---"] * len(head), *body]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plus_minus(
  mean: float,
  std: float | None = None,
  *,
  decimals: int | None = None,
  sign: str = "",
) -> str:
  """`mean ± std`, or the mean alone.

  Args:
    mean: any number.
    std: its standard deviation, if it is known.
    decimals: by default four digits in all, at least one after the point.
    sign: "+" shows the sign of positive means, too.
  """
  if decimals is None:
    decimals = max(1, 4 - len(f"{abs(mean):.0f}"))
  text = f"{mean:{sign}.{decimals}f}"
  return text if std is None else f"{text} ± {std:.{decimals}f}"


def mean_of(
  values: Sequence[float] | np.ndarray, decimals: int, sign: str = ""
) -> str:
  """The mean of values, ± their sample standard deviation if there are two.

  An empty text for no values.
  """
  if not len(values):
    return ""
  std = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return plus_minus(float(np.mean(values)), std, decimals=decimals, sign=sign)


def with_interval(entry: Mapping[str, Any] | None, decimals: int) -> str:
  """`value [low, high]` of {"value", "interval"}; the interval may be missing.

  An empty text for None.
  """
  if entry is None:
    return ""
  text = f"{entry['value']:.{decimals}f}"
  if "interval" in entry:
    low, high = entry["interval"]
    text += f" [{low:.{decimals}f}, {high:.{decimals}f}]"
  return text
