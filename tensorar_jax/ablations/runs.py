"""Trains and measures the variants of an ablation, with a record of each run.

All variants of a data set start from one base model, train for equally many
steps, and are measured in the same way at the same guidance. Results are one
file per data set, with a record per variant and training seed that is added
when it is complete: the same command does what is missing. Several processes
on one host share the work.
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

from tensorar_jax.ablations.variants import Ablation, Run
from tensorar_jax.checkpoints import files, locks, resumable
from tensorar_jax.evaluation import evaluate, protocol, yardsticks
from tensorar_jax.experiment import parse, saved, values
from tensorar_jax.experiment.schema import EvaluationConfig, Stage
from tensorar_jax.generation import requests
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.performance import benchmark
from tensorar_jax.reports import ablation_report
from tensorar_jax.training import logs, loop

# What is read again of a file of results.
RESULTS = {
  "records": {...: {"metrics": dict}},
  "times": [{"window": int, "depth": int}],
}
ROUNDS, IMAGES = 15, 8  # of the timing: repetitions, images of a batch


@runtime_checkable
class Measure(Protocol):
  """Measures a trained variant.

  Attributes:
    settings: what its numbers depend on, beside the model.
  """

  settings: dict

  def __call__(self, name: str, stage: Stage) -> dict:
    """Returns {"metrics": {name: value}, ...}; `name` is the folder's."""
    ...


class ByEvaluation:
  """Measures as the section `evaluation` says, with one sampling seed."""

  def __init__(self, ablation: Ablation, workdir: pathlib.Path):
    if ablation.evaluation is None:
      raise ValueError(
        "the config has no section `evaluation`: name a reference batch with"
        " --reference=FILE.npz."
      )
    self.settings = dataclasses.asdict(ablation.evaluation)
    variants = (n for n in ablation.stages if n not in ablation.shared)
    self.evaluation = dataclasses.replace(
      ablation.evaluation, seeds=1, models=tuple(variants)
    )
    yardsticks.check(self.evaluation, ablation.stages)
    self.stages, self.workdir = ablation.stages, workdir

  @functools.cached_property
  def yardstick(self) -> yardsticks.Yardstick:
    kind = yardsticks.YARDSTICKS[self.evaluation.yardstick]
    return kind(self.stages, self.evaluation, self.workdir)

  def __call__(self, name: str, stage: Stage) -> dict:
    subject = evaluate.Subject(name, stage, self.workdir / name)
    record = evaluate.measure_model(subject, self.yardstick, self.evaluation)
    metrics = evaluate.one_set(record["metrics"])
    return {"metrics": metrics, "diagnostics": record["diagnostics"]}


class ByReference:
  """Measures as papers do: FID and more against a reference batch.

  Args:
    ablation: what is compared.
    workdir: where it is trained.
    judge: holds the reference and the network.
    images: which images of each variant are drawn.
    batch_size: images drawn at once; None: as `protocol.sweep` does.
  """

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
    metrics = {n: entry["value"] for n, entry in record["metrics"].items()}
    return {"metrics": {**metrics, "guidance": scale}}


def run(
  ablation: Ablation,
  workdir: pathlib.Path,
  output: pathlib.Path,
  measure: Measure,
) -> None:
  """Trains and measures what is missing, and draws tables and plots.

  Args:
    ablation: what to compare.
    workdir: where everything is trained.
    output: the folder of results, tables and plots.
    measure: what measures a trained variant.
  """
  keep_programs(workdir)
  files.remove_leftovers(output.glob("*"))
  held = workdir / "locks"
  held.mkdir(parents=True, exist_ok=True)
  path = output / f"{ablation.data}.json"
  missing = prepare(path, ablation, measure.settings)
  if missing:
    with locks.lock(held / "shared"):
      for name, stage in ablation.shared.items():
        loop.fit(stage, workdir / name)

  def train_and_measure(run: Run) -> None:
    began = time.monotonic()
    name, stage = ablation.stage(run.variant, run.seed)
    loop.fit(stage, workdir / name)
    record = measure(name, stage)
    record["seconds"] = round(time.monotonic() - began, 1)
    resumable.update_json(path, functools.partial(_with, run.record, record))
    to_do = {run.record for run in missing} - records(path).keys()
    logging.info(
      "%s done in %s, %d to do",
      run.record,
      logs.duration(record["seconds"]),
      len(to_do),
    )

  # Runs that other processes work on come last: they will be done by then.
  for wait, run in itertools.product((False, True), missing):
    name, _ = ablation.stage(run.variant, run.seed)
    with locks.lock(held / name, wait) as acquired:
      if acquired and run.record not in records(path):
        train_and_measure(run)
  with locks.lock(held / "shared"):
    add_times(path, ablation, workdir)
  ablation_report.render(output)


def records(path: pathlib.Path) -> dict[str, dict]:
  """Reads what is measured by now, by this process or another."""
  return files.read_json(path, RESULTS)["records"]


def keep_programs(workdir: pathlib.Path) -> None:
  """Keeps compiled programs on disk, for all seeds and processes."""
  if not jax.config.values["jax_compilation_cache_dir"]:
    folder = workdir / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def describe(ablation: Ablation, evaluation: dict) -> dict:
  """Returns what every number depends on, beside the name of its variant."""
  stages = {**ablation.shared, "centre": ablation.centre}
  settings = {name: _described(stage) for name, stage in stages.items()}
  settings["sampling"] = dataclasses.asdict(ablation.centre.sampling)
  settings["evaluation"] = evaluation
  return files.as_json(settings)


def _described(stage: Stage) -> dict:
  """Returns a stage's config without the values that change no number."""
  config = saved.saved_config(stage)
  if "train" in config:
    free = {key.removeprefix("train.") for key in saved.FREE_KEYS}
    kept = {k: v for k, v in config["train"].items() if k not in free}
    config["train"] = kept
  return config


def complete(settings: dict) -> dict:
  """Adds the defaults that the settings of a file of results leave out.

  So a file that spells out some values only can still be continued.
  """
  completed = dict(settings)
  for name, section in settings.items():
    if name == "sampling":
      config = values.make(SamplingConfig, section, name)
      completed[name] = dataclasses.asdict(config)
    elif name != "evaluation":
      completed[name] = _described(parse.stage_of(section))
    elif "reference" not in section:
      config = values.make(EvaluationConfig, section, name)
      completed[name] = dataclasses.asdict(config)
  return files.as_json(completed)


def prepare(
  path: pathlib.Path, ablation: Ablation, evaluation: dict
) -> list[Run]:
  """Adds the ablation's axes to a file of results.

  Args:
    path: of the file, which need not exist.
    ablation: what to compare.
    evaluation: settings of a `Measure`.

  Returns:
    The runs that have no record there.

  Raises:
    ValueError: its records were measured with other settings.
  """
  settings = describe(ablation, evaluation)

  def add(old: dict) -> dict:
    known = {**RESULTS, "settings": dict, "axes": dict, "shapes": dict}
    like = {key: kind for key, kind in known.items() if key in old}
    files.check_shape(old, like, str(path))
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
  missing = [run for run in runs if run.record not in done]
  logging.info("%d runs, %d of them to do", len(runs), len(missing))
  return missing


def _with(name: str, record: dict, results: dict) -> dict:
  """Returns results with a record more."""
  records = {**results["records"], name: record}
  return {**results, "records": dict(sorted(records.items()))}


def add_times(
  path: pathlib.Path, ablation: Ablation, workdir: pathlib.Path
) -> None:
  """Times a step of the windows and depths that the file lacks.

  All take turns in one process, on random weights; ratios to k = 1 are taken
  within a round.
  """
  known = files.read_json(path, RESULTS)["times"]
  wanted = ablation.timed()
  if wanted <= {(row["window"], row["depth"]) for row in known}:
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
  measured = files.read_json(folder / "benchmark.json", benchmark.RESULTS)
  ratios = {row["name"]: row for row in measured["ratios"]}
  one = {"median": 1.0, "min": 1.0, "max": 1.0}
  rows = [
    {
      **{key: case[key] for key in ("window", "depth", "batch", "ms_per_step")},
      "ratio": {key: ratios.get(case["name"], one)[key] for key in one},
    }
    for case in measured["cases"]
    if case["guided"] and "error" not in case
  ]
  # Together, as they were timed: ratios of one machine and one hour.
  missing = wanted - {(row["window"], row["depth"]) for row in rows}
  if missing:
    raise ValueError(f"no time for (window, depth) in {sorted(missing)}.")
  fresh = {(row["window"], row["depth"]) for row in rows}
  kept = [row for row in known if (row["window"], row["depth"]) not in fresh]
  resumable.update_json(path, lambda old: {**old, "times": kept + rows})
