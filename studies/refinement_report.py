"""The records of the refinement study as a Markdown table and a picture."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from tensorar_jax.evaluation import metrics, tables
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
  """The records by data set and model, in the order of the file."""
  found: dict[str, Models] = {}
  for name, record in results.items():
    data, window, seed, recipe = name.split("/")
    models = found.setdefault(data, {})
    models.setdefault((int(window[1:]), recipe), {})[seed] = record
  window = lambda item: item[0][0]
  return {d: dict(sorted(m.items(), key=window)) for d, m in found.items()}


def spread(values: Iterable[float], sign: bool = False) -> str:
  """Mean, and the standard deviation if there is more than one value."""
  values = list(values)
  places = 2 if sign or abs(np.mean(values or 0)) >= 10 else 3
  return tables.mean_of(values, places, "+" * sign)


def lines(models: Models) -> Iterable[list[str]]:
  """The cells of the comparison: each model, then the base at its entropy."""
  yield [
    *(
      "model",
      "k",
      "guidance",
      *(metrics.find(name).heading for name in COLUMNS),
    ),
    *("distance − base's", "− base's at equal entropy"),
  ]
  base = models.get((1, "continued"), {})
  for (window, recipe), seeds in models.items():
    own = {seed: record["metrics"] for seed, record in seeds.items()}
    gaps = ["", ""]
    if window > 1:
      fair = {seed: record["matched"] for seed, record in seeds.items()}
      straight = {seed: base[seed]["metrics"] for seed in own if seed in base}
      gaps = [
        spread((own[s]["frechet"] - other[s]["frechet"] for s in other), True)
        for other in (straight, fair)
      ]
    scales = {f"{row['guidance']:g}" for row in own.values()}
    cells = [spread(row[name] for row in own.values()) for name in COLUMNS]
    scales = ", ".join(sorted(scales))
    yield [NAMES[recipe], str(window), scales, *cells, *gaps]
    if window > 1:
      heat = spread(row["temperature"] for row in fair.values())
      cells = [spread(row[name] for row in fair.values()) for name in COLUMNS]
      name = f"↳ base at that entropy, temperature {heat}"
      yield [name, "1", "", *cells, "", ""]


def slot_lines(models: Models) -> Iterable[list[str]]:
  """The cells of the diagnostics, a line per model and slot."""
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
  for (window, recipe), seeds in models.items():
    found = [record["diagnostics"] for record in seeds.values()]
    kinds = ("training_noise", "own_drafts") if window > 1 else ()
    for j in range(window if window > 1 else 0):
      ce = [spread(f["cross_entropy"][k][j] for f in found) for k in kinds]
      rest = [""] * 3
      if j:
        rest = [
          spread(f["window_accuracy"][k][j - 1] for f in found) for k in kinds
        ]
        rest += [spread(f["copy_rate"][j - 1] for f in found)]
      yield [NAMES[recipe], str(window), str(j), *ce, *rest]


def markdown(results: Mapping[str, dict]) -> str:
  """Two tables per data set, and what was measured how."""
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
      tables.markdown(list(lines(models))),
      tables.markdown(list(slot_lines(models))),
    ]
  return "\n\n".join(parts) + "\n"


def groups(results: Mapping[str, dict]) -> dict[str, dict]:
  """The points of the picture: each model, and the base at its entropy."""
  found = {}
  for data, models in by_model(results).items():
    points = found.setdefault(data, {})
    for (window, recipe), seeds in models.items():
      name = NAMES[recipe] + (f", k = {window}" if window > 1 else "")
      points[name] = [[record["metrics"] for record in seeds.values()]]
      if window > 1:
        points[name].append([record["matched"] for record in seeds.values()])
  return found


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
