"""The command line: `python -m tensorar_jax.main --config=configs/digits.py`.

Modes:
  run        (default) train every stage of the config, evaluate, and draw the
             report. What is done is skipped, what was interrupted continues.
  train      train the stages only; --stage picks one.
  sample     draw images from a trained stage: a grid, the refinement strip, and
             single PNGs. --stage, --num_images, --classes, --seed.
  evaluate   sample the config's models and measure them: metrics.json.
  visualize  draw the pictures and report.html from what is there.

Any value of the config can be set from here:
  python -m tensorar_jax.main --config=configs/digits.py \\
    --workdir=runs/k8 --config.stages.tensorar.tensorar.window=8
"""

from __future__ import annotations

import logging as py_logging
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

MODES = ("run", "train", "sample", "evaluate", "visualize")

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The experiment: a file of configs/.", lock_config=True
)
_MODE = flags.DEFINE_enum("mode", "run", MODES, "What to do; see above.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where everything is written. Default: runs/<config name>."
)
_STAGE = flags.DEFINE_string(
  "stage", None, "Which stage to train or sample. Default: all; the last."
)
_NUM_IMAGES = flags.DEFINE_integer(
  "num_images", 100, "How many images to sample.", lower_bound=1
)
_CLASSES = flags.DEFINE_list(
  "classes", None, "Class ids to sample in turn. Default: all."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of --mode=sample.")


def workdir() -> pathlib.Path:
  """--workdir, or runs/<name of the config file>."""
  if _WORKDIR.value:
    return pathlib.Path(_WORKDIR.value).absolute()
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  return pathlib.Path("runs", pathlib.Path(path).stem).absolute()


def run(config, folder: pathlib.Path) -> None:
  """Carries out --mode. The heavy imports wait until the flags are right."""
  from tensorar_jax import build, report, train
  from tensorar_jax.evaluation import evaluate

  stages = build.stages(config)
  for name, stage in stages.items():
    try:
      train.check(stage)
    except ValueError as error:
      raise ValueError(f"stage {name}: {error}") from error
  if _STAGE.value:
    build.choose("--stage", _STAGE.value, stages)
  settings = None
  if "evaluation" in config:
    section = config.evaluation.to_dict()
    settings = build.call(evaluate.EvaluationConfig, section, "evaluation")
    for name in (settings.classifier, *settings.models):
      build.choose("evaluation: stage", name, stages)
  if _MODE.value in ("run", "train"):
    for name, stage in stages.items():
      if _STAGE.value in (None, name):
        train.fit(stage, folder / name)
  if _MODE.value == "sample":
    report.sample(
      stages,
      folder,
      stage=_STAGE.value,
      num_images=_NUM_IMAGES.value,
      classes=_CLASSES.value,
      seed=_SEED.value,
    )
  if _MODE.value in ("run", "evaluate") and settings:
    evaluate.evaluate(stages, settings, folder)
  if _MODE.value in ("run", "visualize"):
    command = " ".join(["python -m tensorar_jax.main", *sys.argv[1:]])
    report.draw(stages, folder, command)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  line = py_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
  handler.setFormatter(line)
  # Orbax reports every file it touches at this level.
  handler.addFilter(lambda record: "orbax" not in record.pathname)
  try:
    run(_CONFIG.value, workdir())
  except ValueError as error:
    # These are messages to the user: a traceback would bury them.
    if logging.vlog_is_on(1):
      raise
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
