"""--config and --config.SECTION.KEY: from the command line to an experiment."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping
from typing import Any

from tensorar_jax.cli.options import Shared


def read(config: str, overrides: Mapping[str, str]):
  """The ConfigDict of a config file, with some of its values changed.

  Args:
    config: FILE, or FILE:ARGUMENT for a `get_config` that takes one.
    overrides: {"SECTION.KEY": value} as written on the command line.

  Raises:
    ValueError: there is no such file, key or type of value.
  """
  from absl import flags
  from ml_collections import config_flags

  path = pathlib.Path(config.partition(":")[0])
  if not path.is_file():
    raise ValueError(f"--config={config}: {_what_there_is(path)}")
  words = [f"--config={config}"]
  words += [f"--config.{key}={value}" for key, value in overrides.items()]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", lock_config=True, flag_values=values, sys_argv=["main", *words]
  )
  try:
    values(["main", *words])
  except Exception as error:  # a config file is code: it may raise anything
    inner: Any = error
    while isinstance(inner, Exception) and inner.args:
      inner = inner.args[0]  # AttributeError(KeyError("..."))
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    # What get_config raised stands after the lines of its traceback.
    words = lines[-1] if "Traceback" in str(inner) else " ".join(lines)
    raise ValueError(
      f"--config={config}: {words.rstrip('.')}. A command line may set the keys"
      " that the config file spells out."
    ) from error
  return values.config


def _what_there_is(path: pathlib.Path) -> str:
  """Says which configs there are where one is missing."""
  folder = path.parent if path.parent.is_dir() else pathlib.Path("configs")
  known = sorted(str(file) for file in folder.glob("*.py"))
  near = difflib.get_close_matches(str(path), known, n=1)
  hint = f" Did you mean {near[0]}?" if near else ""
  return f"there is no such file.{hint} There are: {', '.join(known)}."


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config, taken apart and checked.

  Attributes:
    stages: {name: stage} in the order of training.
    evaluation: an `EvaluationConfig`; None without a section `evaluation`.
    ablation: a `variants.Ablation`; None without a section `ablation`.
  """

  stages: Mapping[str, Any]
  evaluation: Any = None
  ablation: Any = None


def check(config, options: Shared) -> Experiment:
  """The experiment of a config, with --init; ValueError if it cannot be built.

  Args:
    config: of `read`.
    options: of any mode; --init fills the stage --stage.
  """
  from tensorar_jax.ablations import variants
  from tensorar_jax.evaluation.yardsticks import EvaluationConfig
  from tensorar_jax.experiment import build, published
  from tensorar_jax.training import loop

  ablation = variants.Ablation(config) if "ablation" in config else None
  stages = ablation.stages if ablation else build.stages(config)
  stage = getattr(options, "stage", None)
  if stage:
    build.choose("--stage", stage, stages)
  if options.init:
    published.start_from(stages, options.init, stage)
  for name, settings in stages.items():
    try:
      loop.check(settings)
    except ValueError as error:
      raise ValueError(f"stage {name}: {error}") from error
  evaluation = None
  if "evaluation" in config and not ablation:
    section = config.evaluation.to_dict()
    evaluation = build.call(EvaluationConfig, section, "evaluation")
    evaluation.check(stages)
  return Experiment(stages=stages, evaluation=evaluation, ablation=ablation)


def workdir(options: Shared, config) -> pathlib.Path:
  """--workdir, or runs/<name of the config file>."""
  if options.workdir:
    return pathlib.Path(options.workdir).absolute()
  if "ablation" in config:  # every axis of a data set shares its base
    return pathlib.Path("runs", "ablations", config.ablation.data).absolute()
  path = str(options.config).partition(":")[0]
  return pathlib.Path("runs", pathlib.Path(path).stem).absolute()
