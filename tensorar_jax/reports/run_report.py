"""The report of a work directory: pictures, metrics and one page of HTML."""

from __future__ import annotations

import base64
import html
import itertools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tensorar_jax.checkpoints import files
from tensorar_jax.evaluation import metrics, tables
from tensorar_jax.experiment import build
from tensorar_jax.experiment.schema import Stage
from tensorar_jax.generation import batches, pictures
from tensorar_jax.reports import plots
from tensorar_jax.training import logs

_LEGEND = """↑ higher is better, ↓ lower is better; mean ± standard deviation.
The best model of each column is highlighted; grey rows are not models."""
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
OURS = "tensorar_jax"  # what benchmark.json calls this project's programs
CAPTIONS = {
  "samples.png": "Samples of every model; a row is a class or a caption.",
  "refinement.png": (
    "The same images after each look. The picture after n looks shows every"
    " token as it stood after it had been drawn at most n times; outlined cells"
    " changed since the look before."
  ),
  "refinement.gif": (
    "The same images, token by token; outlined cells are revised in this step."
  ),
  "progress.png": "The metrics of every kept checkpoint.",
  "throughput.png": (
    "Quality against speed, with guidance, as `benchmark` measured it on this"
    " machine; lower and further right is better."
  ),
  "diagnostics.png": (
    "How models continue their own drafts. In training, tokens of the window"
    " are right as often as the noise lets them be; the sampler feeds drafts."
  ),
  "curves.png": "Training: cross-entropy of the committed slot and the others.",
}


# What is read of the files of a work directory.
METRICS = {"models": {...: dict}}
SAMPLES = ("images", "labels", "drafts", "names")  # of evaluate.measure_model
BENCHMARK = {
  "cases": [
    {
      **{"kind": str, "guided": bool, "program": str},
      **{"batch": int, "window": int, "depth": int},
    }
  ]
}


def draw(stages: Mapping[str, Stage], workdir: pathlib.Path, command: str):
  """Writes the pictures and report.html from the files of a work directory."""
  files.remove_leftovers(workdir.glob("*"))
  measured = files.read_json(workdir / "metrics.json", METRICS, default={})
  samples = {
    name: files.read_arrays(workdir / name / "samples.npz", SAMPLES)
    for name in measured.get("models", {})
    if name in stages and (workdir / name / "samples.npz").exists()
  }
  if samples:
    _draw_grids(samples, workdir / "samples.png")
    _draw_refinement(stages, samples, workdir)
  points = throughput_points(stages, measured, workdir)
  if points:
    plots.save_throughput(workdir / "throughput.png", points)
  if measured.get("diagnostics"):
    plots.save_diagnostics(workdir / "diagnostics.png", measured["diagnostics"])
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


def _draw_grids(samples, path: pathlib.Path) -> None:
  """Draws up to ten images of each class or prompt, a panel per model."""
  grids = {}
  for name, arrays in samples.items():
    images, labels = arrays["images"], arrays["labels"]
    classes = sorted(set(labels.tolist()))
    rows = [images[labels == c][:10] for c in classes]
    grids[name] = np.stack([row[: min(map(len, rows))] for row in rows])
  pictures.save_sample_grids(path, grids, arrays["names"][classes].tolist())


def _draw_refinement(stages, samples, workdir: pathlib.Path) -> None:
  """Draws the strip of every model that looks more than once."""
  strips, changed = {}, {}
  for name, arrays in samples.items():
    if arrays["drafts"].shape[2] == 1:
      continue
    tokenizer = build.frozen_tokenizer(stages[name], workdir)
    drafts = arrays["drafts"][: batches.STRIPS]
    strips[name], changed[name] = batches.refinement(tokenizer, drafts)
  if strips:
    pictures.save_refinement(workdir / "refinement.png", strips, changed)
    pictures.save_refinement_gif(workdir / "refinement.gif", strips, changed)


def throughput_points(
  stages: Mapping[str, Stage], measured: Mapping, workdir: pathlib.Path
) -> dict[str, dict[str, tuple]]:
  """{title: {model: ((images/s: median, least, most), (distance[, std]))}}.

  Distances are those of metrics.json and of every reference that stages were
  measured against, at the best guidance; speeds are of the newest benchmark, in
  its largest batch. A model without a distance or a speed is left out.
  """
  benchmarks = sorted((workdir / "benchmark").glob("*/benchmark.json"))
  if not benchmarks:
    return {}
  cases = [
    row
    for row in files.read_json(benchmarks[-1], BENCHMARK)["cases"]
    if row["kind"] == "decode"
    and row["guided"]
    and row["program"] == OURS
    and "error" not in row
  ]
  largest = max((row["batch"] for row in cases), default=0)
  rates = {
    (row["window"], row["depth"]): row["images_per_second"]
    for row in cases
    if row["batch"] == largest
  }
  points: dict[str, dict[str, tuple]] = {}
  for name, title, distance in _distances(stages, measured, workdir):
    tensorar = stages[name].tensorar
    window = tensorar.window
    rate = rates.get((window, tensorar.depth if window > 1 else 1))
    if rate:
      speed = (rate["median"], rate["min"], rate["max"])
      models = points.setdefault(f"{title} by images/s, {largest} at once", {})
      models[f"{name}, k = {window}"] = speed, distance
  return points


def _distances(stages, measured, workdir):
  """Yields (stage, title, (mean[, std])) of every distance measured."""
  for name, stage in stages.items():
    if stage.objective != "tensorar":
      continue
    model = measured.get("models", {}).get(name) or {}
    if distance := _mean_and_std(model.get("frechet")):
      yield name, metrics.find("frechet").label, distance
    for path in sorted((workdir / name).glob("against-*.json")):
      like = {...: {"metrics": {"fid": {"value": float}}}}
      entries = [
        r["metrics"]["fid"] for r in files.read_json(path, like).values()
      ]
      best = min(entries, key=lambda entry: entry["value"])
      distance = tuple(best[key] for key in ("value", "std") if key in best)
      yield name, f"FID, {path.stem.removeprefix('against-')}", distance


# --- the comparison ---------------------------------------------------------


def _mean_and_std(entry: Any) -> tuple[float, ...]:
  """`(mean, std)`, `(mean,)` or, where the entry has no number, `()`."""
  if not isinstance(entry, Mapping):
    entry = {"mean": entry}
  values = entry.get("values") or ()
  mean = entry.get("mean", np.mean(values) if len(values) else None)
  std = entry.get("std", np.std(values) if len(values) > 1 else None)
  numbers = (float("nan") if x is None else float(x) for x in (mean, std))
  return tuple(itertools.takewhile(math.isfinite, numbers))


def _text(number: tuple[float, ...]) -> str:
  return tables.plus_minus(*number) if number else "\u2013"


def _cells(measured: dict) -> list[list[tuple[str, bool]]]:
  """The lines of the comparison; each cell with whether it is the best."""
  models = measured.get("models") or {}
  rows = [*models.items(), *(measured.get("reference") or {}).items()]
  names = dict.fromkeys(name for _, row in rows for name in row or ())
  columns = metrics.in_order(names)
  head = [("", False)] + [(metric.heading, False) for metric in columns]
  lines = [[(name, False)] for name, _ in rows]
  for metric in columns:
    numbers = [_mean_and_std((row or {}).get(metric.name)) for _, row in rows]
    means = [number[0] for number in numbers[: len(models)] if number]
    best = None
    if metric.higher_is_better is not None and len(means) > 1:
      best = max(means) if metric.higher_is_better else min(means)
    for i, (line, number) in enumerate(zip(lines, numbers)):
      is_best = bool(number) and i < len(models) and number[0] == best
      line.append((_text(number), is_best))
  return [head, *lines]


def table(measured: dict) -> str:
  """The comparison as plain text; `*` marks the best model of a column."""
  lines = [[t + " *" * best for t, best in line] for line in _cells(measured)]
  widths = [max(map(len, column)) for column in zip(*lines)]
  lines.insert(1, ["-" * width for width in widths])
  lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
  return "\n".join([*lines, *verdicts(measured)])


def verdicts(measured: dict) -> list[str]:
  """One sentence per TensorAR model on how it compares with "continued".

  That is every model but "base" and "continued". Within the spread means: the
  difference is smaller than the root of the sum of both variances.
  """
  models = dict(measured.get("models") or {})
  continued = models.pop("continued", None) or {}
  models.pop("base", None)
  sentences = []
  for name, row in models.items() if continued else ():
    compared: dict[str, list[str]] = {}  # by verdict
    for metric in metrics.METRICS.values():
      ours = _mean_and_std((row or {}).get(metric.name))
      theirs = _mean_and_std(continued.get(metric.name))
      if metric.higher_is_better is None or not ours or not theirs:
        continue
      verdict = _verdict(metric, ours, theirs)
      values = f"{_text(ours[:1])} against {_text(theirs[:1])}"
      compared.setdefault(verdict, []).append(f"{metric.label} ({values})")
    parts = [f"{verdict} in {', '.join(m)}" for verdict, m in compared.items()]
    result = "; ".join(parts) or "no metric in common"
    sentences.append(f"{name} compared with continued: {result}.")
  return sentences


def _verdict(
  metric: metrics.Metric, ours: tuple[float, ...], theirs: tuple[float, ...]
) -> str:
  """Whether a mean is better than another, each with its std if known."""
  gain = (ours[0] - theirs[0]) * (1 if metric.higher_is_better else -1)
  if abs(gain) < math.hypot(*ours[1:], *theirs[1:]):
    return "within the spread"
  verdict = "better" if gain > 0 else "worse" if gain < 0 else "equal"
  has_spread = len(ours) > 1 or len(theirs) > 1
  return verdict if has_spread else f"{verdict} (spread not measured)"


def refinement_lines(measured: dict) -> list[list[str]]:
  """A heading and a line per model and slot: training noise / own drafts."""
  both = "training noise / own drafts"
  head = ["", "slot", f"cross-entropy, {both}", f"accuracy, {both}"]
  head += [f"right tokens in the window, {both}"]
  head += ["committed = the draft of that many looks before"]
  lines = [head]
  for name, diagnostics in (measured.get("diagnostics") or {}).items():
    for j in range(diagnostics["window"]):
      cells = [
        " / ".join(_text((slots[j],)) for slots in diagnostics[key].values())
        for key in ("cross_entropy", "accuracy")
      ]
      if j:
        right = [s[j - 1] for s in diagnostics["window_accuracy"].values()]
        cells.append(" / ".join(_text((share,)) for share in right))
        cells.append(_text((diagnostics["copy_rate"][j - 1],)))
      else:  # the committed slot is no draft
        cells += ["", ""]
      lines.append([name, str(j), *cells])
  return lines


# --- the page ----------------------------------------------------------------


def _html_rows(lines: list[list[tuple[str, bool]]], models: int) -> str:
  """The rows of a table; cells marked True stand out, rows after `models` fade.

  The first line is the heading.
  """
  rows = []
  for i, line in enumerate(lines):
    tag = "td" if i else "th"
    cells = [
      f"<{tag}{' class=best' * is_best}>{html.escape(text)}</{tag}>"
      for text, is_best in line
    ]
    rows.append(f"<tr{' class=muted' * (i > models)}>{''.join(cells)}</tr>")
  return "".join(rows)


def _html_times(seconds: Mapping[str, float]) -> str:
  """The rows of the table of wall times, each with a bar."""
  longest = max(seconds.values(), default=0)
  rows = []
  for stage, s in seconds.items():
    bar = f"<td class=time><i style='width:{100 * s / longest:.1f}%'></i>"
    name = html.escape(stage)
    rows.append(f"<tr><td>{name}</td><td>{s:.1f} s</td>{bar}</td></tr>")
  return "".join(rows)


def _html_figure(caption: str, picture: str | pathlib.Path) -> str:
  picture = pathlib.Path(picture)
  data = base64.b64encode(picture.read_bytes()).decode()
  source = f"data:image/{picture.suffix[1:]};base64,{data}"
  caption = f"<figcaption>{html.escape(caption)}</figcaption>"
  return f"<figure>{caption}<img alt='' src='{source}'></figure>"


def write_report(
  path: str | pathlib.Path,
  title: str,
  measured: dict,
  images: Mapping[str, Any],
  command: str,
) -> None:
  """Writes one HTML file with everything inside: settings, metrics, pictures.

  Args:
    path: of the file.
    title: of the page.
    measured: the content of metrics.json; anything in it may be missing.
    images: caption -> path of a picture.
    command: which made the run.
  """
  text = html.escape
  items = lambda lines: "".join(f"<li>{text(line)}</li>" for line in lines)
  models = len(measured.get("models") or {})
  looks = ""
  if measured.get("diagnostics"):
    lines = [[(t, False) for t in line] for line in refinement_lines(measured)]
    looks = "<h2>Given its own drafts</h2>"
    looks += f"<table>{_html_rows(lines, len(lines))}</table>"
  seconds = {k: v for k, v in (measured.get("seconds") or {}).items() if v}
  settings = [f"{k} {v}" for k, v in (measured.get("settings") or {}).items()]
  figures = [_html_figure(caption, file) for caption, file in images.items()]
  tall = 140 // max(1, math.ceil(len(figures) / 2))
  page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{text(title)}</title><style>{_STYLE}img {{ --tall: {tall}mm }}</style>
<h1>{text(title)}</h1><p>Made by <code>{text(command)}</code></p>
<p class=muted>{text(", ".join(settings))}</p><h2>Comparison</h2>
<table>{_html_rows(_cells(measured), models)}</table>
<p class=muted>{_LEGEND}</p><ul>{items(verdicts(measured))}</ul>{looks}
<h2>Pictures</h2><div class=figures>{"".join(figures)}</div>
<h2>Wall time: {sum(seconds.values()):.1f} s</h2>
<table>{_html_times(seconds)}</table>
<ul class=muted>{items(measured.get("notes") or [])}</ul></html>"""
  files.write_text(pathlib.Path(path), page)
