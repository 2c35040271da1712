"""The picture of a guidance scan: every metric over the scales."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from tensorar_jax.checkpoints import files
from tensorar_jax.evaluation import metrics, protocol
from tensorar_jax.reports import plots


def draw(overview: pathlib.Path) -> pathlib.Path | None:
  """Draws the records of `protocol.sweep` beside their JSON file.

  Draws nothing, and returns None, for fewer than two scales.
  """
  records = files.read_json(overview, {...: protocol.RECORD})
  if len(records) < 2:
    return None
  picture = overview.with_suffix(".png")
  scales = [name.removeprefix("guidance ") for name in records]
  title = f"{overview.parent.name} {overview.stem.replace('-', ' ', 1)}"
  plots.save_scan(picture, scales, _curves([*records.values()]), title)
  return picture


def _curves(records: Sequence[dict]) -> list[plots.ScanCurve]:
  """A curve for every metric that all records have."""
  curves = []
  for metric in protocol.columns():
    entries = [record["metrics"].get(metric.name) for record in records]
    if None not in entries:
      curves.append(
        plots.ScanCurve(
          metric,
          values=[entry["value"] for entry in entries],
          halves=[metrics.Z95 * entry.get("std", 0.0) for entry in entries],
        )
      )
  return curves
