"""Variants of one model, each with a few values changed.

A variant is known by what it changes against the centre: `centre`,
`tensorar-window=8`. So axes that meet in a variant share it, and a change of
`sampling` alone needs no training. `k = 1`, the base model trained on, belongs
to every axis.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from tensorar_jax.experiment import build

BASE = [("tensorar.window", 1)]
TIMED = {"tensorar.window", "tensorar.depth"}  # what changes the time of a step

Changes = tuple[tuple[str, Any], ...]  # ("section.key", value), ...


@dataclasses.dataclass(frozen=True)
class AblationConfig:
  """The section `ablation` of a config.

  Attributes:
    data: what the data set is called; names the files of results.
    axes: {name: {"title", "rows", "source", "paper_base"}}; a row is {"name",
      "change", "paper", "paper_seconds"}: [["section.key", value], ...], and
      the FID and time of a paper, or None; `paper_base` and
      `paper_base_seconds` are those of its base model.
    centre: the stage that every variant changes.
    seeds: training seeds of each variant: 0, 1, ...
  """

  data: str
  axes: dict
  centre: str = "tensorar"
  seeds: int = 1

  def __post_init__(self):
    if self.seeds < 1 or not self.axes:
      raise ValueError(
        f"ablation.seeds={self.seeds}, axes={sorted(self.axes)}: expected at"
        " least one of each."
      )


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
  """A config with a section `ablation`, taken apart.

  Attributes:
    data, seeds: of the section.
    centre: the full stage that variants change.
    shared: the stages that they start from, and what measures them.
    variants: {name: changes}, in the order in which they are run.
    base: the variant that is the base model, trained on.
    axes: {name: axis} as results have it: rows say their "variant" in place of
      the change, and "timed" whether the time of a step is of interest.
    stages: everything that is trained, parents first.
  """

  def __init__(self, config: ConfigDict):
    section = json.loads(config.ablation.to_json())
    settings = build.call(AblationConfig, section, "ablation")
    self.data, self.seeds = settings.data, settings.seeds
    self.shared = build.stages(config)
    build.choose("ablation.centre", settings.centre, self.shared)
    self.centre = self.shared.pop(settings.centre)
    self.variants: dict[str, Changes] = {}
    self.base = self._add(BASE)
    self.axes = {n: self._axis(n, axis) for n, axis in settings.axes.items()}
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
      section, _, key = path.partition(".")
      found = build.choose("section", section, self.centre)
      if not key or not isinstance(found, dict):
        raise ValueError(
          f"{path!r}: expected 'section.key', such as 'tensorar.window'."
        )
      if key not in found or _plain(found[key]) != _plain(value):
        changes.append((path, _plain(value)))
    name = spell(tuple(sorted(changes)))
    self.variants[name] = tuple(sorted(changes))
    return name

  def stage(self, variant: str, seed: int) -> tuple[str, dict]:
    """(name of what is trained, full stage) of a variant and training seed."""
    changes = build.choose("variant", variant, self.variants)
    trained = tuple(c for c in changes if not c[0].startswith("sampling."))
    stage = copy.deepcopy(self.centre)
    for path, value in changes:
      section, _, key = path.partition(".")
      stage[section][key] = value
    return f"{spell(trained)}-seed{seed}", {**stage, "seed": seed}

  def runs(self) -> Iterator[tuple[str, str, int]]:
    """(record, variant, seed), seed by seed: what is there is balanced."""
    for seed in range(self.seeds):
      for variant in self.variants:
        yield f"{variant}/seed{seed}", variant, seed

  def shapes(self) -> dict[str, list[int]]:
    """{variant: [window, depth]}; a window of 1 has no depth, said as 1."""
    found = {}
    for variant in self.variants:
      section = self.stage(variant, 0)[1]["tensorar"]
      window = section["window"]
      found[variant] = [window, section.get("depth", 1) if window > 1 else 1]
    return found

  def timed(self) -> set[tuple[int, int]]:
    """(window, depth) of the rows of the axes where time is of interest."""
    shapes = self.shapes()
    rows = [
      row for axis in self.axes.values() for row in axis["rows"] * axis["timed"]
    ]
    return {tuple(shapes[row["variant"]]) for row in rows}
