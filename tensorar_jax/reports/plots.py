"""Plots of a run: curves, points, diagnostics.

matplotlib is imported where it is used: importing this module costs nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tensorar_jax.evaluation.metrics import Metric
from tensorar_jax.generation.pictures import (
  INK,
  MUTED,
  Named,
  Path_,
  save_figure,
)


def save_curves(path: Path_, traces: Mapping[str, Sequence[dict]]) -> None:
  """Writes a PNG of training curves: cross-entropies above, the rest below."""
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  if not traces:
    raise ValueError("traces is empty; expected at least one stage.")
  base, offsets, rest = {}, {}, {}
  for name, rows in traces.items():
    columns = _columns(name, rows)
    slots = sorted(int(k[3:]) for k in columns if k.startswith("ce/"))
    if "ce/0" in columns:
      base[name] = columns["ce/0"]
    else:
      rest |= {f"{name}: {k}": {"": curve} for k, curve in columns.items()}
    if len(slots) > 1:
      title = f"{name}: cross-entropy by offset"
      offsets[title] = {f"offset {j}": columns[f"ce/{j}"] for j in slots}
  large = ({"cross-entropy of offset 0": base} if base else {}) | offsets
  groups, heights = [], []
  for panels, columns, height in ((large, 3, 3.4), (rest, 4, 2.2)):
    if panels:
      groups.append((panels, math.ceil(len(panels) / columns)))
      heights.append(groups[-1][1] * height)
  layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
  figure = Figure(figsize=(14, sum(heights)), dpi=100, layout=layout)
  parts = figure.subfigures(len(groups), height_ratios=heights, squeeze=False)
  for (panels, lines), part in zip(groups, parts[:, 0]):
    grid = part.subplots(lines, math.ceil(len(panels) / lines), squeeze=False)
    for axes in grid.flat[len(panels) :]:
      axes.axis("off")
    for axes, (title, curves) in zip(grid.flat, panels.items()):
      _draw(axes, title, curves)
  save_figure(path, figure)


def _columns(name: str, rows: Sequence[dict]) -> dict[str, np.ndarray]:
  """{key: [2, n], its steps and values} of a trace."""
  if not rows or not all("step" in row and len(row) > 1 for row in rows):
    raise ValueError(
      f"trace {name!r} has {len(rows)} rows, not all with a step and a value; "
      "expected that of each row: log the step with the metrics."
    )
  columns: dict[str, list] = {}
  for row in rows:
    for key in row.keys() - {"step"}:
      columns.setdefault(key, []).append((row["step"], row[key]))
  return {k: np.array(columns[k], float).T for k in sorted(columns)}


def _draw(axes: Any, title: str, curves: Mapping[str, np.ndarray]) -> None:
  """Draws curves on one panel: raw values pale, their running mean strong."""
  from matplotlib import colormaps

  offsets = next(iter(curves)).startswith("offset ")
  shades = colormaps["plasma"](np.linspace(0, 0.85, len(curves)))
  settled = []
  for i, (label, (steps, values)) in enumerate(curves.items()):
    color = shades[i] if offsets else f"C{i}"
    window = max(1, len(values) // 25)
    if window > 1:
      axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
      mean = np.ones(window) / window
      steps, values = (np.convolve(x, mean, "valid") for x in (steps, values))
    marker = "." if len(values) < 3 else None  # one point has no line
    axes.plot(steps, values, color=color, marker=marker, lw=1.8, label=label)
    settled.append(values[len(values) // 4 :].max())
  if "cross-entropy" in title and np.isfinite(settled).all():
    # The first steps from scratch would flatten everything else.
    low, top = axes.get_ylim()[0], max(settled)
    axes.set_ylim(low, top + (top - low) * 0.3)
  tidy(axes, title)
  axes.set_xlabel("step", fontsize=9, color=MUTED)
  if "" not in curves:
    ncols = min(4, len(curves)) if offsets else 1
    style = {"frameon": False, "handlelength": 1.2, "columnspacing": 1.2}
    axes.legend(loc="upper right", fontsize=9, ncols=ncols, **style)


def save_diagnostics(path: Path_, diagnostics: Named) -> None:
  """Writes a PNG of refinement diagnostics, a line per model.

  `diagnostics[name]` is the result of `evaluation.diagnostics.measure` for a
  window of 2 slots or more.
  """
  from matplotlib.figure import Figure

  if not diagnostics:
    raise ValueError("there are no diagnostics; expected a model or more.")
  figure = Figure(figsize=(14, 3.8), dpi=100, layout="constrained")
  panels = figure.subplots(1, 3)
  titles = {
    "cross_entropy": "cross-entropy of the prediction, by offset",
    "window_accuracy": "share of right tokens in the input window, by offset",
    "copy_rate": "committed token = the draft of that many looks before",
  }
  for axes, (quantity, title) in zip(panels, titles.items()):
    first = 0 if quantity == "cross_entropy" else 1
    for i, (name, measured) in enumerate(diagnostics.items()):
      curves = measured[quantity]
      if isinstance(curves, list):
        curves = {"own_drafts": curves}
      for windows, values in curves.items():
        noise = windows == "training_noise"
        style = {"ls": "--", "mfc": "white"} if noise else {"label": name}
        slots = range(first, first + len(values))
        axes.plot(slots, values, color=f"C{i}", marker="o", lw=1.8, **style)
    tidy(axes, title)
    last = max(measured["window"] for measured in diagnostics.values()) - 1
    axes.set_xticks(range(first, last + 1))
    axes.set_xlim(first - 0.5, last + 0.5)
    if first:  # shares
      axes.set_ylim(0, 1)
  panels[0].plot([], [], color=MUTED, label="given its own drafts")
  style = {"ls": "--", "mfc": "white", "marker": "o"}
  panels[0].plot([], [], color=MUTED, label="given training noise", **style)
  panels[0].legend(frameon=False, fontsize=9)
  save_figure(path, figure)


def save_planes(
  path: Path_,
  groups: Mapping[str, Named],
  planes: Sequence[tuple[str, str]],
  hollow: str,
) -> None:
  """Writes a PNG of models as points, a panel for each group and plane.

  Args:
    path: of the PNG.
    groups: `groups[title][name]` is a list of series, each a list of rows with
      the values of every quantity of `planes`; a point is the mean of a series
      and its bars the standard deviation. Points of the first series are
      filled, those of the second hollow.
    planes: (quantity along x, quantity along y).
    hollow: what hollow points are, for the legend.
  """
  from matplotlib.figure import Figure

  if not groups:
    raise ValueError("there is nothing to compare; expected a group or more.")
  size = (5.2 * len(planes) + 2.6, 3.8 * len(groups))
  figure = Figure(figsize=size, dpi=100, layout="constrained")
  panels = figure.subplots(len(groups), len(planes), squeeze=False)
  for line, (title, models) in zip(panels, groups.items()):
    for axes, (x, y) in zip(line, planes):
      for i, (name, series) in enumerate(models.items()):
        _points(axes, series, (x, y), f"C{i}", name)
      tidy(axes, f"{title}: {y} by {x}")
      axes.set_xlabel(x, fontsize=9, color=MUTED)
      axes.set_ylabel(y, fontsize=9, color=MUTED)
    style = {"color": MUTED, "mfc": "white", "marker": "o", "ls": ""}
    line[0].plot([], [], label=hollow, **style)
    names = line[0].get_legend_handles_labels()
    line[-1].legend(
      *names,
      frameon=False,
      fontsize=9,
      loc="upper left",
      bbox_to_anchor=(1.02, 1),
    )
  save_figure(path, figure)


@dataclasses.dataclass(frozen=True)
class ScanCurve:
  """A metric over a scan: values, and half the widths of their intervals.

  A half is 0 where a value has no interval.
  """

  metric: Metric
  values: Sequence[float]
  halves: Sequence[float]


def save_scan(
  path: Path_, scales: Sequence[str], curves: Sequence[ScanCurve], title: str
) -> None:
  """Writes a PNG with a panel per metric over guidance scales, the best marked.

  A metric without a direction has no best.
  """
  from matplotlib.figure import Figure

  if not curves or not scales:
    raise ValueError("there is no scan; expected a scale and a metric or more.")
  size = (3.6 * len(curves), 3.4)
  figure = Figure(figsize=size, dpi=110, layout="constrained")
  figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
  panels = figure.subplots(1, len(curves), squeeze=False)[0]
  x = np.arange(len(scales))
  for axes, curve in zip(panels, curves):
    values = curve.values
    axes.errorbar(x, values, yerr=curve.halves, marker="o", lw=1.2, capsize=3)
    higher = curve.metric.higher_is_better
    if higher is not None:
      best = int((np.argmax if higher else np.argmin)(values))
      axes.plot(best, values[best], "o", ms=9, mfc="none", mec="C1", mew=2)
    tidy(axes, curve.metric.heading)
    axes.set_xticks(x, scales)
    axes.set_xlabel("guidance scale", fontsize=9, color=MUTED)
  save_figure(path, figure)


def save_progress(
  path: Path_,
  panels: Mapping[str, Mapping[str, Mapping[int, Mapping]]],
  title: str,
) -> None:
  """Writes a PNG with a panel per metric over training steps, a line per stage.

  `panels[metric][stage][step]` is {"mean", "std" or None}.
  """
  from matplotlib.figure import Figure

  if not panels:
    raise ValueError("there is no metric; expected one or more.")
  figure = Figure(
    figsize=(4.2 * len(panels), 3.4), dpi=110, layout="constrained"
  )
  figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
  grid = figure.subplots(1, len(panels), squeeze=False)[0]
  for axes, (metric, stages) in zip(grid, panels.items()):
    for name, rows in stages.items():
      means = [row["mean"] for row in rows.values()]
      bars = [row["std"] or 0 for row in rows.values()]
      bars = bars if any(bars) else None
      style = {"marker": "o", "ms": 4, "lw": 1.6, "capsize": 3, "label": name}
      axes.errorbar(list(rows), means, yerr=bars, **style)
    tidy(axes, metric)
    axes.set_xlabel("training step from the start", fontsize=9, color=MUTED)
  grid[0].legend(frameon=False, fontsize=9)
  save_figure(path, figure)


def save_throughput(
  path: Path_, groups: Mapping[str, Mapping[str, tuple]]
) -> None:
  """Writes a PNG of distance against speed, a panel per group.

  `groups[title][model]` is ((median, least, most) images/s, (mean[, std])).
  """
  from matplotlib.figure import Figure

  if not groups:
    raise ValueError("there is nothing to compare; expected a group or more.")
  size = (5.6 * len(groups), 4)
  figure = Figure(figsize=size, dpi=110, layout="constrained")
  panels = figure.subplots(1, len(groups), squeeze=False)[0]
  for axes, (title, models) in zip(panels, groups.items()):
    for i, (name, ((rate, low, high), (mean, *std))) in enumerate(
      models.items()
    ):
      bars = [[rate - low], [high - rate]]
      style = {"fmt": "o", "color": f"C{i}", "capsize": 3, "label": name}
      axes.errorbar(rate, mean, xerr=bars, yerr=sum(std), **style)
    tidy(axes, title)
    axes.set_xlabel("images/s", fontsize=9, color=MUTED)
    axes.set_ylabel(title.split(" by ")[0], fontsize=9, color=MUTED)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
  save_figure(path, figure)


def _points(axes, series, plane, color, name) -> None:
  """Draws the series of one model, connected by a line."""
  values = [np.array([[r[q] for q in plane] for r in s], float) for s in series]
  means = np.array([v.mean(axis=0) for v in values])
  axes.plot(*means.T, color=color, lw=0.8, alpha=0.6)
  for i, (mean, rows) in enumerate(zip(means, values)):
    bars = rows.std(axis=0, ddof=1) if len(rows) > 1 else (0, 0)
    style = {"mfc": "white"} if i else {"label": name}
    x, y = mean
    style |= {"color": color, "marker": "o", "ls": "", "lw": 1}
    axes.errorbar(x, y, xerr=bars[0], yerr=bars[1], **style)


def tidy(axes: Any, title: str) -> None:
  """Gives a panel its title and the look of all panels with curves."""
  axes.set_title(title, loc="left", fontsize=11, color=INK)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
  axes.tick_params(labelsize=9, colors=MUTED)
