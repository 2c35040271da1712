"""Orders the stages of an experiment: each after those it starts from.

A stage's weights come from its parents: the checkpoint that `init` names, and
the one that its tokenizer's `init` names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tensorar_jax.experiment.schema import Stage


def parents_first(stages: Mapping[str, Stage]) -> dict[str, Stage]:
  """Keeps the order of the stages, but puts parents before their children.

  Raises:
    ValueError: stages start from one another in a circle.
  """
  ordered: dict[str, Stage] = {}

  def add(name: str, children: tuple[str, ...] = ()) -> None:
    if name in children:
      raise ValueError(f"stages {[*children, name]} start from one another.")
    for parent in parents(stages[name]).values():
      if parent in stages and parent not in ordered:
        add(parent, (*children, name))
    ordered.setdefault(name, stages[name])

  for name in stages:
    add(name)
  return ordered


def parents(stage: Stage) -> dict[str, str]:
  """Names what a stage's weights come from: {"init": ..., "tokenizer": ...}."""
  named = {"init": stage.init}
  if stage.objective == "tensorar":
    named["tokenizer"] = stage.tokenizer.init
  return {role: init for role, init in named.items() if init}


def with_precision(
  stages: Mapping[str, Stage], precision: str
) -> dict[str, Stage]:
  """Returns the stages with backbones of the dtype that --precision asks for.

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
