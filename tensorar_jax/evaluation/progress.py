"""How stages get better while they train: every kept checkpoint, measured.

`--mode=evaluate --every_checkpoint`, by the config's own yardstick or against a
`--reference`. What a checkpoint has got is kept in `<stage>/progress.json` (or
with the samples) and not measured again.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from absl import logging

from tensorar_jax.checkpoints import files, orbax_io
from tensorar_jax.evaluation import evaluate, protocol, yardsticks
from tensorar_jax.experiment.schema import EvaluationConfig, Stage
from tensorar_jax.generation.requests import Request

Metrics = dict[str, dict]  # name -> {"mean", "std" or None}
Found = dict[str, dict[int, Metrics]]  # by stage and step


def by_yardstick(
  stages: Mapping[str, Stage],
  settings: EvaluationConfig,
  workdir: pathlib.Path,
  names: Sequence[str],
) -> Found:
  """Each checkpoint by the config's yardstick, at the stage's own guidance.

  One set of `settings.num_images`, so means have the spread of prompts only.
  """
  settings = dataclasses.replace(settings, models=tuple(names), seeds=1)
  yardsticks.check(settings, stages)
  yardstick = yardsticks.YARDSTICKS[settings.yardstick](
    stages, settings, workdir
  )
  labels = yardstick.labels(0, settings.num_images)
  found: Found = {}
  for name, step in _checkpoints(workdir, names):
    subject = evaluate.Subject(name, stages[name], workdir / name, step)
    path = subject.folder / "progress.json"
    known = files.read_json(path, default={})
    key = subject.fingerprint(settings, yardstick.identity)
    if known.get(str(step), {}).get("fingerprint") != key:
      conditions = yardstick.conditions(subject.stage)
      sampler = evaluate.Sampler(subject, settings.batch_size, conditions)
      scale = sampler.config.guidance
      images = sampler.draw(scale, 0, labels)["images"]
      metrics = yardstick.measure([images], labels)
      known[str(step)] = {"fingerprint": key, "metrics": metrics}
      files.write_json(path, known)
      means = {metric: round(row["mean"], 4) for metric, row in metrics.items()}
      logging.info("%s, step %d: %s", name, step, means)
    found.setdefault(name, {})[step] = known[str(step)]["metrics"]
  return found


def by_reference(
  judge: protocol.Judge,
  stages: Mapping[str, Stage],
  workdir: pathlib.Path,
  request: Request,
  *,
  name: str,
  batch_size: int | None = None,
) -> Found:
  """Each checkpoint of a stage against a reference batch, as papers do it."""
  found: Found = {name: {}}
  for _, step in _checkpoints(workdir, [name]):
    asked = dataclasses.replace(request, step=step)
    record = protocol.measure_stage(
      judge, stages, workdir, asked, stage=name, batch_size=batch_size
    )
    if record:
      found[name][step] = {
        metric: {"mean": entry["value"], "std": entry.get("std")}
        for metric, entry in record["metrics"].items()
      }
  return found


def _checkpoints(
  workdir: pathlib.Path, names: Sequence[str]
) -> Iterator[tuple[str, int]]:
  """(stage, step) of what is to be measured, in the order of training."""
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
        *(name, steps[0]),
      )
    yield from ((name, step) for step in steps)
