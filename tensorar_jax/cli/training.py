"""Modes that train and report: run, train, visualize; ablations too."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

from tensorar_jax.cli.config import Experiment
from tensorar_jax.cli.evaluation import Reference, only_with_reference
from tensorar_jax.cli.options import Products, Shared, changed, option
from tensorar_jax.cli.sampling import Images
from tensorar_jax.paths import LocalPath

PROFILE = (
  "Steps to trace with the JAX profiler, counted from this start of training,"
  " as 10:12; step 1 compiles. The trace is in the stage's folder `profile`."
  " Default: none."
)
TABLES = (
  "With a config of configs/ablations: the folder of results, tables and plots."
  " Default: studies/ablations."
)


@dataclasses.dataclass(frozen=True)
class Run(Images, Reference, Products, Shared):
  """Trains every stage of the config, evaluates, and draws the report.

  What is done is skipped, what was interrupted continues. With a config of
  configs/ablations: trains and measures every variant, then draws tables and
  plots; with --reference it measures as papers do, on images drawn for it.
  """

  example = "--config=configs/digits.py --workdir=runs/digits"

  stage: str | None = option(
    None, "The only stage to train. Default: all.", metavar="NAME"
  )
  profile: str | None = option(None, PROFILE, metavar="FIRST:LAST")
  output: LocalPath | None = option(None, TABLES, metavar="FOLDER")


@dataclasses.dataclass(frozen=True)
class Train(Products, Shared):
  """Trains the stages of the config, and nothing else.

  What is done is skipped, what was interrupted continues, bit for bit.
  """

  example = "--config=configs/digits.py --mode=train --stage=base"

  stage: str | None = option(
    None, "The only stage to train. Default: all.", metavar="NAME"
  )
  profile: str | None = option(None, PROFILE, metavar="FIRST:LAST")

  def shares_work(self) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Visualize(Shared):
  """Draws the pictures and report.html again from what is there.

  With a config of configs/ablations: the tables and plots.
  """

  example = "--config=configs/digits.py --mode=visualize"

  stage: str | None = option(
    None, "With --init: the stage that starts from it.", metavar="NAME"
  )
  output: LocalPath | None = option(None, TABLES, metavar="FOLDER")


def run(options: Run, experiment: Experiment, workdir: pathlib.Path) -> None:
  """Carries out --mode=run."""
  from tensorar_jax.evaluation import evaluate

  if experiment.ablation:
    return run_ablation(options, experiment, workdir)
  needless = [*changed(options, Images), *changed(options, Reference)]
  if options.output or needless:
    raise ValueError(
      f"{(needless or ['--output'])[0]} with --mode=run is for a config of"
      " configs/ablations. For this config draw and measure with --mode=sample"
      " and --mode=evaluate."
    )
  train_stages(experiment, workdir, options.stage, options.profile)
  if experiment.evaluation:
    evaluate.evaluate(experiment.stages, experiment.evaluation, workdir)
  draw_report(experiment, workdir)


def train(options: Train, experiment: Experiment, workdir: pathlib.Path):
  """Carries out --mode=train."""
  train_stages(experiment, workdir, options.stage, options.profile)


def visualize(
  options: Visualize, experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Carries out --mode=visualize."""
  from tensorar_jax.reports import ablation_report

  if experiment.ablation:
    ablation_report.render(tables(options.output))
  elif options.output:
    raise ValueError(
      "--output with --mode=visualize is for a config of configs/ablations: the"
      f" report of this one is in {workdir}, or where --workdir says."
    )
  else:
    draw_report(experiment, workdir)


def train_stages(
  experiment: Experiment,
  workdir: pathlib.Path,
  stage: str | None,
  profile: str | None = None,
) -> None:
  """Trains or imports all stages, or one."""
  from tensorar_jax.training import loop, throughput

  steps = throughput.parse_profile(profile)
  for name in experiment.stages if stage is None else [stage]:
    loop.fit(experiment.stages[name], workdir / name, steps)


def draw_report(experiment: Experiment, workdir: pathlib.Path) -> None:
  """Draws pictures and report.html, which shows the command."""
  from tensorar_jax.reports import run_report

  command = " ".join(["python -m tensorar_jax.main", *sys.argv[1:]])
  run_report.draw(experiment.stages, workdir, command)


def run_ablation(
  options: Run, experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Carries out --mode=run of a config with a section `ablation`."""
  from tensorar_jax.ablations import runs

  if options.profile or (options.stage and not options.init):
    raise ValueError(
      "--stage and --profile with --mode=run: ablations train every variant."
      " --mode=train takes them."
    )
  ablation = experiment.ablation
  if ablation is None:
    raise ValueError("the config has no section `ablation`.")
  only_with_reference(options)
  if options.reference:
    measure = runs.ByReference(
      ablation,
      workdir,
      judge=options.judge(),
      images=options.request(50_000),
      batch_size=options.batch_size,
    )
  else:
    measure = runs.ByEvaluation(ablation, workdir)
  runs.run(ablation, workdir, tables(options.output), measure)


def tables(output: str | None) -> pathlib.Path:
  """Returns the folder of the results of ablations."""
  return pathlib.Path(output or "studies/ablations").absolute()
