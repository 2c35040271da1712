"""The stages of an experiment in order: each after those it starts from.

A stage's weights come from its parents: the checkpoint that `init` names, and
the one that its tokenizer's `init` names.
"""

from __future__ import annotations

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
