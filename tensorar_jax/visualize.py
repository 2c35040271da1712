"""Pictures, tables and the report of a run, for people.

matplotlib and PIL are imported where they are used: importing this module costs
nothing. Tiles are laid out in whole pixels, so tiny images keep sharp edges.
"""

from __future__ import annotations

import base64
import html
import itertools
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
_ARROWS = {True: " \u2191", False: " \u2193", None: ""}  # higher is better
_LEGEND = """\u2191 higher is better, \u2193 lower is better; mean \u00b1
standard deviation; marked: the best model of a column; grey: not a model."""
# System colours follow the reader's light or dark theme.
_STYLE = """:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; padding: 0 1em;
  margin: 2em auto } h1 { font-size: 1.6em } h2 { font-size: 1.2em }
code { background: #8882; padding: .15em .4em; overflow-wrap: anywhere }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .3em .9em; border-bottom: 1px solid #8884; text-align: right }
td:first-child { text-align: left; padding-left: 0 } .muted { opacity: .7 }
.best { font-weight: bold; background: #2da44e33 } ul { padding-left: 1.2em }
.time { width: 20em } .time i { display: block; height: .7em; background: #58f }
figure { margin: 1em 0 2em } figcaption { font-weight: bold }
img { max-width: 100%; background: #fff; border-radius: 4px }
@page { size: A4; margin: 10mm }
@media print { :root { color-scheme: light } h1, h2, p, ul { margin: .3em 0 }
  body { font-size: 8pt; margin: 0; padding: 0; max-width: none }
  .figures { display: flex; flex-wrap: wrap; gap: 2mm 4mm }
  figure { margin: 0; max-width: 48% } img { max-height: var(--tall) }
  td, th { padding: .1em .7em } .best, .time i { print-color-adjust: exact } }
"""
# Metric -> whether higher is better; others are shown without a verdict.
_HIGHER = {
  **dict.fromkeys(("frechet", "fid", "sfid", "loss", "cross_entropy"), False),
  **dict.fromkeys(("accuracy", "precision", "recall", "inception_score"), True),
}
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
  axes.set_title(title, loc="left", fontsize=11, color=_INK)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
  axes.tick_params(labelsize=9, colors=_MUTED)
  axes.set_xlabel("step", fontsize=9, color=_MUTED)
  if "" not in curves:
    ncols = min(4, len(curves)) if offsets else 1
    style = {"frameon": False, "handlelength": 1.2, "columnspacing": 1.2}
    axes.legend(loc="upper right", fontsize=9, ncols=ncols, **style)


def _spread(entry: Any) -> tuple[float, ...]:
  """`(mean, std)`, `(mean,)` or, where the entry says nothing, `()`."""
  if not isinstance(entry, Mapping):
    entry = {"mean": entry}
  values = entry.get("values") or ()
  mean = entry.get("mean", np.mean(values) if len(values) else None)
  std = entry.get("std", np.std(values) if len(values) > 1 else None)
  numbers = (float("nan") if x is None else float(x) for x in (mean, std))
  return tuple(itertools.takewhile(math.isfinite, numbers))


def _text(spread: tuple[float, ...]) -> str:
  places = max(1, 4 - len(f"{abs(spread[0]):.0f}")) if spread else 0
  return " \u00b1 ".join(f"{x:.{places}f}" for x in spread) or "\u2013"


def _cells(metrics: dict) -> list[list[tuple[str, bool]]]:
  """The lines of the comparison; each cell with whether it is the best."""
  models = metrics.get("models") or {}
  rows = [*models.items(), *(metrics.get("reference") or {}).items()]
  found = dict.fromkeys(metric for _, row in rows for metric in row or ())
  names = [m for m in _HIGHER if m in found]
  names += [m for m in found if m not in _HIGHER]
  heads = [m.replace("_", " ") + _ARROWS[_HIGHER.get(m)] for m in names]
  lines = [[("", False), *((head, False) for head in heads)]]
  lines += [[(name, False)] for name, _ in rows]
  for metric in names:
    spreads = [_spread((row or {}).get(metric)) for _, row in rows]
    means = [spread[0] for spread in spreads[: len(models)] if spread]
    pick = {True: max, False: min}.get(_HIGHER.get(metric))
    best = pick(means) if pick and len(means) > 1 else None
    for i, (line, spread) in enumerate(zip(lines[1:], spreads)):
      wins = bool(spread) and i < len(models) and spread[0] == best
      line.append((_text(spread), wins))
  return lines


def table(metrics: dict) -> str:
  """The comparison as plain text; `*` marks the best model of a column."""
  lines = [[t + " *" * best for t, best in line] for line in _cells(metrics)]
  widths = [max(map(len, column)) for column in zip(*lines)]
  lines.insert(1, ["-" * width for width in widths])
  lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
  return "\n".join([*lines, *verdicts(metrics)])


def verdicts(metrics: dict) -> list[str]:
  """One sentence per TensorAR model on how it compares with "continued".

  That is every model but "base" and "continued". Within the spread means: the
  difference is smaller than the root of the sum of both variances.
  """
  models = dict(metrics.get("models") or {})
  continued = models.pop("continued", None) or {}
  models.pop("base", None)
  sentences = []
  for name, row in models.items() if continued else ():
    words: dict[str, list[str]] = {}
    for metric, higher in _HIGHER.items():
      mine, theirs = (_spread((x or {}).get(metric)) for x in (row, continued))
      if not mine or not theirs:
        continue
      gain = (mine[0] - theirs[0]) * (1 if higher else -1)
      word = "better" if gain > 0 else "worse" if gain < 0 else "equal"
      if abs(gain) < math.hypot(*mine[1:], *theirs[1:]):
        word = "within the spread"
      elif not mine[1:] + theirs[1:]:
        word += " (spread not measured)"
      values = f"{_text(mine[:1])} against {_text(theirs[:1])}"
      said = f"{metric.replace('_', ' ')} ({values})"
      words.setdefault(word, []).append(said)
    said = "; ".join(f"{w} in {', '.join(m)}" for w, m in words.items())
    said = said or "no metric in common"
    sentences.append(f"{name} compared with continued: {said}.")
  return sentences


def write_report(
  path: Path_, title: str, metrics: dict, pictures: Named, command: str
) -> None:
  """One HTML file, pictures inside: what was run and what came of it."""
  text = html.escape
  models = len(metrics.get("models") or {})
  rows = []
  for i, line in enumerate(_cells(metrics)):
    kind = "td" if i else "th"
    cells = (f"<{kind}{' class=best' * b}>{text(t)}</{kind}>" for t, b in line)
    rows.append(f"<tr{' class=muted' * (i > models)}>{''.join(cells)}</tr>")
  seconds = {k: v for k, v in (metrics.get("seconds") or {}).items() if v}
  longest, total = max(seconds.values(), default=0), sum(seconds.values())
  times = []
  for stage, s in seconds.items():
    bar = f"<td class=time><i style='width:{100 * s / longest:.1f}%'></i>"
    times.append(f"<tr><td>{text(stage)}</td><td>{s:.1f} s</td>{bar}</td></tr>")
  settings = [f"{k} {v}" for k, v in (metrics.get("settings") or {}).items()]
  items = [verdicts(metrics), metrics.get("notes") or []]
  said, notes = ("".join(f"<li>{text(x)}" for x in part) for part in items)
  figures = []
  for caption, picture in pictures.items():
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    source = f"data:image/{Path(picture).suffix[1:]};base64,{data}"
    caption = f"<figcaption>{text(caption)}</figcaption>"
    figures.append(f"<figure>{caption}<img alt='' src='{source}'></figure>")
  tall = 140 // max(1, math.ceil(len(figures) / 2))
  page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{text(title)}</title><style>{_STYLE}img {{ --tall: {tall}mm }}</style>
<h1>{text(title)}</h1><p>Made by <code>{text(command)}</code></p>
<p class=muted>{text(", ".join(settings))}</p><h2>Comparison</h2>
<table>{"".join(rows)}</table><p class=muted>{_LEGEND}</p><ul>{said}</ul>
<h2>Pictures</h2><div class=figures>{"".join(figures)}</div>
<h2>Wall time: {total:.1f} s</h2><table>{"".join(times)}</table>
<ul class=muted>{notes}</ul></html>"""
  Path(path).write_text(page, encoding="utf-8")
