"""Compares stages with what a work directory holds: their configs and lineage.

Each stage has a folder there, which belongs to one config. `init` names another
stage of the work directory, or a path.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.experiment import parse
from tensorar_jax.experiment.schema import OBJECTIVES, Stage
from tensorar_jax.experiment.stages import parents

ALWAYS = ("seed", "objective", "init", "source", "source_key", "source_dtype")
TRAINING = ("data", "optim", "train")  # what imported weights do not need
# Values that may differ from one start to the next: whether other data will do,
# how often to write, and how to fit into memory (`accumulate` draws other
# noise, `remat` changes the last digits).
FREE_KEYS = (
  "data.accept_changed",
  "train.log_every",
  "train.checkpoint_every",
  "train.keep",
  "train.keep_every",
  "train.accumulate",
  "train.remat",
)


def saved_config(stage: Stage) -> dict[str, Any]:
  """Returns what a stage's weights depend on, as config.json stores it.

  It holds every value, defaults too: a changed default in the code changes no
  model that was trained before.
  """
  names = ALWAYS + OBJECTIVES[stage.objective]
  names += () if stage.source else TRAINING
  sections = parse.as_dict(stage)
  for name in names:
    if _is_unnamed(sections[name]):
      raise ValueError(f"the config lacks {name}.name.")
  return {name: sections[name] for name in names}


def _is_unnamed(section: Any) -> bool:
  """Whether a section names no family, source or kind."""
  return isinstance(section, dict) and section.get("name") == ""


def read_saved(config: Mapping[str, Any], folder: pathlib.Path) -> Stage:
  """Parses a `saved_config`, also one that left defaults out."""
  try:
    return parse.stage_of(config)
  except ValueError as error:
    raise ValueError(
      f"{folder} was written by another version of this project, whose config"
      f" this one cannot read: {error} Use that version for it, or pass another"
      " --workdir."
    ) from error


def stage_in(folder: pathlib.Path) -> Stage:
  """Reads the stage that saved a checkpoint folder."""
  return read_saved(orbax_io.read_meta(folder)["config"], folder)


def claim(folder: pathlib.Path, stage: Stage) -> dict[str, Any]:
  """Makes `folder` this stage's, and returns its `saved_config`.

  FREE_KEYS may differ, and a config that left a default out is the same as one
  that spells it out.

  Raises:
    ValueError: the folder holds a checkpoint of another config.
  """
  config = saved_config(stage)
  orbax_io.claim(
    folder,
    config,
    FREE_KEYS,
    complete=lambda before: saved_config(read_saved(before, folder)),
  )
  return config


def trained(folder: pathlib.Path, step: int | None = None) -> pathlib.Path:
  """Finds the checkpoint of a stage's folder, by default the newest.

  Raises:
    ValueError: the stage was not trained yet.
  """
  if not orbax_io.steps(folder / "checkpoints"):
    raise ValueError(
      f"{folder}: found no checkpoint of the stage {folder.name!r}. Train it"
      " first: --mode=train, or for published weights --mode=import. If it was"
      " trained elsewhere, name that --workdir."
    )
  return orbax_io.find(folder, step)


def resolve(init: str, workdir: pathlib.Path) -> pathlib.Path:
  """Finds the checkpoint that `init` names: a finished stage's, or a path."""
  sibling = workdir / init
  if not sibling.is_dir():
    if not pathlib.Path(init).exists():
      raise ValueError(
        f"{init!r} is neither a trained stage of {workdir} nor a checkpoint:"
        " train that stage first (--mode=train, or for published weights"
        " --mode=import), or correct the path."
      )
    return orbax_io.find(init)
  folder = orbax_io.find(sibling)
  stage = stage_in(folder)
  num_steps = 0 if stage.source else stage.train.num_steps
  if int(folder.name) != num_steps:
    raise ValueError(
      f"stage {init} has got to step {folder.name} of {num_steps}: finish it"
      " before what starts from it."
    )
  return folder


def lineage(stage: Stage, workdir: pathlib.Path) -> dict[str, str]:
  """Reads the id of every checkpoint that a stage's weights come from."""
  return {
    role: orbax_io.read_meta(resolve(init, workdir)).get("id", "")
    for role, init in parents(stage).items()
  }


def check_lineage(stage: Stage, folder: pathlib.Path) -> dict[str, str]:
  """Returns a stage's `lineage`, which must be that of its checkpoints.

  Raises:
    ValueError: a parent was trained again since.
  """
  now = lineage(stage, folder.parent)
  if not orbax_io.steps(folder / "checkpoints"):
    return now
  before = orbax_io.run_meta(folder).get("lineage")
  if before != now:
    raise ValueError(
      f"{folder} was trained from other weights than its parents now have:"
      f" {before} then, {now} now. Move the folder away to train it again."
    )
  return now


def check_data(
  stage: Stage,
  folder: pathlib.Path,
  before: Mapping[str, Any] | None,
  now: dict[str, Any],
) -> dict[str, Any]:
  """Returns the digest of a stage's data, which must be its checkpoint's.

  Args:
    stage: its `data.accept_changed` takes others.
    folder: of the stage.
    before: of the checkpoint; None: there is none, or it is of a version that
      did not keep it.
    now: of `fingerprints.of`.

  Raises:
    ValueError: the data have changed.
  """
  if before in (None, now):
    return now
  changed = f"{folder} was trained on other data than {stage.data.name} now is"
  if stage.data.accept_changed:
    logging.warning("%s: %s then, %s now. It goes on.", changed, before, now)
    return now
  raise ValueError(
    f"{changed}: {before} then, {now} now. Its images would come in another"
    " order. Put the data back, or continue on these by"
    " --config.data.accept_changed=true; another --workdir starts afresh."
  )
