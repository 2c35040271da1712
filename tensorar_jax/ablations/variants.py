"""Variants of one model, each with a few values changed.

A variant is named after what it changes of the centre, as in
`tensorar-window=8`; without changes it is `centre`. So axes that meet in a
variant share it, and a change of `sampling` alone needs no training. `k = 1`,
the base model trained for as many steps more, belongs to every axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tensorar_jax.checkpoints import files
from tensorar_jax.experiment import parse
from tensorar_jax.experiment.schema import Experiment, Stage, choose

BASE = [("tensorar.window", 1)]
TIMED = {"tensorar.window", "tensorar.depth"}  # what changes the time of a step

Changes = tuple[tuple[str, Any], ...]  # ("section.key", value), ...


def spell(changes: Changes) -> str:
  """Returns the name of a variant, which is also its folder's."""

  def text(value):
    many = isinstance(value, tuple)
    return "-".join(map(text, value)) if many else str(value)

  spelled = [f"{path.replace('.', '-')}={text(v)}" for path, v in changes]
  return "+".join(spelled) or "centre"


@dataclasses.dataclass(frozen=True)
class Run:
  """A variant, trained from one seed.

  Attributes:
    variant: its name.
    seed: of its training.
  """

  variant: str
  seed: int

  @property
  def record(self) -> str:
    """Names the run in a file of results."""
    return f"{self.variant}/seed{self.seed}"


def _plain(value: Any) -> Any:
  """Returns lists as tuples, as configs have them."""
  return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


class Ablation:
  """The variants of an experiment, and what they share.

  Attributes:
    data, seeds: of `AblationConfig`.
    evaluation: of the experiment, or None.
    centre: the stage that variants change.
    shared: the stages that they start from, and what measures them.
    variants: {name: changes}, in the order in which they are run.
    base: the variant that is the base model, trained on.
    axes: {name: axis} as results have it: rows say their "variant" in place of
      the change, and "timed" whether the time of a step is of interest.
    stages: everything that is trained, parents first.
  """

  def __init__(self, experiment: Experiment):
    settings = experiment.ablation
    if settings is None:
      raise ValueError(f"{experiment.name} has no section `ablation`.")
    self.data, self.seeds = settings.data, settings.seeds
    self.evaluation = experiment.evaluation
    self.shared = dict(experiment.stages)
    choose("ablation.centre", settings.centre, self.shared)
    self.centre = self.shared.pop(settings.centre)
    self.variants: dict[str, Changes] = {}
    self.base = self._add(BASE)
    axes = files.as_json(settings.axes)
    self.axes = {name: self._axis(name, axis) for name, axis in axes.items()}
    self.stages = dict(self.shared)
    for run in self.runs():
      name, stage = self.stage(run.variant, run.seed)
      self.stages.setdefault(name, stage)

  def _axis(self, name: str, axis: Mapping) -> dict:
    """Adds the variants of an axis, and returns it as results have it."""
    rows = []
    for row in axis["rows"]:
      try:
        variant = self._add(row["change"])
      except ValueError as error:
        raise ValueError(f"axis {name}, {row['name']!r}: {error}") from error
      kept = {key: value for key, value in row.items() if key != "change"}
      rows.append({**kept, "variant": variant})
    changed = {p for row in rows for p, _ in self.variants[row["variant"]]}
    return {**axis, "rows": rows, "timed": bool(changed & TIMED)}

  def _add(self, change) -> str:
    """Adds a variant and returns its name."""
    changes = []
    for path, value in change:
      if parse.value_at(self.centre, path) != _plain(value):
        changes.append((path, _plain(value)))
    name = spell(tuple(sorted(changes)))
    self.variants[name] = tuple(sorted(changes))
    return name

  def stage(self, variant: str, seed: int) -> tuple[str, Stage]:
    """Returns a variant's stage for a training seed, and the stage's name.

    Variants that differ in `sampling` alone share the name.
    """
    changes = choose("variant", variant, self.variants)
    trained = tuple(c for c in changes if not c[0].startswith("sampling."))
    stage = self.centre
    for path, value in changes:
      stage = parse.changed(stage, path, value)
    name = f"{spell(trained)}-seed{seed}"
    return name, dataclasses.replace(stage, name=name, seed=seed)

  def runs(self) -> Iterator[Run]:
    """Yields all runs, seed by seed, so that partial results are balanced."""
    for seed in range(self.seeds):
      for variant in self.variants:
        yield Run(variant, seed)

  def shapes(self) -> dict[str, list[int]]:
    """Returns {variant: [window, depth]}; a window of 1 counts as depth 1."""
    shapes = {}
    for variant in self.variants:
      _, stage = self.stage(variant, seed=0)
      window, depth = stage.tensorar.window, stage.tensorar.depth
      shapes[variant] = [window, depth if window > 1 else 1]
    return shapes

  def timed(self) -> set[tuple[int, int]]:
    """Returns (window, depth) of all rows of the axes that are timed."""
    shapes = self.shapes()
    return {
      (shapes[row["variant"]][0], shapes[row["variant"]][1])
      for axis in self.axes.values()
      if axis["timed"]
      for row in axis["rows"]
    }
