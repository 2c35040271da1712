"""Variants of one model, each with a few values changed.

A variant is known by what it changes against the centre: `centre`,
`tensorar-window=8`. So axes that meet in a variant share it, and a change of
`sampling` alone needs no training. `k = 1`, the base model trained on, belongs
to every axis.
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
  """The name of a variant; it is a folder's as well."""

  def text(value):
    many = isinstance(value, tuple)
    return "-".join(map(text, value)) if many else str(value)

  spelt = [f"{path.replace('.', '-')}={text(v)}" for path, v in changes]
  return "+".join(spelt) or "centre"


def _plain(value: Any) -> Any:
  return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


class Ablation:
  """An experiment with variants, taken apart.

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
    for _, variant, seed in self.runs():
      self.stages.setdefault(*self.stage(variant, seed))

  def _axis(self, name: str, axis: Mapping) -> dict:
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
    """The name of a variant, known from now on."""
    changes = []
    for path, value in change:
      if parse.value_at(self.centre, path) != _plain(value):
        changes.append((path, _plain(value)))
    name = spell(tuple(sorted(changes)))
    self.variants[name] = tuple(sorted(changes))
    return name

  def stage(self, variant: str, seed: int) -> tuple[str, Stage]:
    """(name of what is trained, its stage) of a variant and training seed."""
    changes = choose("variant", variant, self.variants)
    trained = tuple(c for c in changes if not c[0].startswith("sampling."))
    stage = self.centre
    for path, value in changes:
      stage = parse.changed(stage, path, value)
    name = f"{spell(trained)}-seed{seed}"
    return name, dataclasses.replace(stage, name=name, seed=seed)

  def runs(self) -> Iterator[tuple[str, str, int]]:
    """(record, variant, seed), seed by seed: what is there is balanced."""
    for seed in range(self.seeds):
      for variant in self.variants:
        yield f"{variant}/seed{seed}", variant, seed

  def shapes(self) -> dict[str, list[int]]:
    """{variant: [window, depth]}; a window of 1 has no depth, said as 1."""
    found = {}
    for variant in self.variants:
      section = self.stage(variant, 0)[1].tensorar
      window = section.window
      found[variant] = [window, section.depth if window > 1 else 1]
    return found

  def timed(self) -> set[tuple[int, int]]:
    """(window, depth) of the rows of the axes where time is of interest."""
    shapes = self.shapes()
    rows = [
      row for axis in self.axes.values() for row in axis["rows"] * axis["timed"]
    ]
    return {
      (window, depth)
      for window, depth in (shapes[row["variant"]] for row in rows)
    }
