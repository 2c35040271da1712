"""Pictures, tables and the report of a run, for people.

matplotlib and PIL are imported where they are used, so that importing this module
costs nothing. Tiles are laid out in whole pixels: tiny images keep sharp edges.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TILE = 72  # smaller images are enlarged to about this many pixels
_GAP, _MARGIN, _LINE = 4, 24, 30  # pixels
_PAGE = 1800  # panels wrap at this width
_MARK = np.array([255, 106, 0], np.uint8)
_INK, _MUTED = "#1f2328", "#656d76"
# Metric -> whether higher is better; others are shown without a verdict.
_HIGHER = {
  **dict.fromkeys(("frechet", "fid", "sfid", "loss", "cross_entropy"), False),
  **dict.fromkeys(("accuracy", "precision", "recall", "inception_score"), True),
}
Path_ = str | Path


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
  """RGB images with every pixel repeated, `[..., h * factor, w * factor, 3]`."""
  images = np.repeat(np.repeat(images, factor, axis=-3), factor, axis=-2)
  return np.broadcast_to(images, (*images.shape[:-1], 3))


def _save_panels(
  path: Path_,
  panels: Mapping[str, np.ndarray],
  columns: Mapping[str, Sequence[str]],
  row_labels: Sequence[str],
  legend: str | None = None,
) -> None:
  """Panels of tiles `[rows, columns, H, W, 3]` as one PNG, wrapped to a page."""
  from matplotlib.figure import Figure

  label = max(map(len, row_labels), default=0) * 9 + (10 if row_labels else 0)
  top = 2 * _LINE if any(columns.values()) else _LINE + 8
  places, x, y, line, width = [], _MARGIN + label, _MARGIN, 0, 0
  total = sum(
    t.shape[1] * (t.shape[3] + _GAP) + _MARGIN for t in panels.values()
  )
  page = total / math.ceil(total / _PAGE)  # lines of about the same width
  for tiles in panels.values():
    tall = top + tiles.shape[0] * (tiles.shape[2] + _GAP) - _GAP
    wide = tiles.shape[1] * (tiles.shape[3] + _GAP) - _GAP
    if x + wide / 2 > _MARGIN + label + page:
      x, y, line = _MARGIN + label, y + line + _MARGIN, 0
    places.append((x, y + top, wide, tall - top))
    x, line, width = x + wide + _MARGIN, max(line, tall), max(width, x + wide)
  width, height = width + _MARGIN, y + line + _MARGIN
  height += _LINE if legend else 0
  figure = Figure(figsize=(width / 100, height / 100), dpi=100)

  def write(x: float, y: float, text: str, **style: Any) -> None:
    figure.text(x / width, 1 - y / height, text, **{"color": _MUTED, **style})

  for (name, tiles), (x, y, wide, tall) in zip(panels.items(), places):
    axes = figure.add_axes(
      (x / width, 1 - (y + tall) / height, wide / width, tall / height)
    )
    axes.imshow(_mosaic(tiles), interpolation="none", aspect="auto")
    axes.axis("off")
    bold = {"color": _INK, "fontsize": 13, "fontweight": "bold"}
    write(x, y - top + 18, name, **bold)
    for i, text in enumerate(columns.get(name, ())):
      center = x + i * (tiles.shape[3] + _GAP) + tiles.shape[3] / 2
      write(center, y - 8, text, ha="center", fontsize=9)
    for i, text in enumerate(row_labels if x == _MARGIN + label else ()):
      center = y + i * (tiles.shape[2] + _GAP) + tiles.shape[2] / 2
      write(x - 10, center, text, ha="right", va="center", fontsize=10)
  if legend:
    square = {"color": _MARK / 255, "fontsize": 14, "va": "center"}
    write(_MARGIN, height - _LINE + 2, "\N{BLACK SQUARE}", **square)
    write(_MARGIN + 18, height - _LINE + 4, legend, va="center", fontsize=10)
  figure.savefig(path, dpi=100, facecolor="white")


def _mosaic(tiles: np.ndarray) -> np.ndarray:
  tiles = np.pad(
    tiles,
    ((0, 0), (0, 0), (0, _GAP), (0, _GAP), (0, 0)),
    constant_values=255,
  )
  rows, columns, tall, wide, _ = tiles.shape
  mosaic = tiles.swapaxes(1, 2).reshape(rows * tall, columns * wide, 3)
  return mosaic[:-_GAP, :-_GAP]


def save_sample_grids(
  path: Path_, grids: Mapping[str, Any], row_labels: Sequence[str]
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
  _not_empty(panels, "grids")
  _save_panels(path, panels, {}, [str(label) for label in row_labels])


def save_refinement(
  path: Path_,
  strips: Mapping[str, Any],
  changed: Mapping[str, Any] | None = None,
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
  _not_empty(panels, "strips")
  legend = "tokens that differ from the look before" if changed else None
  _save_panels(path, panels, columns, (), legend)


def _outline(tiles: np.ndarray, changed: np.ndarray, name: str) -> np.ndarray:
  """The tiles with a line around each area of changed cells."""
  if changed.dtype != bool or changed.ndim != 4 or not changed.size:
    given = f"{changed.dtype} {changed.shape}"
  elif changed.shape[:2] != tiles.shape[:2]:
    given = f"bool {changed.shape} for strips {tiles.shape[:2]}"
  else:
    given = None
  if given:
    raise ValueError(
      f"changed {name!r} is {given}; expected bool [n, k, rows, columns] with "
      "the n and k of the strips: compare the tokens of consecutive looks."
    )
  tall, wide = tiles.shape[2:4]
  rows = np.arange(tall) * changed.shape[2] // tall
  cells = np.arange(wide) * changed.shape[3] // wide
  inside = changed[:, :, rows][:, :, :, cells]  # [n, k, H, W]
  # A pixel is on the line if it is inside and one 2 pixels away is not.
  padded = np.pad(inside, ((0, 0), (0, 0), (2, 2), (2, 2)))
  core = inside.copy()
  for down in (0, 2, 4):
    for right in (0, 2, 4):
      core &= padded[:, :, down : down + tall, right : right + wide]
  line = inside & ~core
  # The tint tells inside from outside; nothing comes before the first look.
  shade = np.where(line, 1.0, inside * 0.15)[..., None]
  shade[:, 0] = 0
  return (tiles + shade * (_MARK - tiles.astype(float))).astype(np.uint8)


def _not_empty(panels: Mapping[str, Any], name: str) -> None:
  if not panels:
    raise ValueError(f"{name} is empty; expected a model at least: add one.")


def save_refinement_gif(path: Path_, frames: Any, scale: int) -> None:
  """An endless GIF that rests on its last frame, enlarged `scale` times."""
  from PIL import Image

  frames = _images(frames, "frames", 4)
  if scale < 1:
    raise ValueError(f"scale is {scale}; expected an integer of 1 or more.")
  pictures = [Image.fromarray(f) for f in _enlarge(frames, scale)]
  pictures = [picture.quantize(dither=0) for picture in pictures]
  durations = [500] * (len(pictures) - 1) + [2000]
  pictures[0].save(
    path,
    format="GIF",
    save_all=True,
    append_images=pictures[1:],
    duration=durations,
    loop=0,
  )


def save_curves(path: Path_, traces: Mapping[str, Sequence[dict]]) -> None:
  """A PNG of training curves: cross-entropies above, all other stages below."""
  from matplotlib.figure import Figure

  stages = {name: _columns(name, rows) for name, rows in traces.items()}
  _not_empty(stages, "traces")
  base, offsets, rest = {}, {}, {}
  for name, columns in stages.items():
    entropies = {k[3:]: v for k, v in columns.items() if k.startswith("ce/")}
    if "0" in entropies:
      base[name] = entropies["0"]
    else:
      rest |= {f"{name}: {key}": {"": v} for key, v in columns.items()}
    if len(entropies) > 1:
      offsets[f"{name}: cross-entropy by offset"] = {
        f"offset {j}": entropies[j] for j in sorted(entropies, key=int)
      }
  large = ({"cross-entropy of offset 0": base} if base else {}) | offsets
  groups = [(large, 3, 3.4), (rest, 4, 2.1)]
  groups = [
    (panels, min(most, len(panels)), tall * math.ceil(len(panels) / most))
    for panels, most, tall in groups
    if panels
  ]
  heights = [tall for _, _, tall in groups]
  figure = Figure(figsize=(14, sum(heights)), dpi=100, layout="constrained")
  parts = figure.subfigures(
    len(groups), 1, height_ratios=heights, squeeze=False
  )
  for (panels, wide, _), part in zip(groups, parts[:, 0]):
    grid = part.subplots(math.ceil(len(panels) / wide), wide, squeeze=False)
    for axes in grid.flat[len(panels) :]:
      axes.axis("off")
    for axes, (title, curves) in zip(grid.flat, panels.items()):
      _draw(axes, title, curves)
  figure.savefig(path, facecolor="white")


def _columns(name: str, rows: Sequence[dict]) -> dict[str, np.ndarray]:
  """Per key of a trace, `[2, n]`: the steps and the values."""
  columns: dict[str, list] = {}
  for row in rows:
    if "step" not in row:
      raise ValueError(
        f"a row of trace {name!r} has the keys {sorted(row)}; expected 'step' "
        "among them: log the step with the metrics."
      )
    for key in row.keys() - {"step"}:
      columns.setdefault(key, []).append((row["step"], row[key]))
  if not columns:
    raise ValueError(f"trace {name!r} is empty; expected rows: leave it out.")
  return {k: np.array(columns[k], float).T for k in sorted(columns)}


def _draw(axes: Any, title: str, curves: Mapping[str, np.ndarray]) -> None:
  """Curves on one axis: raw values pale, their running mean strong."""
  from matplotlib import colormaps

  ordered = all(label.startswith("offset") for label in curves)
  colors = colormaps["plasma"](np.linspace(0, 0.85, len(curves)))
  tops = []
  for i, (label, (steps, values)) in enumerate(curves.items()):
    color = colors[i] if ordered else f"C{i}"
    window = max(1, len(values) // 25)
    kernel = np.ones(window) / window
    if window > 1:
      axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
      steps = np.convolve(steps, kernel, "valid")
      values = np.convolve(values, kernel, "valid")
    axes.plot(steps, values, color=color, linewidth=1.8, label=label)
    tops.append(values[len(values) // 10])
  if "cross-entropy" in title and np.isfinite(tops).all():
    # The first steps from scratch would press everything else together.
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, max(tops) + 0.1 * (max(tops) - low)))
  axes.set_title(title, loc="left", fontsize=11, color=_INK)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
  axes.tick_params(labelsize=9, colors=_MUTED)
  axes.set_xlabel("step", fontsize=9, color=_MUTED)
  if any(curves) and len(curves) > 1 or "" not in curves:
    axes.legend(frameon=False, fontsize=9)


def _spread(entry: Any) -> tuple[float, float | None] | None:
  """Mean and standard deviation of an entry; None where it says nothing."""
  if isinstance(entry, Mapping):
    values = [v for v in entry.get("values") or () if v is not None]
    mean = entry.get("mean", np.mean(values) if values else None)
    std = entry.get("std", np.std(values) if len(values) > 1 else None)
  else:
    mean, std = entry, None
  if mean is None or not math.isfinite(mean):
    return None
  return float(mean), None if std is None else float(std)


def _cells(metrics: dict) -> tuple[list[str], list[tuple[str, bool, list]]]:
  """Metric names, and per row its name, whether a model, and `(text, best)`."""
  models, reference = (
    metrics.get("models") or {},
    metrics.get("reference") or {},
  )
  rows = [(n, True, e or {}) for n, e in models.items()]
  rows += [(n, False, e or {}) for n, e in reference.items()]
  found = [key for _, _, entries in rows for key in entries]
  names = sorted(set(found), key=lambda n: ([*_HIGHER, n].index(n), n))
  best = {}
  for name in names:
    seen = [_spread(e.get(name)) for _, is_model, e in rows if is_model]
    seen = [entry[0] for entry in seen if entry]
    if name in _HIGHER and len(seen) > 1:
      best[name] = max(seen) if _HIGHER[name] else min(seen)
  cells = []
  for row, is_model, entries in rows:
    texts = []
    for name in names:
      entry = _spread(entries.get(name))
      wins = is_model and entry is not None and entry[0] == best.get(name)
      texts.append((_text(entry), wins))
    cells.append((row, is_model, texts))
  return names, cells


def _text(entry: tuple[float, float | None] | None) -> str:
  if entry is None:
    return "\N{EN DASH}"
  places = max(0, 3 - len(f"{abs(entry[0]):.0f}")) + 1
  return " \N{PLUS-MINUS SIGN} ".join(
    f"{value:.{places}f}" for value in entry if value is not None
  )


def _title(name: str) -> str:
  arrow = {True: " \N{UPWARDS ARROW}", False: " \N{DOWNWARDS ARROW}"}
  return name.replace("_", " ") + arrow.get(_HIGHER.get(name), "")


def verdicts(metrics: dict) -> list[str]:
  """One sentence per model on how it compares with the model "continued".

  "within the spread": the difference is smaller than the root of the sum of the
  two variances. The untuned "base" is not compared.
  """
  models = metrics.get("models") or {}
  sentences = []
  for name, entries in models.items():
    if name in ("base", "continued") or "continued" not in models:
      continue
    words = []
    for metric, higher in _HIGHER.items():
      mine = _spread((entries or {}).get(metric))
      theirs = _spread((models["continued"] or {}).get(metric))
      if mine is None or theirs is None:
        continue
      gain = (mine[0] - theirs[0]) * (1 if higher else -1)
      spread = math.hypot(mine[1] or 0, theirs[1] or 0)
      word = "better" if gain > 0 else "worse"
      word = "within the spread" if abs(gain) < spread else word
      word = word if gain else "equal"
      note = "" if spread else " (no spread known)"
      pair = f"{_text(mine)} against {_text(theirs)}"
      words.append(f"{metric.replace('_', ' ')} {word}{note}, {pair}")
    said = "; ".join(words) or "no metric in common"
    sentences.append(f"{name} compared with continued: {said}.")
  return sentences


def table(metrics: dict) -> str:
  """The comparison as plain text; `*` marks the best model of a column."""
  names, cells = _cells(metrics)
  lines = [["", *map(_title, names)]]
  for row, _, texts in cells:
    lines.append([row, *(text + " *" * wins for text, wins in texts)])
  widths = [max(map(len, column)) for column in zip(*lines)]
  lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
  lines.insert(1, "  ".join("-" * width for width in widths))
  return "\n".join([*lines, *verdicts(metrics)])
