"""Turns the timings of a benchmark into rates, ratios, tables and a plot."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tensorar_jax.checkpoints import files
from tensorar_jax.evaluation import tables
from tensorar_jax.generation import pictures
from tensorar_jax.performance.workloads import OURS, Case, Work
from tensorar_jax.reports import plots

Stat = dict[str, float]
Row = Mapping[str, Any]  # one of the "cases" in benchmark.json
SPREAD = "median, and in brackets the least and the largest of the rounds"
_COLORS = {"of_read": "C0", "of_flops": "C1"}
_WORDS = {"of_read": "reading the weights", "of_flops": "matrix products"}


def summary(values: Sequence[float]) -> Stat:
  """Returns {"median", "min", "max"} of the values."""
  return {
    "median": float(np.median(values)),
    "min": float(min(values)),
    "max": float(max(values)),
  }


def figures(
  work: Work,
  seconds: Sequence[float],
  limits: Sequence[Mapping[str, float]],
  peak: float | None = None,
  steps: int | None = None,
) -> dict[str, Stat]:
  """Returns the rates of a case and its shares of the limits.

  Args:
    work: one run of the case.
    seconds: the time of a run, for each round.
    limits: {"flops": FLOP/s, "read": bytes/s} measured in each round.
    peak: FLOP/s by the data sheet; "mfu" is the share of it.
    steps: steps of the backbone in a run, if not one for each token.
  """
  rates = {
    "images_per_second": [work.batch / s for s in seconds],
    "tokens_per_second": [work.batch * work.tokens / s for s in seconds],
  }
  if work.kind == "decode":
    steps = steps or work.tokens
    rates["ms_per_step"] = [1000 * s / steps for s in seconds]
  if work.flops and peak:
    rates["mfu"] = [work.flops / s / peak for s in seconds]
  for name, amount in (("flops", work.flops), ("read", work.bytes)):
    if amount:
      pairs = zip(seconds, limits)
      rates[f"of_{name}"] = [amount / s / limit[name] for s, limit in pairs]
  return {name: summary(values) for name, values in rates.items()}


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns times over those of the window decoder with k = 1.

  The times are of wider windows, of the peer, and of the parallel decoder; for
  that, the base is the window decoder of the same model. Each ratio has the
  median and the range over the rounds. Beside those of wider windows are the
  ratios of the FLOPs and of the bytes of weights, below which the time cannot
  fall.
  """
  good = [row for row in rows if "error" not in row]
  same = ("kind", "batch", "guided")
  compared = []
  for row in good:
    for base in good:
      if any(row[key] != base[key] for key in same) or base["rows"]:
        continue
      if base["program"] != OURS:
        continue
      same_model = all(row[key] == base[key] for key in ("window", "depth"))
      parallel = row["rows"] and same_model
      of_one = base["window"] == 1 and not row["rows"]
      wider = of_one and row["window"] > 1
      peer = of_one and row["window"] == 1 and row["program"] != OURS
      if not wider and not peer and not parallel:
        continue
      pairs = zip(row["seconds"], base["seconds"])
      compared.append(
        {
          "name": row["name"],
          "of": row["program"],
          "over": "k=1" if wider else "one row" if parallel else OURS,
          **summary([a / b for a, b in pairs]),
          "flops": None if parallel else _ratio(row, base, "flops"),
          "bytes": None if parallel else _ratio(row, base, "bytes"),
        }
      )
  return compared


def _ratio(row, base, key) -> float | None:
  return row[key] / base[key] if base[key] else None


def case_record(
  case: Case,
  warm: Row,
  runs: Sequence[Row],
  limits: Sequence[Row],
  peak: float | None = None,
) -> dict[str, Any]:
  """Gathers the measurements of a case and the figures computed from them.

  "device_bytes" is the devices' peak memory if this case raised it, and null if
  an earlier case needed as much.
  """
  row: dict[str, Any] = {"name": case.work.name, "program": case.program}
  row |= dataclasses.asdict(case.work)
  if "error" in warm:
    return {**row, **warm}
  if not runs:
    return row | {"error": f"timed only once: {warm['seconds']:.4g} s"}
  seconds = [run["seconds"] for run in runs]
  extra = [run["extra_bytes"] for run in runs if run["extra_bytes"] is not None]
  compiled = warm.get("compile_seconds")
  if compiled is None and case.program.endswith(("compile", "graphs")):
    compiled = max(0.0, warm["seconds"] - float(np.median(seconds)))
  row |= {"seconds": seconds, "compile_seconds": compiled}
  row |= {"extra_bytes": max(extra, default=None)}
  row |= {"device_bytes": warm.get("device_bytes"), "steps": warm.get("steps")}
  steps = row["steps"] and row["steps"]["max"]
  return row | figures(case.work, seconds, limits, peak, steps)


# --- tables and plot ---------------------------------------------------------


def _stat(stat: Row | None, digits: int = 3) -> str:
  """Formats a figure as `12.3 [12.1, 12.9]`; None is a dash."""
  if stat is None:
    return "\u2013"
  number = lambda x: f"{x:.{digits}g}" if abs(x) < 10**digits else f"{x:,.0f}"
  middle, low, high = (number(stat[k]) for k in ("median", "min", "max"))
  return f"{middle} [{low}, {high}]"


def _steps(row: Row) -> str:
  """Formats steps of the backbone for an image, `62 [51, 70]` if they vary."""
  if row["kind"] != "decode":
    return "\u2013"
  steps = row.get("steps")
  if not steps:
    return str(row["tokens"])
  return f"{steps['mean']:.1f} [{steps['min']}, {steps['max']}]"


def _percent(stat: Row | None) -> str:
  return "\u2013" if stat is None else f"{stat['median']:.0%}"


def _plain(value: float | int | None, form: str) -> str:
  return "\u2013" if value is None else form.format(value)


def case_rows(record: Mapping[str, Any]) -> list[list[str]]:
  """Returns a table: a heading, and a line for every case."""
  heads = ["case", "program", "steps", "ms per step", "images/s", "tokens/s"]
  heads += ["of the read limit", "of the FLOP/s limit", "MFU"]
  heads += ["compile s", "adds GiB", "device GiB"]
  lines = [heads]
  for row in record["cases"]:
    line = [row["name"], row["program"]]
    if "error" in row:
      lines.append([*line, f"failed: {row['error']}", *[""] * (len(heads) - 3)])
      continue
    extra = row["extra_bytes"]
    tokens = row["tokens_per_second"] if row["kind"] == "train" else None
    line += [_steps(row)]
    line += [_stat(row.get("ms_per_step")), _stat(row["images_per_second"])]
    line += [_stat(tokens)]
    shares = (row.get(name) for name in ("of_read", "of_flops", "mfu"))
    line += [_percent(share) for share in shares]
    line += [_plain(row["compile_seconds"], "{:.1f}")]
    held = row["device_bytes"]
    line += [_plain(extra and extra / 2**30, "{:.2f}")]
    line += [_plain(held and held / 2**30, "{:.2f}")]
    lines.append(line)
  return lines


def ratio_rows(record: Mapping[str, Any]) -> list[list[str]]:
  """Returns a heading and a line for every ratio; empty without ratios."""
  lines = [["case", "time of", "over that of", "ratio", "weights", "FLOPs"]]
  for row in record["ratios"]:
    wider = row["of"] == OURS
    work = [
      _plain(row[key] if wider else None, "{:.3f}")
      for key in ("bytes", "flops")
    ]
    lines.append([row["name"], row["of"], row["over"], _stat(row), *work])
  return lines if len(lines) > 1 else []


def heading(record: Mapping[str, Any]) -> list[str]:
  """Returns sentences on the stage, the machine and its limits."""
  about, limits = record["machine"], record["limits"]
  scaled = {
    name: {k: v / 1e9 for k, v in limits[name].items()} for name in limits
  }
  software = ", ".join(f"{k} {v}" for k, v in record["software"].items())
  peak = record["device_peak_bytes"]
  sentences = [
    f"Stage {record['stage']} in {record['dtype']}, products of"
    f" {record['products']}, {record['settings']['rounds']} rounds: {SPREAD}.",
    f"{about['processor']}, {about['cores']} cores,"
    f" {len(about['devices'])} x {about['devices'][0]}; load average at the"
    f" start {about['load_average']:.2f}. {software}.",
    f"Limits: {_stat(scaled['flops'])} GFLOP/s in a large matrix product,"
    f" {_stat(scaled['read'])} GB/s in a long read.",
    "ROWSxIMAGES: 2x8 is 8 images, each with and without its condition. m rows"
    " at once are the parallel decoder's; its steps are those of an image, over"
    " the images of a batch, and ms per step is of the slowest one.",
  ]
  if record["peak_flops"]:
    sentences.append(
      "MFU is the share of the data sheet's"
      f" {record['peak_flops'] / 1e12:.4g} TFLOP/s."
    )
  if peak:
    sentences.append(f"Peak device memory: {peak / 2**30:.2f} GiB.")
  return sentences


def text(record: Mapping[str, Any]) -> str:
  """Returns the report for a console."""
  parts = [heading(record)]
  for rows in (case_rows(record), ratio_rows(record)):
    # Failures hold long messages, so they do not set the column widths.
    short = [r for r in rows if not any(c.startswith("failed") for c in r)]
    widths = [max(map(len, column)) for column in zip(*short)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    parts.append(lines)
  return "\n\n".join("\n".join(lines) for lines in parts if lines)


def markdown(record: Mapping[str, Any]) -> str:
  """Returns the report as Markdown."""
  parts = ["# Benchmark", "\n".join(f"- {s}" for s in heading(record))]
  for rows in (case_rows(record), ratio_rows(record)):
    if rows:
      parts.append(tables.markdown(rows))
  return "\n\n".join([*parts, "![](benchmark.png)"]) + "\n"


def write(folder: pathlib.Path, record: Mapping[str, Any]) -> None:
  """Writes benchmark.md and benchmark.png."""
  files.write_text(folder / "benchmark.md", markdown(record))
  save_picture(folder / "benchmark.png", record)


def save_picture(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  """Plots images/s by batch, and each case's share of the limits."""
  from matplotlib.figure import Figure
  from matplotlib.patches import Patch

  good = [row for row in record["cases"] if "error" not in row]
  size = (14, max(3.6, 1.2 + 0.26 * len(good)))
  figure = Figure(figsize=size, dpi=110, layout="constrained")
  rates, shares = figure.subplots(1, 2)
  lines: dict[str, list] = {}
  for row in good:
    if row["kind"] == "decode" and row["guided"]:
      words = [row["program"], f"k = {row['window']}"]
      words += [f"depth {row['depth']}"] if row["depth"] > 1 else []
      words += [f"m = {row['rows']}"] if row["rows"] else []
      lines.setdefault(", ".join(words), []).append(row)
  for name, rows in lines.items():
    stats = [row["images_per_second"] for row in rows]
    low, middle, high = (
      [s[k] for s in stats] for k in ("min", "median", "max")
    )
    bars = [
      [m - a for m, a in zip(middle, low)],
      [b - m for m, b in zip(middle, high)],
    ]
    style = {"marker": "o", "lw": 1.4, "capsize": 3, "label": name}
    style |= {} if name.startswith(OURS) else {"ls": "--", "mfc": "white"}
    rates.errorbar([row["batch"] for row in rows], middle, yerr=bars, **style)
  plots.tidy(rates, "guided generation, images/s by batch")
  if lines:
    rates.set(xscale="log", yscale="log")
    batches = sorted({row["batch"] for rows in lines.values() for row in rows})
    rates.set_xticks(batches, map(str, batches))
    rates.set_xticks([], minor=True)
    rates.legend(frameon=False, fontsize=8)
  for i, row in enumerate(reversed(good)):
    for share, shift in (("of_read", 0.2), ("of_flops", -0.2)):
      if share in row:
        value = row[share]["median"]
        shares.barh(i + shift, value, 0.4, color=_COLORS[share])
  keys = [Patch(color=_COLORS[share], label=_WORDS[share]) for share in _WORDS]
  names = [f"{row['name']}, {row['program']}" for row in reversed(good)]
  plots.tidy(shares, "share of the machine's limit")
  shares.set_yticks(range(len(good)), names)
  shares.set_xlim(0, max(1, shares.get_xlim()[1]))
  shares.legend(handles=keys, frameon=False, fontsize=8, loc="lower right")
  pictures.save_figure(path, figure)
