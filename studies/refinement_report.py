"""Shows the records of the refinement study: Markdown tables and a picture."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from tensorar_jax.evaluation import tables
from tensorar_jax.evaluation.metrics import METRICS
from tensorar_jax.reports import plots

NAMES = {
  "continued": "base, trained on",
  "control": "control, beta = 1",
  "categorical": "TensorAR, published recipe",
  "drafts": "TensorAR, own drafts as noise",
}
COLUMNS = ("frechet", "accuracy", "precision", "recall", "entropy")
PLANES = (("recall", "precision"), ("entropy", "frechet"))
# The seeds of one model, {seed: record}, by (window, recipe).
Models = dict[tuple[int, str], dict[str, dict]]


def by_model(results: Mapping[str, dict]) -> dict[str, Models]:
  """Groups the records by data set and model, in the order of the file."""
  grouped: dict[str, Models] = {}
  for name, record in results.items():
    data, window, seed, recipe = name.split("/")
    models = grouped.setdefault(data, {})
    models.setdefault((int(window[1:]), recipe), {})[seed] = record

  def window_of(item):
    (window, _), _ = item
    return window

  return {
    data: dict(sorted(models.items(), key=window_of))
    for data, models in grouped.items()
  }


def spread(values: Iterable[float], sign: bool = False) -> str:
  """Writes the mean, and of several values the standard deviation."""
  values = list(values)
  places = 2 if sign or abs(np.mean(values or 0)) >= 10 else 3
  return tables.mean_of(values, places, "+" * sign)


def comparison_rows(models: Models) -> Iterable[list[str]]:
  """Yields the cells: each model, then the base at the model's entropy."""
  yield [
    "model",
    "k",
    "guidance",
    *(METRICS[name].heading for name in COLUMNS),
    "distance − base's",
    "− base's at equal entropy",
  ]
  base = models.get((1, "continued"), {})
  for (window, recipe), seeds in models.items():
    measured = {seed: record["metrics"] for seed, record in seeds.items()}
    matched, gaps = {}, ["", ""]
    if window > 1:
      matched = {seed: record["matched"] for seed, record in seeds.items()}
      bases = {s: base[s]["metrics"] for s in measured if s in base}
      gaps = [
        spread(
          (measured[s]["frechet"] - other[s]["frechet"] for s in other),
          sign=True,
        )
        for other in (bases, matched)
      ]
    scales = sorted({f"{row['guidance']:g}" for row in measured.values()})
    yield [
      NAMES[recipe],
      str(window),
      ", ".join(scales),
      *(spread(row[name] for row in measured.values()) for name in COLUMNS),
      *gaps,
    ]
    if window > 1:
      temperature = spread(row["temperature"] for row in matched.values())
      yield [
        f"↳ base at that entropy, temperature {temperature}",
        "1",
        "",
        *(spread(row[name] for row in matched.values()) for name in COLUMNS),
        "",
        "",
      ]


def slot_rows(models: Models) -> Iterable[list[str]]:
  """Yields the cells of the diagnostics: a row for each model and slot."""
  yield [
    "model",
    "k",
    "slot",
    "cross-entropy, training noise",
    "cross-entropy, own drafts",
    "right in the training windows",
    "right among own drafts",
    "committed = draft of that many looks before",
  ]
  kinds = ("training_noise", "own_drafts")
  for (window, recipe), seeds in models.items():
    if window == 1:
      continue
    diagnostics = [record["diagnostics"] for record in seeds.values()]
    for j in range(window):
      row = [NAMES[recipe], str(window), str(j)]
      row += [
        spread(seed["cross_entropy"][kind][j] for seed in diagnostics)
        for kind in kinds
      ]
      if j == 0:
        yield [*row, "", "", ""]
        continue
      row += [
        spread(seed["window_accuracy"][kind][j - 1] for seed in diagnostics)
        for kind in kinds
      ]
      yield [*row, spread(seed["copy_rate"][j - 1] for seed in diagnostics)]


def markdown(results: Mapping[str, dict]) -> str:
  """Renders two tables for each data set, and says how they were measured."""
  parts = []
  for data, models in by_model(results).items():
    count = max(len(seeds) for seeds in models.values())
    records = [r for seeds in models.values() for r in seeds.values()]
    settings = records[0]["settings"]
    parts += [
      f"### {data}",
      f"{count} training seed{'s, mean ± standard deviation' * (count > 1)};"
      f" {settings['num_images']:,} images per model, at the guidance that a"
      f" scan of {settings['scan_images']:,} chose. Distances to a base are"
      " differences within a seed. Entropy in nats per committed token.",
      tables.markdown(list(comparison_rows(models))),
      tables.markdown(list(slot_rows(models))),
    ]
  return "\n\n".join(parts) + "\n"


def groups(results: Mapping[str, dict]) -> dict[str, dict]:
  """Returns the picture's points: each model, and the base at its entropy."""
  grouped = {}
  for data, models in by_model(results).items():
    points = grouped.setdefault(data, {})
    for (window, recipe), seeds in models.items():
      name = NAMES[recipe] + (f", k = {window}" if window > 1 else "")
      points[name] = [[record["metrics"] for record in seeds.values()]]
      if window > 1:
        points[name].append([record["matched"] for record in seeds.values()])
  return grouped


def render(results: Mapping[str, dict], folder: pathlib.Path) -> None:
  """Writes refinement.md and refinement.png, and prints the former."""
  if not results:
    raise ValueError("there are no records yet: run the study first.")
  folder.mkdir(parents=True, exist_ok=True)
  text = markdown(results)
  (folder / "refinement.md").write_text(text, encoding="utf-8")
  path = folder / "refinement.png"
  hollow = "the base at that model's entropy"
  plots.save_planes(path, groups(results), PLANES, hollow)
  print(f"{text}\npicture: {path}")
