"""What a work directory has to show: pictures, metrics, one page of HTML."""

from __future__ import annotations

import base64
import html
import itertools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tensorar_jax.checkpoints.files import read_json
from tensorar_jax.data import shapes
from tensorar_jax.experiment import build
from tensorar_jax.experiment.schema import Stage
from tensorar_jax.generation import batches, pictures
from tensorar_jax.reports import plots
from tensorar_jax.training import logs

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
  **dict.fromkeys(("frechet", "fid", "sfid"), False),
  **dict.fromkeys(("accuracy", "precision", "recall", "inception_score"), True),
  **dict.fromkeys(("overall", *shapes.CATEGORIES), True),
}
OURS = "tensorar_jax"  # what benchmark.json calls this project's programs
CAPTIONS = {
  "samples.png": "Samples of every model; a row is a class, or a caption.",
  "refinement.png": (
    "The same images after each look. A picture after n looks shows every token"
    " as it stood when it had been drawn at most n times; outlined cells"
    " changed since the look before."
  ),
  "refinement.gif": (
    "The same, token by token; outlined cells are revisions of this step."
  ),
  "progress.png": "Every kept checkpoint, measured.",
  "throughput.png": (
    "Quality against speed, guided: by `benchmark` on this machine; the lower"
    " and the further right the better."
  ),
  "diagnostics.png": (
    "What models make of their own drafts. Training promises a window that is"
    " right as often as the noise lets it be; the sampler feeds drafts."
  ),
  "curves.png": "Training: cross-entropy of the committed slot and the others.",
}


def draw(stages: Mapping[str, Stage], workdir: pathlib.Path, command: str):
  """Writes the pictures and report.html from what the work directory holds."""
  path = workdir / "metrics.json"
  measured = read_json(path, default={})
  found = {
    name: np.load(workdir / name / "samples.npz")
    for name in measured.get("models", {})
    if name in stages and (workdir / name / "samples.npz").exists()
  }
  if found:
    _draw_grids(found, workdir / "samples.png")
    _draw_refinement(stages, found, workdir)
  points = throughput_points(stages, measured, workdir)
  if points:
    plots.save_throughput(workdir / "throughput.png", points)
  if measured.get("diagnostics"):
    path = workdir / "diagnostics.png"
    plots.save_diagnostics(path, measured["diagnostics"])
  traces = {
    name: logs.read_trace(workdir / name / "log.jsonl") for name in stages
  }
  traces = {name: rows for name, rows in traces.items() if rows}
  if not traces:
    raise ValueError(
      f"{workdir} holds no trained stage: run --mode=train first."
    )
  plots.save_curves(workdir / "curves.png", traces)
  images = {
    caption: workdir / name
    for name, caption in CAPTIONS.items()
    if (workdir / name).exists()
  }
  write_report(workdir / "report.html", workdir.name, measured, images, command)
  if measured:
    print(table(measured))
  print(f"report: {workdir / 'report.html'}")


def _draw_grids(found, path: pathlib.Path) -> None:
  """Up to ten images of each class or prompt, a panel per model."""
  grids = {}
  for name, data in found.items():
    images, labels = data["images"], data["labels"]
    classes = sorted(set(labels.tolist()))
    rows = [images[labels == c][:10] for c in classes]
    grids[name] = np.stack([row[: min(map(len, rows))] for row in rows])
  pictures.save_sample_grids(path, grids, data["names"][classes].tolist())


def _draw_refinement(stages, found, workdir: pathlib.Path) -> None:
  """The strip of every model that looks more than once."""
  strips, changed = {}, {}
  for name, data in found.items():
    if data["drafts"].shape[2] == 1:
      continue
    tokenizer = build.frozen_tokenizer(stages[name], workdir)
    drafts = data["drafts"][: batches.STRIPS]
    strips[name], changed[name] = batches.refinement(tokenizer, drafts)
  if strips:
    pictures.save_refinement(workdir / "refinement.png", strips, changed)
    path = workdir / "refinement.gif"
    pictures.save_refinement_gif(path, strips, changed)


def throughput_points(
  stages: Mapping[str, Stage], measured: Mapping, workdir: pathlib.Path
) -> dict[str, dict[str, tuple]]:
  """{title: {model: ((images/s: median, least, most), (distance[, std]))}}.

  Distances are those of metrics.json and of every reference that stages were
  measured against, at the best guidance; speeds are of the newest benchmark, in
  its largest batch. What one of them lacks is left out.
  """
  files = sorted((workdir / "benchmark").glob("*/benchmark.json"))
  if not files:
    return {}
  cases = read_json(files[-1])["cases"]
  cases = [
    row
    for row in cases
    if row["kind"] == "decode"
    and row["guided"]
    and row["program"] == OURS
    and "error" not in row
  ]
  most = max((row["batch"] for row in cases), default=0)
  rates = {
    (row["window"], row["depth"]): row["images_per_second"]
    for row in cases
    if row["batch"] == most
  }
  found: dict[str, dict[str, tuple]] = {}
  for name, title, spread in _distances(stages, measured, workdir):
    section = stages[name].tensorar
    window = section.window
    rate = rates.get((window, section.depth if window > 1 else 1))
    if rate:
      rate = tuple(rate[key] for key in ("median", "min", "max"))
      title = f"{title} by images/s, {most} at once"
      found.setdefault(title, {})[f"{name}, k = {window}"] = rate, spread
  return found


def _distances(stages, measured, workdir):
  """(stage, title, (mean[, std])) of every distance that was measured."""
  for name, stage in stages.items():
    if stage.objective != "tensorar":
      continue
    spread = _spread(
      (measured.get("models", {}).get(name) or {}).get("frechet")
    )
    if spread:
      yield name, "Frechet distance", spread
    for path in sorted((workdir / name).glob("against-*.json")):
      records = read_json(path).values()
      best = min(
        (r["metrics"]["fid"] for r in records), key=lambda r: r["value"]
      )
      words = f"FID, {path.stem.removeprefix('against-')}"
      yield (
        name,
        words,
        (best["value"], *[best[k] for k in ("std",) if k in best]),
      )


# --- the comparison ---------------------------------------------------------


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
  heads = list(map(metric_title, names))
  lines = [[("", False), *((head, False) for head in heads)]]
  lines += [[(name, False)] for name, _ in rows]
  for metric in names:
    spreads = [_spread((row or {}).get(metric)) for _, row in rows]
    means = [spread[0] for spread in spreads[: len(models)] if spread]
    higher = _HIGHER.get(metric)
    pick = None if higher is None else max if higher else min
    best = pick(means) if pick and len(means) > 1 else None
    for i, (line, spread) in enumerate(zip(lines[1:], spreads)):
      wins = bool(spread) and i < len(models) and spread[0] == best
      line.append((_text(spread), wins))
  return lines


def metric_title(metric: str) -> str:
  """A metric in words, with an arrow where more or less of it is better."""
  return metric.replace("_", " ") + _ARROWS[_HIGHER.get(metric)]


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


def refinement_lines(metrics: dict) -> list[list[str]]:
  """A heading and a line per model and slot: training noise / own drafts."""
  both = "training noise / own drafts"
  heads = [f"{n} behind {both}" for n in ("cross-entropy", "accuracy")]
  heads += [f"window right, {both}", "committed = the draft of slot looks ago"]
  lines = [["", "slot", *heads]]
  for name, found in (metrics.get("diagnostics") or {}).items():
    for j in range(found["window"]):
      cells = [
        " / ".join(_text((kind[j],)) for kind in found[quantity].values())
        for quantity in ("cross_entropy", "accuracy")
      ]
      shown = [kind[j - 1] for kind in found["window_accuracy"].values()]
      cells += [" / ".join(_text((x,)) for x in shown) if j else ""]
      cells += [_text((found["copy_rate"][j - 1],)) if j else ""]
      lines.append([name, str(j), *cells])
  return lines


def write_report(
  path: str | pathlib.Path,
  title: str,
  metrics: dict,
  images: Mapping[str, Any],
  command: str,
) -> None:
  """One HTML file, pictures inside: what was run and what came of it."""
  text = html.escape
  models = len(metrics.get("models") or {})
  rows = []
  for i, line in enumerate(_cells(metrics)):
    kind = "td" if i else "th"
    cells = (f"<{kind}{' class=best' * b}>{text(t)}</{kind}>" for t, b in line)
    rows.append(f"<tr{' class=muted' * (i > models)}>{''.join(cells)}</tr>")
  slots = []
  for i, line in enumerate(refinement_lines(metrics)):
    kind = "td" if i else "th"
    slots.append("<tr>" + "".join(f"<{kind}>{text(t)}</{kind}>" for t in line))
  looks = "<h2>Behind its own drafts</h2><table>" + "".join(slots) + "</table>"
  looks = looks if metrics.get("diagnostics") else ""
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
  for caption, picture in images.items():
    data = base64.b64encode(pathlib.Path(picture).read_bytes()).decode()
    source = f"data:image/{pathlib.Path(picture).suffix[1:]};base64,{data}"
    caption = f"<figcaption>{text(caption)}</figcaption>"
    figures.append(f"<figure>{caption}<img alt='' src='{source}'></figure>")
  tall = 140 // max(1, math.ceil(len(figures) / 2))
  page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{text(title)}</title><style>{_STYLE}img {{ --tall: {tall}mm }}</style>
<h1>{text(title)}</h1><p>Made by <code>{text(command)}</code></p>
<p class=muted>{text(", ".join(settings))}</p><h2>Comparison</h2>
<table>{"".join(rows)}</table><p class=muted>{_LEGEND}</p><ul>{said}</ul>{looks}
<h2>Pictures</h2><div class=figures>{"".join(figures)}</div>
<h2>Wall time: {total:.1f} s</h2><table>{"".join(times)}</table>
<ul class=muted>{notes}</ul></html>"""
  pathlib.Path(path).write_text(page, encoding="utf-8")
