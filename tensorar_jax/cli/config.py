"""Makes an experiment of --config and --config.SECTION.KEY."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tensorar_jax.cli.options import Shared

if TYPE_CHECKING:  # help does not wait for JAX
  from tensorar_jax.ablations.variants import Ablation
  from tensorar_jax.experiment import schema


# Flags that differ between the processes of a run, or may.
OF_A_PROCESS = ("config", "coordinator", "num_processes", "process_id", "debug")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
PACKAGES += ("numpy",)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """An experiment whose models can all be built.

  Attributes:
    stages: by name, in the order of training; of an ablation all variants.
    evaluation: how models are compared; None without a section `evaluation`.
    ablation: the variants; None without a section `ablation`.
  """

  stages: Mapping[str, schema.Stage]
  evaluation: schema.EvaluationConfig | None = None
  ablation: Ablation | None = None


def read(config: str, overrides: Mapping[str, str]) -> schema.Experiment:
  """Reads the experiment of a config file, with some of its values changed.

  Args:
    config: FILE, or FILE:ARGUMENT for a `get_config` that takes one.
    overrides: {"SECTION.KEY": value} as written on the command line.

  Raises:
    ValueError: there is no such file or key, or a value is of another type.
  """
  from tensorar_jax.experiment import config_file

  return config_file.load(config, overrides)


def check(experiment: schema.Experiment, options: Shared) -> Experiment:
  """Applies --init and --precision, and checks that all models can be built.

  Args:
    experiment: of `read`.
    options: of any mode; --init is for the stage --stage.

  Raises:
    ValueError: a model cannot be built, or a stage is unknown.
  """
  from tensorar_jax.ablations import variants
  from tensorar_jax.evaluation import yardsticks
  from tensorar_jax.experiment import published
  from tensorar_jax.experiment.schema import choose
  from tensorar_jax.experiment.stages import with_precision
  from tensorar_jax.training import loop

  chosen = getattr(options, "stage", None)
  if options.init:
    stages = published.start_from(experiment.stages, options.init, chosen)
    experiment = dataclasses.replace(experiment, stages=stages)
  precision = getattr(options, "precision", None)
  if precision:
    stages = with_precision(experiment.stages, precision)
    experiment = dataclasses.replace(experiment, stages=stages)
  ablation = variants.Ablation(experiment) if experiment.ablation else None
  stages = ablation.stages if ablation else experiment.stages
  if chosen:
    choose("--stage", chosen, stages)
  for name, stage in stages.items():
    try:
      loop.check(stage)
    except ValueError as error:
      raise ValueError(f"stage {name}: {error}") from error
  evaluation = None if ablation else experiment.evaluation
  if evaluation:
    yardsticks.check(evaluation, stages)
  return Experiment(stages=stages, evaluation=evaluation, ablation=ablation)


def workdir(options: Shared, experiment: schema.Experiment) -> pathlib.Path:
  """Returns --workdir, by default runs/<name of the config file>."""
  if options.workdir:
    return pathlib.Path(options.workdir).absolute()
  if experiment.ablation:  # every axis of a data set shares its base
    data = experiment.ablation.data
    return pathlib.Path("runs", "ablations", data).absolute()
  return pathlib.Path("runs", experiment.name).absolute()


def check_processes(
  mode: str, options: Shared, experiment: schema.Experiment | None
) -> None:
  """Raises ValueError, in all processes of a run, if one is unlike the first.

  Compared are mode, flags, config, versions of packages, and this project's
  code; the data are when they are opened.
  """
  from tensorar_jax.checkpoints import resumable

  flags = {
    f"--{name}": value
    for name, value in dataclasses.asdict(options).items()
    if name not in OF_A_PROCESS
  }
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  description = {
    "--mode": mode,
    **flags,
    "config": experiment and dataclasses.asdict(experiment),
    "packages": {"python": platform.python_version(), **versions},
    "code": code_digest(),
  }
  plain: dict[str, Any] = json.loads(json.dumps(description, default=str))
  resumable.check_same("command, config or packages", plain)


def code_digest() -> str:
  """Returns a digest of this project's modules."""
  root, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
  for file in sorted(root.rglob("*.py")):
    digest.update(f"{file.relative_to(root)}\0".encode())
    digest.update(file.read_bytes())
  return digest.hexdigest()[:16]
