"""Compares TensorAR with its own base model, over training seeds.

  python -m studies.refinement_study                         # everything
  python -m studies.refinement_study --only=digits/k2/seed0  # a part of it
  python -m studies.refinement_study --render=runs/study     # table, picture

From one base model of each seed, for equally many steps, train on: the base
itself (`continued`); TensorAR by the published recipe (`categorical`); the same
with its own drafts as noise (`drafts`); and `control`, beta = 1, whose windows
carry nothing but the last token: what it loses is the new modules' own loss.
(Its drafts have the rdm weight 0: they are not trained, and not read.)

Each model is measured at the guidance scale that suits it best on a scan, with
more images of another seed (see PLANS). A model that draws from less entropy
makes cleaner and less varied images, which a lower temperature does as well:
beside every TensorAR model stands the continued base at the temperature that
gives its tokens the same entropy, interpolated on a scan of its temperatures.

Every finished run adds its record to --results; the same command again does
what is missing. A run needs the `continued` one of its seed, which is then run
too. Processes with different --only can share --folder and --results at
the same time, if no two of them work on the same data set and seed. Tiny models
leave cores idle while they sample: two seeds at a time take less than one after
the other.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib
import pathlib
import sys
import time
from collections.abc import Mapping

import jax
import numpy as np
from absl import app, flags, logging

from studies import refinement_report
from tensorar_jax import paths
from tensorar_jax.checkpoints import files, resumable
from tensorar_jax.evaluation import diagnostics, evaluate, yardsticks
from tensorar_jax.experiment.parse import parse
from tensorar_jax.experiment.schema import EvaluationConfig, Stage
from tensorar_jax.experiment.stages import parents
from tensorar_jax.training import logs, loop

_FOLDER = flags.DEFINE_string(
  "folder", "runs/refinement_study", "Where models are trained."
)
_RESULTS = flags.DEFINE_string(
  "results", "studies/refinement_study.json", "The records of finished runs."
)
_ONLY = flags.DEFINE_list(
  "only",
  [],
  "Beginnings of names; * stands for anything: digits/*/seed1. Default: all.",
)
_RENDER = flags.DEFINE_string(
  "render", None, "Folder for refinement.md and .png; runs nothing."
)
_QUICK = flags.DEFINE_boolean(
  "quick", False, "Tiny models, few images: whether it works, not what it says."
)

NOISE = {
  "categorical": dict(kind="categorical", schedule="exponential"),
  "drafts": dict(kind="drafts", schedule="exponential"),
  "control": dict(kind="categorical", schedule=(0, 1)),
}
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
SEED = 0  # of the images that count; scans have seeds of their own


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is compared on one data set: recipes for each window."""

  recipes: dict[int, tuple[str, ...]]
  seeds: int
  guidance: tuple[float, ...]
  scan_images: int
  num_images: int


PLANS = {
  "digits": Plan(
    {2: ("control", "categorical", "drafts"), 4: ("categorical", "drafts")},
    seeds=3,
    guidance=(1.0, 1.25, 1.5),
    scan_images=2000,
    num_images=10_000,
  ),
  "fashion_mnist": Plan(
    {2: ("control", "categorical", "drafts")},
    seeds=1,
    guidance=(1.5, 2.0, 3.0, 4.0),
    scan_images=2000,
    num_images=10_000,
  ),
}


@dataclasses.dataclass(frozen=True)
class Run:
  """One model of the study."""

  data: str
  window: int
  seed: int
  recipe: str

  @property
  def name(self) -> str:
    """Names its record."""
    return f"{self.data}/k{self.window}/seed{self.seed}/{self.recipe}"

  @property
  def stage(self) -> str:
    """Names its stage."""
    return self.recipe if self.window == 1 else f"{self.recipe}-k{self.window}"

  @property
  def reference(self) -> Run:
    """Returns the run of the base model, trained for as many steps more."""
    return Run(self.data, 1, self.seed, "continued")


def all_runs() -> list[Run]:
  """Lists all runs, seed by seed, so that partial results are balanced."""
  runs = []
  for data, plan in PLANS.items():
    for seed in range(plan.seeds):
      runs.append(Run(data, 1, seed, "continued"))
      for window, recipes in plan.recipes.items():
        runs += [Run(data, window, seed, recipe) for recipe in recipes]
  return runs


def select(patterns: list[str]) -> list[Run]:
  """Returns the runs whose names begin with a pattern, and what they need.

  Raises:
    ValueError: nothing matches a pattern.
  """
  runs = all_runs()
  if not patterns:
    return runs
  chosen = set()
  for pattern in patterns:
    beginning = f"{pattern.rstrip('/')}/*"
    matching = [r for r in runs if fnmatch.fnmatch(f"{r.name}/", beginning)]
    if not matching:
      names = "\n  ".join(run.name for run in runs)
      raise ValueError(f"--only={pattern}: no such run. There are:\n  {names}")
    chosen |= {*matching, *(run.reference for run in matching)}
  return [run for run in runs if run in chosen]


def stages_of(data: str, seed: int, quick: bool) -> Mapping[str, Stage]:
  """Makes the stages of one data set and seed, from the data set's config."""
  config = importlib.import_module(f"configs.{data}").get_config()
  config.seed = seed
  wrapped = config.stages.tensorar.to_dict()
  # One classifier for all seeds: they are measured with the same yardstick.
  config.stages.classifier.seed = 0
  for window, recipes in PLANS[data].recipes.items():
    for recipe in recipes:
      stage = {**wrapped, "noise": NOISE[recipe]}
      stage["tensorar"] = {**wrapped["tensorar"], "window": window}
      config.stages[Run(data, window, seed, recipe).stage] = stage
  del config.stages["tensorar"], config.stages["drafts"]
  if quick:
    config.backbone.update(width=16, num_layers=2, num_heads=2, mlp_multiple=8)
    config.train.update(batch_size=8, log_every=4, checkpoint_every=4)
    for name, stage in config.stages.items():
      steps = {"classifier": 100, "tokenizer": 20}.get(name, 8)
      stage.train = dict(num_steps=steps, checkpoint_every=steps)
  return parse(config, name=data).stages


def settings_of(data: str, quick: bool) -> EvaluationConfig:
  """Returns how the models of a data set are measured."""
  plan = PLANS[data]
  return EvaluationConfig(
    models=("continued",),
    guidance=plan.guidance,
    scan_images=40 if quick else plan.scan_images,
    num_images=60 if quick else plan.num_images,
    seeds=1,
    batch_size=40 if quick else 500,
  )


class Study:
  """The models of one data set and one training seed."""

  def __init__(self, data: str, seed: int, folder: pathlib.Path, quick: bool):
    self.stages = stages_of(data, seed, quick)
    self.settings = settings_of(data, quick)
    self.folder = folder / f"{data}-seed{seed}"

  def measure(self, run: Run, results: dict[str, dict]) -> dict:
    """Trains and measures a run; `results` hold its reference's record."""
    started = time.monotonic()
    self._train(run.stage)
    stage, folder = self.stages[run.stage], self.folder / run.stage
    subject = evaluate.Subject(run.stage, stage, folder)
    measured = evaluate.measure_model(subject, self.yardstick, self.settings)
    metrics = evaluate.one_set(measured["metrics"])
    record = {
      "metrics": metrics,
      "diagnostics": measured["diagnostics"],
      "guidance_scan": measured["guidance_scan"],
    }
    if run.window == 1:
      record["temperatures"] = [
        (t, self._entropy(run.stage, t, metrics["guidance"]))
        for t in TEMPERATURES
      ]
    else:
      reference = results[run.reference.name]
      record["matched"] = self._matched(metrics["entropy"], reference)
    return record | {"seconds": round(time.monotonic() - started, 1)}

  @functools.cached_property
  def yardstick(self) -> yardsticks.ByClassifier:
    """Measures images; trains its classifier when it is first used."""
    self._train(self.settings.classifier)
    return yardsticks.ByClassifier(self.stages, self.settings, self.folder)

  def _train(self, name: str) -> None:
    """Trains a stage, after those it starts from."""
    for parent in parents(self.stages[name]).values():
      self._train(parent)
    loop.fit(self.stages[name], self.folder / name)

  def _sampler(self, name: str, temperature: float) -> evaluate.LoadedSubject:
    """Loads a stage to sample from it at another temperature."""
    stage = self.stages[name]
    sampling = dataclasses.replace(stage.sampling, temperature=temperature)
    stage = dataclasses.replace(stage, sampling=sampling)
    subject = evaluate.Subject(name, stage, self.folder / name)
    return evaluate.LoadedSubject(subject, self.settings.batch_size)

  def _entropy(self, name: str, temperature: float, scale: float) -> float:
    """Measures a stage's entropy at a temperature, on the held-out classes."""
    sampler = self._sampler(name, temperature)
    labels = self.yardstick.held_out(self.settings.held_out_images)["label"]
    config = dataclasses.replace(sampler.config, guidance=float(scale))
    return diagnostics.free_running(
      sampler.model,
      sampler.conditioning,
      labels,
      config,
      batch_size=self.settings.batch_size,
    )["entropy"]

  def _matched(self, entropy: float, reference: dict) -> dict:
    """Measures the reference at the temperature that gives it this entropy."""
    scale = reference["metrics"]["guidance"]
    scan = sorted((e, t) for t, e in reference["temperatures"])
    # Beyond the scan this is its end; the record shows the entropy reached.
    entropies, temperatures = zip(*scan)
    temperature = float(np.interp(entropy, entropies, temperatures))
    sampler = self._sampler("continued", temperature)
    labels = self.yardstick.labels(0, self.settings.num_images)
    drawn = sampler.draw(scale, SEED, labels)
    return {
      "temperature": temperature,
      "entropy": self._entropy("continued", temperature, scale),
      **self.yardstick.measure_set(drawn["images"], labels),
    }


# --- the file of results -----------------------------------------------------


def read(path: pathlib.Path) -> dict[str, dict]:
  """Reads the records by name; {} where there is no file yet."""
  return files.read_json(path, {...: dict}, default={})


def check(results: dict, quick: bool) -> None:
  """Raises ValueError if the records were measured with other settings."""
  for run in all_runs():
    want = describe(run, quick)
    have = results.get(run.name, {}).get("settings", want)
    if have != want:
      raise ValueError(
        f"{run.name} was measured with other settings:\n  {have}\nthan now:\n "
        f" {want}\nPass another --results, or remove the record."
      )


def describe(run: Run, quick: bool) -> dict:
  """Returns what a record depends on, beside its name."""
  settings = settings_of(run.data, quick)
  trained = stages_of(run.data, run.seed, quick)
  named = ("scan_images", "num_images", "guidance", "held_out_images")
  described = {name: getattr(settings, name) for name in named}
  described["steps"] = {
    name: trained[name].train.num_steps for name in ("base", run.stage)
  }
  described["noise"] = dataclasses.asdict(trained[run.stage].noise)
  return files.as_json(described)


def add(path: pathlib.Path, name: str, record: dict) -> None:
  """Adds a record to the file, which other processes may write to as well."""
  order = [run.name for run in all_runs()]

  def change(results):
    results = {**results, name: record}
    return {n: results[n] for n in order if n in results}

  resumable.update_json(path, change)


def run_study() -> None:
  """Carries out what the flags ask for."""
  path = pathlib.Path(paths.local(_RESULTS.value)).absolute()
  if _RENDER.value:
    refinement_report.render(
      read(path), pathlib.Path(paths.local(_RENDER.value))
    )
    return
  folder = pathlib.Path(paths.local(_FOLDER.value)).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  # Seeds share their programs: compiled once, whichever process comes first.
  jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
  check(read(path), _QUICK.value)
  chosen = select(_ONLY.value)
  missing = [run for run in chosen if run.name not in read(path)]
  logging.info("%d runs, %d of them to do", len(chosen), len(missing))
  study = functools.cache(
    lambda data, seed: Study(data, seed, folder, _QUICK.value)
  )
  started = time.monotonic()
  for done, run in enumerate(missing, 1):
    record = study(run.data, run.seed).measure(run, read(path))
    record["settings"] = describe(run, _QUICK.value)
    add(path, run.name, record)
    spent = time.monotonic() - started
    logging.info(
      "%d of %d: %s done in %s, ETA %s",
      done,
      len(missing),
      run.name,
      logs.duration(record["seconds"]),
      logs.duration(spent / done * (len(missing) - done)),
    )
  print(f"results: {path}")


def main(argv: list[str]) -> None:
  """Runs the study, or ends with one line that says why not."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logs.log_to_console()
  try:
    run_study()
  except (ValueError, OSError) as error:
    if logging.vlog_is_on(1):
      raise
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  app.run(main)
