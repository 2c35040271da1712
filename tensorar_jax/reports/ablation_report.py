"""The page of the ablations: a picture and tables for each data set.

It is drawn from the files of results alone, so it can be drawn again at any
time.
"""

from __future__ import annotations

import collections
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tensorar_jax.checkpoints import files
from tensorar_jax.evaluation import metrics, tables
from tensorar_jax.generation import pictures
from tensorar_jax.reports import plots

PAGE = "README.md"
CONTROL = "k = 1, the base trained on"
DECIMALS = 3  # at most, of metrics: samples and seeds are few
COMMAND = "python -m tensorar_jax.main --config=configs/ablations/{}.py{}"
INTRODUCTION = """# Ablations

One choice at a time is changed against the centre: TensorAR by the published
recipe (k = 4, depth 1, residual at the first output, categorical noise by the
exponential schedule, rdm weights). Within a data set every variant starts from
the same base model, trains for equally many steps, and is measured at the same
guidance; what differs between seeds is the order of the data, the noise, and
how the new modules start. *k = 1* is the base model itself, trained on for as
many steps. A variant that stands in several tables was run once.

* *Fréchet distance* is that of samples to the training images, in the features
  of a small classifier; *class accuracy* is the share of samples that it takes
  for what they were asked to be.
* *Entropy* is that of what a committed token is drawn from, in nats.
* *Fréchet distance − base's* is against k = 1 of the same training seed.
* *Loss* is the cross-entropy of the committed slot on held-out images: given
  windows noised as in training / given the model's own drafts.
* *Papers' FID* is on ImageNet at 256 px. Their base model has {base}.

Neither the data nor the sizes are the papers', nor is the distance: only
directions can be compared. The base models are those of the refinement study,
seed 0. Seven runs on digits with half as many steps came first, at which the
centre could not be told from the base (4.85 and 4.87); these are not counted.

The commands continue where they were stopped and skip what the files beside
this page hold; `--output=FOLDER` starts anew. The page is drawn from these
files alone by

```bash
python -m tensorar_jax.main --config=configs/ablations/all.py --mode=visualize
```"""
ONE_SEED = "a training seed"
STYLES = {
  "ours, mean of the training seeds": dict(ls="", marker="o", color="C0", ms=7),
  ONE_SEED: dict(ls="", marker=".", color="C0", alpha=0.45, ms=7),
  "papers, over their base": dict(
    ls="", marker="D", color="C1", mfc="white", ms=6
  ),
}
TICKS = (  # from fine to coarse; a panel takes the first with less than 7
  [n / 20 for n in range(10, 60)],
  [n / 10 for n in range(5, 60)],
  (0.5, 0.7, 0.8, 1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7, 10),
  (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200),
  [10.0**n for n in range(-3, 4)],
)
Results = Mapping[str, Any]  # a file of results
LIKE = {"data": str, "base": str, "records": {...: {"metrics": dict}}}


def read(folder: pathlib.Path) -> list[dict]:
  """Every file of results; ValueError if there is none."""
  contents = []
  for path in sorted(folder.glob("*.json")):
    results = files.read_json(path, dict)
    if results.get("records"):
      files.check_shape(results, LIKE, str(path))
      contents.append(results)
  if not contents:
    raise ValueError(f"{folder} holds no results yet: run an ablation first.")
  return contents


def records_of(results: Results, variant: str) -> dict[str, dict]:
  """{seed: record} of a variant, as far as it is measured."""
  split = [name.rsplit("/", 1) for name in results["records"]]
  return {
    seed: results["records"][f"{name}/{seed}"]
    for name, seed in split
    if name == variant
  }


def values(results: Results, variant: str, metric: str) -> list[float]:
  """A metric of a variant, of each seed that has it."""
  rows = [r["metrics"] for r in records_of(results, variant).values()]
  return [row[metric] for row in rows if metric in row]


def against_base(results: Results, variant: str, metric: str) -> np.ndarray:
  """[seeds, 2]: a variant's value and the base's, where both are measured."""
  records = records_of(results, variant)
  base = records_of(results, results["base"])
  pairs = [
    [record["metrics"][metric], base[seed]["metrics"][metric]]
    for seed, record in records.items()
    if seed in base
  ]
  return np.array(pairs, float).reshape(-1, 2)


def columns_of(results: Results) -> list[metrics.Metric]:
  """The metrics that have a column; pictures show the first one."""
  measured = next(iter(results["records"].values()))["metrics"]
  return [
    metric
    for name, metric in metrics.METRICS.items()
    if name in measured and not metric.is_detail
  ]


def time_of(results: Results, variant: str) -> Mapping | None:
  """The timing of a variant, None if it was not timed."""
  shape = results["shapes"].get(variant)
  rows = results["times"]
  return next((r for r in rows if [r["window"], r["depth"]] == shape), None)


def rows_of(results: Results, axis: Mapping) -> list[Mapping]:
  """The rows of a table, the base (trained on) always among them."""
  rows = list(axis["rows"])
  if results["base"] not in [row["variant"] for row in rows]:
    paper = {"paper": None, "paper_seconds": None}
    rows.append({"name": CONTROL, "variant": results["base"], **paper})
  return rows


# --- tables ------------------------------------------------------------------


def losses(results: Results, variant: str) -> str:
  """Given training noise / given own drafts, means over the seeds."""
  measured = [
    record["diagnostics"]["cross_entropy"]
    for record in records_of(results, variant).values()
    if "diagnostics" in record
  ]
  means = []
  for windows in ("training_noise", "own_drafts"):
    slots = [row[windows] for row in measured if windows in row]
    if slots:
      means.append(np.mean([slot[0] for slot in slots]))
  return " / ".join(f"{mean:.3f}" for mean in means)


def cells(results: Results, axis: Mapping) -> list[list[str]]:
  """The table of one axis, with its heading."""
  columns, rows = columns_of(results), rows_of(results, axis)
  has_papers = any(row["paper"] is not None for row in rows)
  has_times = bool(axis["timed"] and results["times"])
  has_papers_times = any(row["paper_seconds"] for row in rows)
  head = [axis["title"]]
  if has_papers:
    head.append("papers' FID \u2193")
  head += [metric.heading for metric in columns]
  head += [f"{columns[0].label} \u2212 base's", "loss"]
  if has_times:
    head.append("time over k = 1's")
  if has_papers_times:
    head.append("papers'")
  lines = [head]
  for row in rows:
    variant, paper = row["variant"], row["paper"]
    line = [row["name"] + ", the centre" * (variant == "centre")]
    if has_papers:
      line.append("" if paper is None else f"{paper:.2f}")
    for metric in columns:
      numbers = values(results, variant, metric.name)
      line.append(tables.mean_of(numbers, min(metric.decimals, DECIMALS)))
    pairs = against_base(results, variant, columns[0].name)
    gaps = pairs[:, 0] - pairs[:, 1] if variant != results["base"] else []
    line += [tables.mean_of(gaps, 2, "+"), losses(results, variant)]
    if has_times:
      line.append(_time_cell(results, variant))
    if has_papers_times:
      seconds, base = row["paper_seconds"], axis["paper_base_seconds"]
      line.append("" if seconds is None else f"{seconds / base:.2f}")
    lines.append(line)
  return lines


def _time_cell(results: Results, variant: str) -> str:
  """The time of a step over that of k = 1: median [least, largest]."""
  time = time_of(results, variant)
  if time is None:
    return ""
  if variant == results["base"]:
    return "1"
  return "{median:.2f} [{min:.2f}, {max:.2f}]".format(**time["ratio"])


def describe(results: Results) -> str:
  """A sentence or two on how the data set was measured."""
  settings, records = results["settings"], results["records"]
  counts = collections.Counter(name.rsplit("/", 1)[0] for name in records)
  fewest, most = min(counts.values()), max(counts.values())
  seeds = f"{fewest} to {most}" if fewest < most else f"{most}"
  steps, images = settings["centre"]["train"], settings["evaluation"]
  scales = {f"{r['metrics'].get('guidance', 1.0):g}" for r in records.values()}
  text = (
    f"{seeds} training seed{'s, mean ± standard deviation' * (most > 1)};"
    f" {steps['num_steps']:,} steps of {steps['batch_size']} images;"
    f" {images['num_images']:,} samples of each at guidance"
    f" {' or '.join(sorted(scales))}."
  )
  base = [row for row in results["times"] if row["window"] == 1]
  for row in base[:1]:
    text += (
      f" Time: guided sampling of {row['batch']} images on random weights, all"
      " windows and depths in turn in one process; ratios within a round,"
      f" median [least, largest]. k = 1: {row['ms_per_step']['median']:.2f} ms"
      " a step."
    )
  return text


def section(results: Results) -> str:
  """One data set: how it was measured, the picture, and a table per axis."""
  data = results["data"]
  suffix = "" if data == "digits" else f":{data}"
  parts = [f"## {data}", describe(results), f"![distances]({data}.png)"]
  for name, axis in results["axes"].items():
    command = COMMAND.format(name, suffix)
    parts += [f"### {axis['title']}", f"```bash\n{command}\n```"]
    parts.append(tables.markdown(cells(results, axis)))
    if axis["source"]:
      parts.append(f"Papers: {axis['source']}.")
  return "\n\n".join(parts)


def page(contents: Sequence[Results]) -> str:
  """The whole page as Markdown."""
  axes = [axis for results in contents for axis in results["axes"].values()]
  text = INTRODUCTION.format(base=axes[0]["paper_base"])
  return "\n\n".join([text, *map(section, contents)]) + "\n"


# --- the picture -------------------------------------------------------------


def save_picture(path: pathlib.Path, results: Results) -> None:
  """Draws a panel per axis: the first metric over the base's, and the papers'.

  One more panel shows the time, if that was measured.
  """
  from matplotlib.figure import Figure

  axes, timed = list(results["axes"].values()), bool(results["times"])
  count = len(axes) + timed
  columns = min(4, count)
  lines = math.ceil(count / columns)
  size = (3.3 * columns, 3.0 * lines + 0.4)
  figure = Figure(figsize=size, dpi=80, layout="constrained")
  panels = list(figure.subplots(lines, columns, squeeze=False).flat)
  metric = columns_of(results)[0]
  for panel, axis in zip(panels, axes):
    _draw(panel, results, axis, metric.name)
  for panel in panels[: len(axes) : columns]:
    panel.set_ylabel(f"{metric.label} over that of k = 1", fontsize=9)
  if timed:
    _draw_times(panels[len(axes)], results)
  for panel in panels[count:]:
    panel.axis("off")
  several = len({name.rsplit("/", 1)[1] for name in results["records"]}) > 1
  for name, style in STYLES.items():
    if several or name != ONE_SEED:
      panels[0].plot([], [], label=name, **style)
  style = {"frameon": False, "fontsize": 9, "ncols": len(STYLES)}
  marks = panels[0].get_legend_handles_labels()
  figure.legend(*marks, loc="outside lower center", **style)
  pictures.save_figure(path, figure)


def _draw(panel, results: Results, axis: Mapping, metric: str) -> None:
  """Draws each variant's seeds and their mean, over the base of that seed."""
  rows = [r for r in axis["rows"] if r["variant"] != results["base"]]
  mean, seeds, paper = STYLES.values()
  for x, row in enumerate(rows):
    pairs = against_base(results, row["variant"], metric)
    ratios = pairs[:, 0] / pairs[:, 1]
    if len(ratios) > 1:
      panel.plot([x] * len(ratios), ratios, **seeds)
    if len(ratios):
      panel.plot(x, ratios.mean(), **mean)
    if row["paper"] is not None:
      panel.plot(x, row["paper"] / axis["paper_base"], **paper)
  _finish(panel, [row["name"] for row in rows], axis["title"])
  _ticks(panel)


def _draw_times(panel, results: Results) -> None:
  """Draws the time of a step over that of k = 1: median and range."""
  rows = [
    (row, axis)
    for axis in results["axes"].values()
    for row in axis["rows"]
    if axis["timed"] and row["variant"] != results["base"]
  ]
  mean, _, paper = STYLES.values()
  for x, (row, axis) in enumerate(rows):
    if time := time_of(results, row["variant"]):
      low, middle, high = (time["ratio"][k] for k in ("min", "median", "max"))
      panel.vlines(x, low, high, color=mean["color"], lw=1)
      panel.plot(x, middle, **mean)
    if seconds := row["paper_seconds"]:
      panel.plot(x, seconds / axis["paper_base_seconds"], **paper)
  _finish(panel, [row["name"] for row, _ in rows], "time over that of k = 1")


def _finish(panel, names: Sequence[str], title: str) -> None:
  panel.axhline(1, color="#1f2328", lw=1.2, zorder=1.6)
  panel.set_xticks(range(len(names)), names, rotation=30, ha="right")
  panel.set_xlim(-0.5, len(names) - 0.5)
  plots.tidy(panel, title)


def _ticks(panel) -> None:
  """Sets a logarithmic scale with few ticks, labelled with plain numbers."""
  from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

  panel.set_yscale("log")
  low, high = panel.get_ylim()
  visible = ([n for n in ticks if low <= n <= high] for ticks in TICKS)
  ticks = next(ticks for ticks in visible if len(ticks) < 7)
  panel.yaxis.set_major_locator(FixedLocator(ticks))
  panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
  panel.yaxis.set_minor_locator(NullLocator())


def render(folder: pathlib.Path) -> None:
  """Writes the page and <data>.png into the folder of results."""
  contents = read(folder)
  for results in contents:
    save_picture(folder / f"{results['data']}.png", results)
  files.write_text(folder / PAGE, page(contents))
  print(f"{folder / PAGE}")
