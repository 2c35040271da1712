"""Measures every kept checkpoint: how stages get better while they train.

For `--mode=evaluate --every_checkpoint`, by the config's own yardstick or
against a `--reference`. Measurements are kept in `<stage>/progress.json` (or
with the samples) and not made again.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from absl import logging

from tensorar_jax.checkpoints import files, orbax_io, resumable
from tensorar_jax.evaluation import evaluate, protocol, yardsticks
from tensorar_jax.experiment.schema import EvaluationConfig, Stage
from tensorar_jax.generation.requests import Request

Metrics = dict[str, dict]  # name -> {"mean", "std" or None}
Progress = dict[str, dict[int, Metrics]]  # by stage and step


def by_yardstick(
  stages: Mapping[str, Stage],
  settings: EvaluationConfig,
  workdir: pathlib.Path,
  names: Sequence[str],
) -> Progress:
  """Measures each checkpoint by the config's yardstick, at its own guidance.

  It draws one set of `settings.num_images`, so `std` is that over prompts, or
  None. ValueError if another run evaluates in this work directory.
  """
  with resumable.holding(workdir, name=evaluate.LOCK):
    return _by_yardstick(stages, settings, workdir, names)


def _by_yardstick(
  stages: Mapping[str, Stage],
  settings: EvaluationConfig,
  workdir: pathlib.Path,
  names: Sequence[str],
) -> Progress:
  """Does so in a work directory that this run holds."""
  settings = dataclasses.replace(settings, models=tuple(names), seeds=1)
  yardsticks.check(settings, stages)
  yardstick = yardsticks.YARDSTICKS[settings.yardstick](
    stages, settings, workdir
  )
  labels = yardstick.labels(0, settings.num_images)
  progress: Progress = {}
  for name, step in _checkpoints(workdir, names):
    subject = evaluate.Subject(name, stages[name], workdir / name, step)
    path = subject.folder / "progress.json"
    like = {...: {"fingerprint": str, "metrics": dict}}
    known = files.read_json(path, like, default={})
    key = subject.fingerprint(settings, yardstick.identity)
    if known.get(str(step), {}).get("fingerprint") != key:
      conditions = yardstick.conditions(subject.stage)
      model = evaluate.LoadedSubject(subject, settings.batch_size, conditions)
      images = model.draw(model.config.guidance, 0, labels)["images"]
      metrics = yardstick.measure([images], labels)
      known[str(step)] = {"fingerprint": key, "metrics": metrics}
      files.write_json(path, known)
      means = {metric: round(row["mean"], 4) for metric, row in metrics.items()}
      logging.info("%s, step %d: %s", name, step, means)
    progress.setdefault(name, {})[step] = known[str(step)]["metrics"]
  return progress


def by_reference(
  judge: protocol.Judge,
  stages: Mapping[str, Stage],
  workdir: pathlib.Path,
  request: Request,
  *,
  name: str,
  batch_size: int | None = None,
) -> Progress:
  """Measures each checkpoint of a stage against a reference, as papers do."""
  progress: Progress = {name: {}}
  for _, step in _checkpoints(workdir, [name]):
    asked = dataclasses.replace(request, step=step)
    record = protocol.measure_stage(
      judge, stages, workdir, asked, stage=name, batch_size=batch_size
    )
    if record:
      progress[name][step] = {
        metric: {"mean": entry["value"], "std": entry.get("std")}
        for metric, entry in record["metrics"].items()
      }
  return progress


def _checkpoints(
  workdir: pathlib.Path, names: Sequence[str]
) -> Iterator[tuple[str, int]]:
  """Yields (stage, step) of each checkpoint, in the order of training."""
  for name in names:
    steps = orbax_io.steps(workdir / name / "checkpoints")
    if not steps:
      raise ValueError(
        f"stage {name!r} has no checkpoint in {workdir}: train it first, with"
        " --config.train.keep_every=STEPS for checkpoints on the way."
      )
    if len(steps) == 1:
      logging.warning(
        "%s: there is one checkpoint, %d; train.keep_every keeps some on the"
        " way.",
        name,
        steps[0],
      )
    yield from ((name, step) for step in steps)
