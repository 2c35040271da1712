"""Ablation -> results: train, measure, and keep a record of each run.

All variants of a data set start from one base model, train for equally many
steps, and are measured in the same way at the same guidance. Results are one
file per data set, with a record per variant and training seed that is added
when it is complete: the same command does what is missing. In several processes
on one host it shares the work.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import time
from typing import Protocol, runtime_checkable

import jax
from absl import logging

from tensorar_jax.ablations.variants import Ablation
from tensorar_jax.checkpoints import files, resumable
from tensorar_jax.evaluation import evaluate, protocol, yardsticks
from tensorar_jax.experiment import parse, saved, values
from tensorar_jax.experiment.schema import EvaluationConfig, Stage
from tensorar_jax.generation import requests
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.performance import benchmark
from tensorar_jax.reports import ablation_report
from tensorar_jax.training import logs, loop

ROUNDS, IMAGES = 15, 8  # of the measurement of time


@runtime_checkable
class Measure(Protocol):
  """Measures a trained variant.

  Attributes:
    settings: what its numbers depend on, beside the model.
  """

  settings: dict

  def __call__(self, name: str, stage: Stage) -> dict:
    """{"metrics": {name: value}, ...} of a stage; `name` is its folder."""
    ...


class ByEvaluation:
  """As the section `evaluation` says, with one sampling seed."""

  def __init__(self, ablation: Ablation, workdir: pathlib.Path):
    if ablation.evaluation is None:
      raise ValueError(
        "the config has no section `evaluation`: name a reference batch with"
        " --reference=FILE.npz."
      )
    self.settings = dataclasses.asdict(ablation.evaluation)
    own = (name for name in ablation.stages if name not in ablation.shared)
    self.evaluation = dataclasses.replace(
      ablation.evaluation, seeds=1, models=tuple(own)
    )
    yardsticks.check(self.evaluation, ablation.stages)
    self.stages, self.workdir = ablation.stages, workdir

  @functools.cached_property
  def yardstick(self) -> yardsticks.Yardstick:
    kind = yardsticks.YARDSTICKS[self.evaluation.yardstick]
    return kind(self.stages, self.evaluation, self.workdir)

  def __call__(self, name: str, stage: Stage) -> dict:
    subject = evaluate.Subject(name, stage, self.workdir / name)
    found = evaluate.measure_model(subject, self.yardstick, self.evaluation)
    values = evaluate.one_set(found["metrics"])
    return {"metrics": values, "diagnostics": found["diagnostics"]}


class ByReference:
  """As papers do: FID and more against a reference batch."""

  def __init__(
    self,
    ablation: Ablation,
    workdir: pathlib.Path,
    judge: protocol.Judge,
    images: requests.Request,
    batch_size: int | None = None,
  ):
    self.stages, self.workdir = ablation.stages, workdir
    self.batch_size = batch_size
    self.judge, self.images = judge, images
    self.settings = {
      "reference": judge.reference["sha256"],
      "network": judge.network,
      **dataclasses.asdict(images),
    }

  def __call__(self, name: str, stage: Stage) -> dict:
    scale = stage.sampling.guidance
    records = protocol.sweep(
      self.judge,
      {**self.stages, name: stage},
      self.workdir,
      self.images,
      stage=name,
      scales=[scale],
      batch_size=self.batch_size,
    )
    if not records:
      raise ValueError(
        f"{name}: the first of several processes has the measurements. Run"
        " ablations in one process."
      )
    (record,) = records.values()
    values = {n: entry["value"] for n, entry in record["metrics"].items()}
    return {"metrics": {**values, "guidance": scale}}


def run(
  ablation: Ablation,
  workdir: pathlib.Path,
  output: pathlib.Path,
  measure: Measure,
) -> None:
  """Trains and measures what is missing, and draws the page.

  Args:
    ablation: what to compare.
    workdir: where everything is trained.
    output: the folder of the results and of the page.
    measure: what measures.
  """
  keep_programs(workdir)
  locks = workdir / "locks"
  locks.mkdir(parents=True, exist_ok=True)
  path = output / f"{ablation.data}.json"
  left = prepare(path, ablation, measure.settings)
  if left:
    with resumable.lock(locks / "shared"):
      for name, stage in ablation.shared.items():
        loop.fit(stage, workdir / name)

  def do(record: str, variant: str, seed: int) -> None:
    began = time.monotonic()
    name, stage = ablation.stage(variant, seed)
    loop.fit(stage, workdir / name)
    found = measure(name, stage)
    found["seconds"] = round(time.monotonic() - began, 1)
    resumable.update_json(path, functools.partial(_with, record, found))
    todo = {name for name, _, _ in left} - records(path).keys()
    taken = logs.duration(found["seconds"])
    logging.info("%s done in %s, %d to do", record, taken, len(todo))

  # What another process is at comes last: it will be done then, if that lives.
  for wait, one in itertools.product((False, True), left):
    place = locks / ablation.stage(*one[1:])[0]
    with resumable.lock(place, wait) as mine:
      if mine and one[0] not in records(path):
        do(*one)
  with resumable.lock(locks / "shared"):
    add_times(path, ablation, workdir)
  ablation_report.render(output)


def records(path: pathlib.Path) -> dict[str, dict]:
  """What is measured by now, by this process or another."""
  return files.read_json(path)["records"]


def keep_programs(workdir: pathlib.Path) -> None:
  """Seeds share their programs: compiled once, also across processes."""
  if not jax.config.values["jax_compilation_cache_dir"]:
    folder = workdir / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def describe(ablation: Ablation, evaluation: dict) -> dict:
  """What every number depends on, beyond the name of its variant."""
  stages = {**ablation.shared, "centre": ablation.centre}
  found = {name: _described(stage) for name, stage in stages.items()}
  found["sampling"] = dataclasses.asdict(ablation.centre.sampling)
  found["evaluation"] = evaluation
  return files.as_json(found)


def _described(stage: Stage) -> dict:
  """A stage's config, without what changes no number."""
  found = saved.saved_config(stage)
  if "train" in found:
    free = {key.removeprefix("train.") for key in saved.FREE_KEYS}
    kept = {k: v for k, v in found["train"].items() if k not in free}
    found["train"] = kept
  return found


def complete(settings: dict) -> dict:
  """Settings of a file of results, with the defaults that it leaves out.

  Files that were written when only some values were spelled out are as good.
  """
  found = dict(settings)
  for name, section in settings.items():
    if name == "sampling":
      made = values.make(SamplingConfig, section, name)
      found[name] = dataclasses.asdict(made)
    elif name != "evaluation":
      found[name] = _described(parse.stage_of(section))
    elif "reference" not in section:
      made = values.make(EvaluationConfig, section, name)
      found[name] = dataclasses.asdict(made)
  return files.as_json(found)


def prepare(
  path: pathlib.Path, ablation: Ablation, evaluation: dict
) -> list[tuple[str, str, int]]:
  """The runs that are left; the file knows the axes from now on.

  ValueError if its records were measured with other settings.
  """
  settings = describe(ablation, evaluation)

  def add(old: dict) -> dict:
    changed = [
      f"{key}: was {str(was)[:100]}, is {str(now)[:100]}"
      for key, was, now in resumable.differences(
        complete(old.get("settings", settings)), settings
      )
    ]
    if changed:
      listed = "\n  ".join(changed)
      raise ValueError(
        f"{path} was measured with other settings:\n  {listed}\nPass another"
        " --output, or undo the change to continue."
      )
    return {
      "data": ablation.data,
      "base": ablation.base,
      "axes": {**old.get("axes", {}), **ablation.axes},
      "shapes": {**old.get("shapes", {}), **ablation.shapes()},
      "settings": settings,
      "times": old.get("times", []),
      "records": old.get("records", {}),
    }

  done = resumable.update_json(path, add)["records"]
  runs = list(ablation.runs())
  left = [run for run in runs if run[0] not in done]
  logging.info("%d runs, %d of them to do", len(runs), len(left))
  return left


def _with(record: str, found: dict, old: dict) -> dict:
  found = {**old["records"], record: found}
  return {**old, "records": dict(sorted(found.items()))}


def add_times(
  path: pathlib.Path, ablation: Ablation, workdir: pathlib.Path
) -> None:
  """Measures the time of a step of windows and depths that the file lacks.

  All in one process in turn, on random weights: a ratio to k = 1 is taken
  within a round.
  """
  have = files.read_json(path)["times"]
  wanted = ablation.timed()
  if wanted <= {(row["window"], row["depth"]) for row in have}:
    return
  settings = benchmark.Settings(
    batches=(IMAGES,),
    windows=tuple(sorted({1, *(window for window, _ in wanted)})),
    depths=tuple(sorted({1, *(depth for _, depth in wanted)})),
    rounds=ROUNDS,
    parts=("decode",),
  )
  stages = {"centre": ablation.centre}
  folder = benchmark.run(stages, workdir, settings, stage="centre")
  found = files.read_json(folder / "benchmark.json")
  ratios = {row["name"]: row for row in found["ratios"]}
  one = {"median": 1.0, "min": 1.0, "max": 1.0}
  rows = [
    {
      **{key: case[key] for key in ("window", "depth", "batch", "ms_per_step")},
      "ratio": {key: ratios.get(case["name"], one)[key] for key in one},
    }
    for case in found["cases"]
    if case["guided"] and "error" not in case
  ]
  # Together, as they were timed: ratios of one machine and one hour.
  missing = wanted - {(row["window"], row["depth"]) for row in rows}
  if missing:
    raise ValueError(f"no time for (window, depth) in {sorted(missing)}.")
  fresh = {(row["window"], row["depth"]) for row in rows}
  kept = [row for row in have if (row["window"], row["depth"]) not in fresh]
  resumable.update_json(path, lambda old: {**old, "times": kept + rows})
