"""The picture `progress.png`: every metric of the kept checkpoints over steps.

`evaluation.progress` measures them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from tensorar_jax.evaluation import metrics
from tensorar_jax.evaluation.progress import Progress
from tensorar_jax.experiment.schema import Stage
from tensorar_jax.reports import plots

PICTURE = "progress.png"


def steps_before(stages: Mapping[str, Stage], name: str) -> int:
  """The number of training steps of a stage's ancestors."""
  parent = stages[name].init
  if parent is None or parent not in stages:
    return 0
  imported = stages[parent].source
  steps = 0 if imported else stages[parent].train.num_steps
  return steps_before(stages, parent) + steps


def draw(
  progress: Progress,
  stages: Mapping[str, Stage],
  workdir: pathlib.Path,
  title: str,
) -> None:
  """Draws a panel for each metric that all checkpoints have.

  The steps of a stage are counted from the start of its first ancestor.
  """
  rows = [row for steps in progress.values() for row in steps.values()]
  if not rows:
    return  # another process has the metrics
  shared = [name for name in rows[0] if all(name in row for row in rows)]
  panels = {
    metrics.find(metric).heading: {
      name: {
        steps_before(stages, name) + step: row[metric]
        for step, row in steps.items()
      }
      for name, steps in progress.items()
    }
    for metric in shared
  }
  plots.save_progress(workdir / PICTURE, panels, title)
  print(f"picture: {workdir / PICTURE}")
