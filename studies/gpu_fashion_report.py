"""Shows the results of `gpu_fashion`: summary.json and two Markdown tables."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch import gpu_report
from studies.refinement_report import COLUMNS, spread
from tensorar_jax.checkpoints import files
from tensorar_jax.evaluation import tables
from tensorar_jax.evaluation.metrics import METRICS

PAGE = "summary.md"
NAMES = {
  "base": "base",
  "continued": "base, trained on",
  "tensorar": "TensorAR, published recipe",
}


def newest(lines: Iterable[Mapping[str, Any]], kind: str) -> list[dict]:
  """Returns the lines of a kind, the newest of each group, in order."""
  found = {}
  for line in lines:
    if line["line"] == kind:
      found[line.get("group")] = dict(line)
  return list(found.values())


def summarise(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the newest results, by kind."""
  about, plan = (newest(lines, kind) for kind in ("about", "plan"))
  return {
    "about": about[0] if about else {},
    "plan": plan[0] if plan else None,
    "rounds": newest(lines, "round"),
    "models": newest(lines, "model"),
  }


def round_rows(rounds: Sequence[Mapping]) -> Iterable[list[str]]:
  """Yields the cells of the base's rounds, after a heading."""
  yield ["round", "from", "learning rate", "steps", "ms a step", "held-out"]
  for one in rounds:
    yield [
      one["group"],
      one["init"] or "",
      "to 0" if one["decays"] else "constant",
      f"{one['steps']:,}",
      f"{1000 * one['step_seconds']:.2f}",
      f"{one['loss']:.4f}",
    ]


def model_rows(
  models: Sequence[Mapping], reference: Mapping[str, Mapping]
) -> Iterable[list[str]]:
  """Yields the cells of a comparison, after a heading.

  Differences are within a seed: both models of it saw the same data.
  """
  headings = (METRICS[name].heading for name in COLUMNS)
  yield ["model", "k", "seeds", "steps", "guidance", *headings, "− base's"]
  by_seed: dict[str, dict[int, Mapping]] = {}
  for model in models:
    by_seed.setdefault(model["recipe"], {})[model["seed"]] = model
  trained_on = by_seed.get("continued", {})
  for recipe, seeds in by_seed.items():
    rows = {seed: model["metrics"] for seed, model in seeds.items()}
    gaps = [
      row["frechet"] - trained_on[seed]["metrics"]["frechet"]
      for seed, row in rows.items()
      if seed in trained_on
    ]
    compared = recipe not in ("base", "continued")
    first = next(iter(seeds.values()))
    yield [
      NAMES[recipe],
      str(first["diagnostics"]["window"]),
      str(len(rows)),
      f"{first['steps']:,}",
      ", ".join(sorted({f"{row['guidance']:g}" for row in rows.values()})),
      *(spread(row[name] for row in rows.values()) for name in COLUMNS),
      spread(gaps, sign=True) if compared and gaps else "",
    ]
  for name, row in reference.items():
    cells = (spread([row[n]]) if n in row else "" for n in COLUMNS)
    yield [name, "", "", "", "", *cells, ""]


def markdown(summary: Mapping[str, Any]) -> str:
  """Returns the page: what was measured on, the base, the comparison."""
  about = summary["about"]
  parts = ["# Fashion-MNIST on a GPU", gpu_report.heading(about)]
  if summary["rounds"]:
    parts.append(tables.markdown(list(round_rows(summary["rounds"]))))
  if summary["models"]:
    rows = model_rows(summary["models"], about.get("reference", {}))
    parts.append(tables.markdown(list(rows)))
    parts.append(
      "The mean over training seeds, all from one base, ± the standard"
      " deviation. The last column is the difference of Fréchet distances"
      " within a seed. Entropy and held-out loss are in nats a token."
    )
  return "\n\n".join(parts) + "\n"


def write(folder: pathlib.Path) -> None:
  """Writes summary.json and summary.md of the results in a folder."""
  summary = summarise(gpu_report.read(folder / gpu_report.RESULTS))
  files.write_json(folder / "summary.json", summary)
  (folder / PAGE).write_text(markdown(summary), encoding="utf-8")
