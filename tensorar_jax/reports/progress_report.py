"""The picture of training: every metric of the kept checkpoints over steps.

`progress.png` in the work directory; `evaluation.progress` measures it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from tensorar_jax.evaluation.progress import Found
from tensorar_jax.experiment.schema import Stage
from tensorar_jax.reports import plots, run_report

PICTURE = "progress.png"


def steps_before(stages: Mapping[str, Stage], name: str) -> int:
  """What the stages were trained that a stage goes on from."""
  parent = stages[name].init
  if parent is None or parent not in stages:
    return 0
  own = 0 if stages[parent].source else stages[parent].train.num_steps
  return steps_before(stages, parent) + own


def draw(
  found: Found,
  stages: Mapping[str, Stage],
  workdir: pathlib.Path,
  title: str,
) -> None:
  """The picture, a panel for each metric that all have.

  A stage stands behind the steps of the one that it goes on from.
  """
  rows = [row for steps in found.values() for row in steps.values()]
  if not rows:
    return  # another process has them
  shared = [m for m in rows[0] if all(m in row for row in rows)]
  panels = {
    run_report.metric_title(metric): {
      name: {
        steps_before(stages, name) + step: row[metric]
        for step, row in steps.items()
      }
      for name, steps in found.items()
    }
    for metric in shared
  }
  plots.save_progress(workdir / PICTURE, panels, title)
  print(f"picture: {workdir / PICTURE}")
