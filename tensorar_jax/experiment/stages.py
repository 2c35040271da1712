"""The stages of an experiment in order: each after those it starts from.

A stage's weights come from its parents: the checkpoint that `init` names, and
the one that its tokenizer's `init` names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tensorar_jax.experiment.schema import Stage


def parents_first(stages: Mapping[str, Stage]) -> dict[str, Stage]:
  """The stages in their order, but each after those it starts from."""
  ordered: dict[str, Stage] = {}

  def place(name: str, below: tuple[str, ...] = ()) -> None:
    if name in below:
      raise ValueError(f"stages {[*below, name]} start from one another.")
    for parent in parents(stages[name]).values():
      if parent in stages and parent not in ordered:
        place(parent, (*below, name))
    ordered.setdefault(name, stages[name])

  for name in stages:
    place(name)
  return ordered


def parents(stage: Stage) -> dict[str, str]:
  """What a stage's weights come from: {"init": ..., "tokenizer": ...}."""
  found = {"init": stage.init}
  if stage.objective == "tensorar":
    found["tokenizer"] = stage.tokenizer.init
  return {role: init for role, init in found.items() if init}


def with_precision(
  stages: Mapping[str, Stage], precision: str
) -> dict[str, Stage]:
  """The stages with backbones of the dtype that --precision asks for.

  Args:
    stages: by name.
    precision: of `chips.PRECISIONS`.
  """
  dtype = "bfloat16" if precision == "bfloat16" else "float32"
  changed = dict(stages)
  for name, stage in stages.items():
    if stage.backbone.config is not None:
      config = dataclasses.replace(stage.backbone.config, dtype=dtype)
      backbone = dataclasses.replace(stage.backbone, config=config)
      changed[name] = dataclasses.replace(stage, backbone=backbone)
  return changed
