"""Pictures, tables and the report of a run, for people.

matplotlib and PIL are imported where they are used: importing this module costs
nothing. Tiles are laid out in whole pixels, so tiny images keep sharp edges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TILE = 72  # smaller images are enlarged to about this many pixels
_GAP, _MARGIN = 4, 24  # pixels
_PAGE = 1800  # panels wrap at this width
_MARK = np.array([255, 106, 0], np.uint8)
_INK, _MUTED = "#1f2328", "#656d76"
Path_ = str | Path
Named = Mapping[str, Any]  # by model, stage or caption


def _images(array: Any, name: str, rank: int) -> np.ndarray:
  """`array` if it is a non-empty uint8 array of images, else an error."""
  array = np.asarray(array)
  good = array.ndim == rank and array.size and array.dtype == np.uint8
  if not good or array.shape[-1] not in (1, 3):
    axes = {4: "[frames, h, w, C]", 5: "[rows, columns, h, w, C]"}[rank]
    raise ValueError(
      f"{name} is {array.dtype} {array.shape}; expected a non-empty uint8 "
      f"{axes} with C = 1 or 3: scale to 0..255 and cast, or add the axis."
    )
  return array


def _enlarge(images: np.ndarray, factor: int) -> np.ndarray:
  """RGB images `[..., h, w, 3]` with every pixel repeated."""
  images = np.repeat(np.repeat(images, factor, axis=-3), factor, axis=-2)
  return np.broadcast_to(images, (*images.shape[:-1], 3))


def _places(panels: Named, left: int, top: int) -> list[tuple[int, int]]:
  """The corner of each panel's first tile; lines of about the same width."""
  if not panels:
    raise ValueError(
      "there are no pictures; expected a model or more: add one."
    )
  wide = [_MARGIN + _width(name, tiles) for name, tiles in panels.items()]
  page = sum(wide) / math.ceil(sum(wide) / _PAGE)
  places, x, y, tall = [], 0, _MARGIN + top, 0
  for tiles, width in zip(panels.values(), wide):
    if x + width / 2 > page:
      x, y, tall = 0, y + tall + _MARGIN + top, 0
    places.append((left + x, y))
    x, tall = x + width, max(tall, tiles.shape[0] * (tiles.shape[2] + _GAP))
  return places


def _width(name: str, tiles: np.ndarray) -> int:
  """A panel is as wide as its tiles or its title."""
  return max(tiles.shape[1] * (tiles.shape[3] + _GAP) - _GAP, 10 * len(name))


def _save_panels(
  path: Path_, panels: Named, columns: Named, rows: Sequence[str], legend: str
) -> None:
  """Panels of tiles `[n, m, H, W, 3]` as one PNG, wrapped to a page."""
  from matplotlib.figure import Figure

  left = _MARGIN + max([10 + 9 * len(text) for text in rows], default=0)
  places = _places(panels, left, 52 if columns else 32)
  texts, pastes = [], []  # (x, y, text, style) and (x, y, tile)
  for (name, tiles), (x, y) in zip(panels.items(), places):
    bold = {"color": _INK, "fontsize": 13, "weight": "bold"}
    texts.append((x, y - (40 if columns else 16), name, bold))
    tall, wide = tiles.shape[2] + _GAP, tiles.shape[3] + _GAP
    for i, j in np.ndindex(tiles.shape[:2]):
      pastes.append((x + j * wide, y + i * tall, tiles[i, j]))
    for j, text in enumerate(columns.get(name, ())):
      texts.append((x + j * wide + wide / 2, y - 8, text, {"ha": "center"}))
    for i, text in enumerate(rows if x == left else ()):
      style = {"ha": "right", "va": "center"}
      texts.append((x - 10, y + i * tall + tall / 2, text, style))
  width = max(x + _width(*p) for (x, _), p in zip(places, panels.items()))
  height = max(y + len(tile) for _, y, tile in pastes)
  width, height = width + _MARGIN, height + _MARGIN * (2 if legend else 1)
  if legend:
    texts.append((_MARGIN, height - 24, "\u25a0", {"color": _MARK / 255}))
    texts.append((_MARGIN + 16, height - 24, legend, {}))
  canvas = np.full((height, width, 3), 255, np.uint8)
  for x, y, tile in pastes:
    canvas[y : y + len(tile), x : x + tile.shape[1]] = tile
  figure = Figure(figsize=(width / 100, height / 100), dpi=100)
  figure.figimage(canvas)
  for x, y, text, style in texts:
    style = {"color": _MUTED, "fontsize": 10, "parse_math": False, **style}
    figure.text(x / width, 1 - y / height, text, **style)
  figure.savefig(path, format="png", dpi=100)


def save_sample_grids(
  path: Path_, grids: Named, row_labels: Sequence[str]
) -> None:
  """A PNG with one panel of samples per model; the rows are classes."""
  panels = {}
  for name, grid in grids.items():
    grid = _images(grid, f"grid {name!r}", 5)
    if len(grid) != len(row_labels):
      raise ValueError(
        f"grid {name!r} has {len(grid)} rows; expected {len(row_labels)}, one "
        "for each of row_labels: give one label per class."
      )
    panels[name] = _enlarge(grid, max(1, round(_TILE / max(grid.shape[2:4]))))
  _save_panels(path, panels, {}, [str(label) for label in row_labels], "")


def save_refinement(
  path: Path_, strips: Named, changed: Named | None = None
) -> None:
  """A PNG of pictures after 1 .. k looks, one panel per model.

  `changed[name]`, bool `[n, k, rows, columns]`, says which token of the grid is
  not the one of the look before; those areas are outlined from look 2 on.
  """
  panels, columns = {}, {}
  for name, strip in strips.items():
    strip = _images(strip, f"strip {name!r}", 5)
    tiles = _enlarge(strip, max(1, round(1.6 * _TILE / max(strip.shape[2:4]))))
    if changed and name in changed:
      tiles = _outline(tiles, np.asarray(changed[name]), name)
    panels[name] = tiles
    looks = range(1, strip.shape[1] + 1)
    columns[name] = [f"after {i} look{'s' * (i > 1)}" for i in looks]
  legend = "tokens that differ from the look before" if changed else ""
  _save_panels(path, panels, columns, (), legend)


def _outline(tiles: np.ndarray, changed: np.ndarray, name: str) -> np.ndarray:
  """The tiles with a line around each area of changed cells."""
  good = changed.dtype == bool and changed.ndim == 4 and changed.size
  if not good or changed.shape[:2] != tiles.shape[:2]:
    raise ValueError(
      f"changed {name!r} is {changed.dtype} {changed.shape}; expected bool [n, "
      f"k, rows, columns] with n, k = {tiles.shape[:2]} as the strips have: "
      "compare the tokens of consecutive looks."
    )
  tall, wide = tiles.shape[2:4]
  rows = np.arange(tall) * changed.shape[2] // tall
  cells = np.arange(wide) * changed.shape[3] // wide
  inside = changed[:, :, rows][:, :, :, cells]  # [n, k, H, W]
  # A pixel is on the line if it is inside and one 2 pixels away is not.
  padded = np.pad(inside, ((0, 0), (0, 0), (2, 2), (2, 2)))
  line = np.zeros_like(inside)
  for y, x in np.ndindex(5, 5):
    line |= inside & ~padded[:, :, y : y + tall, x : x + wide]
  # The tint tells inside from outside; nothing comes before the first look.
  shade = np.where(line, 1.0, inside * 0.15)[..., None]
  shade[:, 0] = 0
  return (tiles + shade * (_MARK - tiles.astype(float))).astype(np.uint8)


def save_refinement_gif(path: Path_, frames: Any, scale: int) -> None:
  """An endless GIF that rests on its last frame, enlarged `scale` times."""
  from PIL import Image

  frames = _images(frames, "frames", 4)
  if scale < 1:
    raise ValueError(f"scale is {scale}; expected an integer of 1 or more.")
  pictures = [Image.fromarray(f) for f in _enlarge(frames, scale)]
  first, *more = [picture.quantize(dither=0) for picture in pictures]
  durations = [500] * len(more) + [2000]
  options = {"save_all": True, "duration": durations, "loop": 0}
  first.save(path, format="GIF", append_images=more, **options)


def save_curves(path: Path_, traces: Mapping[str, Sequence[dict]]) -> None:
  """A PNG of training curves: cross-entropies above, all other stages below."""
  from matplotlib.figure import Figure

  if not traces:
    raise ValueError("traces is empty; expected a stage at least: add one.")
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
  groups = [(large, 3, 3.4), (rest, 4, 2.2)]
  groups = [(p, math.ceil(len(p) / n), tall) for p, n, tall in groups if p]
  heights = [lines * tall for _, lines, tall in groups]
  figure = Figure(figsize=(14, sum(heights)), dpi=100, layout="constrained")
  figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
  parts = figure.subfigures(len(groups), height_ratios=heights, squeeze=False)
  for (panels, lines, _), part in zip(groups, parts[:, 0]):
    grid = part.subplots(lines, math.ceil(len(panels) / lines), squeeze=False)
    for axes in grid.flat[len(panels) :]:
      axes.axis("off")
    for axes, (title, curves) in zip(grid.flat, panels.items()):
      _draw(axes, title, curves)
  figure.savefig(path, format="png")


def _columns(name: str, rows: Sequence[dict]) -> dict[str, np.ndarray]:
  """Per key of a trace, `[2, n]`: the steps and the values."""
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
  """Curves on one axis: raw values pale, their running mean strong."""
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
    # The first steps from scratch would press everything else together.
    low, top = axes.get_ylim()[0], max(settled)
    axes.set_ylim(low, top + (top - low) * 0.3)
  tidy(axes, title)
  axes.set_xlabel("step", fontsize=9, color=_MUTED)
  if "" not in curves:
    ncols = min(4, len(curves)) if offsets else 1
    style = {"frameon": False, "handlelength": 1.2, "columnspacing": 1.2}
    axes.legend(loc="upper right", fontsize=9, ncols=ncols, **style)


def save_diagnostics(path: Path_, found: Named) -> None:
  """A PNG of refinement diagnostics, by model: training against own drafts.

  `found[name]` is what `evaluation.diagnostics.measure` returns for a window of
  2 slots or more.
  """
  from matplotlib.figure import Figure

  if not found:
    raise ValueError("there are no diagnostics; expected a model or more.")
  figure = Figure(figsize=(14, 3.8), dpi=100, layout="constrained")
  panels = figure.subplots(1, 3)
  titles = {
    "cross_entropy": "cross-entropy of the prediction, by offset",
    "window_accuracy": "share of right tokens in the input window, by offset",
    "copy_rate": "committed token = the draft of so many looks before",
  }
  for axes, (quantity, title) in zip(panels, titles.items()):
    first = 0 if quantity == "cross_entropy" else 1
    for i, (name, own) in enumerate(found.items()):
      curves = own[quantity]
      if isinstance(curves, list):
        curves = {"own_drafts": curves}
      for windows, values in curves.items():
        noise = windows == "training_noise"
        style = {"ls": "--", "mfc": "white"} if noise else {"label": name}
        slots = range(first, first + len(values))
        axes.plot(slots, values, color=f"C{i}", marker="o", lw=1.8, **style)
    tidy(axes, title)
    last = max(own["window"] for own in found.values()) - 1
    axes.set_xticks(range(first, last + 1))
    axes.set_xlim(first - 0.5, last + 0.5)
    if first:  # shares
      axes.set_ylim(0, 1)
  panels[0].plot([], [], color=_MUTED, label="behind its own drafts")
  style = {"ls": "--", "mfc": "white", "marker": "o"}
  panels[0].plot([], [], color=_MUTED, label="behind training noise", **style)
  panels[0].legend(frameon=False, fontsize=9)
  figure.savefig(path, format="png")


def save_planes(
  path: Path_,
  groups: Mapping[str, Named],
  planes: Sequence[tuple[str, str]],
  hollow: str,
) -> None:
  """A PNG of models as points, a line of panels per group, a panel per plane.

  `groups[title][name]` is a list of series, each a list of rows with the values
  of every quantity of `planes`; a point is the mean of a series and its bars
  the standard deviation. The first series is filled, the second hollow, which
  stands for what `hollow` says.
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
      axes.set_xlabel(x, fontsize=9, color=_MUTED)
      axes.set_ylabel(y, fontsize=9, color=_MUTED)
    style = {"color": _MUTED, "mfc": "white", "marker": "o", "ls": ""}
    line[0].plot([], [], label=hollow, **style)
    names = line[0].get_legend_handles_labels()
    beside = {"loc": "upper left", "bbox_to_anchor": (1.02, 1)}
    line[-1].legend(*names, frameon=False, fontsize=9, **beside)
  figure.savefig(path, format="png")


def save_scan(
  path: Path_,
  scales: Sequence[str],
  metrics: Mapping[str, tuple[Sequence[float], Sequence[float], bool]],
  title: str,
) -> None:
  """A PNG with a panel per metric over a scan of scales.

  `metrics[name]` holds the value at each scale, half the width of its interval
  (0 where it has none), and whether higher is better; the best is marked.
  """
  from matplotlib.figure import Figure

  if not metrics or not scales:
    raise ValueError("there is no scan; expected a scale and a metric or more.")
  size = (3.6 * len(metrics), 3.4)
  figure = Figure(figsize=size, dpi=110, layout="constrained")
  figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
  panels = figure.subplots(1, len(metrics), squeeze=False)[0]
  at = np.arange(len(scales))
  for axes, (name, (values, halves, higher)) in zip(panels, metrics.items()):
    axes.errorbar(at, values, yerr=halves, marker="o", lw=1.2, capsize=3)
    best = int((np.argmax if higher else np.argmin)(values))
    axes.plot(best, values[best], "o", ms=9, mfc="none", mec="C1", mew=2)
    tidy(axes, f"{name} {'↑' if higher else '↓'}")
    axes.set_xticks(at, scales)
    axes.set_xlabel("guidance scale", fontsize=9, color=_MUTED)
  figure.savefig(path, format="png")


def _points(axes, series, plane, color, name) -> None:
  """The series of one model, joined by a line."""
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
  """The look of every panel with curves."""
  axes.set_title(title, loc="left", fontsize=11, color=_INK)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
  axes.tick_params(labelsize=9, colors=_MUTED)


def save_image(path: Path_, image: Any) -> None:
  """One uint8 image [h, w, C] as a PNG, pixel for pixel."""
  from PIL import Image

  image = _images(np.asarray(image)[None], "image", 4)[0]
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
