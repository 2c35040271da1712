"""Turns a config, a tree of plain values, into typed objects and back.

A value of a stage is the last of these that is given:

  the default in `schema`, or in the family's Config
  the published size that `variant` names
  the shared section of the file, then `--config.SECTION.KEY`
  the stage's own section of the file, then `--config.stages.NAME.SECTION.KEY`

So a stage's own value stands, whatever is set for all stages.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tensorar_jax.experiment import families, stages, values
from tensorar_jax.experiment.schema import (
  CONDITIONINGS,
  AblationConfig,
  ComponentConfig,
  ConditioningConfig,
  EvaluationConfig,
  Experiment,
  Stage,
  choose,
)
from tensorar_jax.experiment.values import Text

# Sections of the whole experiment, not of a stage.
WHOLE = {"evaluation": EvaluationConfig, "ablation": AblationConfig}
STAGE = {k: kind for k, kind in values.fields(Stage).items() if k != "name"}


def parse(
  config: ConfigDict | Mapping,
  overrides: Mapping[str, str] | None = None,
  name: str = "",
) -> Experiment:
  """Makes the experiment of a config, and checks it.

  Args:
    config: nested: sections by name, which all stages share, and `stages`.
    overrides: values as written on the command line, by dotted name, such as
      {"noise.kind": "drafts", "stages.base.train.num_steps": "10"}.
    name: of the experiment.

  Raises:
    ValueError: a section, key or value is unknown; one line says what was
      expected.
  """
  is_config = isinstance(config, ConfigDict)
  # As JSON the stages keep their order, which `to_dict` would sort.
  tree = (
    json.loads(config.to_json()) if is_config else copy.deepcopy({**config})
  )
  for key in tree:
    choose("config: section", key, {**STAGE, **WHOLE, "stages": None})
  if not tree.get("stages"):
    raise ValueError(
      "config.stages is empty: name at least one stage, such as"
      " dict(tensorar=dict(objective='tensorar'))."
    )
  for path, text in (overrides or {}).items():
    _override(tree, path, text)
  stage_trees = tree.pop("stages")
  for path in overrides or {}:
    _check_effect(path, stage_trees)
  given = {key: tree.pop(key, None) for key in WHOLE}
  whole = {
    key: _section(WHOLE[key], section, key)
    for key, section in given.items()
    if section is not None
  }
  parsed = _stages(tree, stage_trees)
  return Experiment(name, stages.parents_first(parsed), **whole)


def _stages(
  shared: dict, stage_trees: Mapping[str, Mapping]
) -> dict[str, Stage]:
  """Parses every stage: its own sections on top of the shared ones."""
  parsed, errors = {}, {}
  for name, tree in stage_trees.items():
    try:
      parsed[name] = stage_of(_merge(shared, tree), name)
    except ValueError as error:
      errors[name] = error
  for name, error in errors.items():
    # An error of every stage is one of what they share.
    everywhere = {str(e) for e in errors.values()} == {str(error)}
    if everywhere and len(errors) == len(stage_trees):
      raise error
    raise ValueError(f"stage {name}: {error}") from error
  return parsed


def _merge(shared: dict, stage_tree: Mapping) -> dict:
  """Returns the shared sections with a stage's own values on top."""
  merged = copy.deepcopy(shared)
  for key, value in stage_tree.items():
    both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
    merged[key] = {**merged[key], **value} if both else value
  return merged


def stage_of(tree: Mapping[str, Any], name: str = "") -> Stage:
  """Parses a full tree of sections, such as `as_dict` gives."""
  sections = {
    key: _section(choose("section", key, STAGE), value, key)
    for key, value in tree.items()
  }
  return Stage(name=name, **sections)


def _section(kind: Any, value: Any, where: str) -> Any:
  """Makes a section, or a value that stands in none, of the type `kind`."""
  if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
    return values.convert(value, kind, where)
  if not isinstance(value, Mapping):
    keys = ", ".join(values.fields(kind))
    raise ValueError(
      f"{where}={value!r}: expected a section with keys: {keys}."
    )
  if issubclass(kind, ComponentConfig):
    return _component(kind, dict(value), where)
  if kind is ConditioningConfig:
    return _conditioning(dict(value), where)
  return values.make(kind, value, where)


def _component(kind: type[ComponentConfig], given: dict, where: str) -> Any:
  """Makes a section whose other keys are fields of the family's Config."""
  keys = [key for key in values.fields(kind) if key != "config"]
  own_values = {key: given.pop(key) for key in keys if key in given}
  component = values.make(kind, own_values, where)
  if not component.name:
    if given:
      raise ValueError(f"{where}.name is missing: {given} are of no family.")
    return component
  module = families.family(kind.kind, component.name)
  config = families.config_of(module, component.variant, given, where)
  return dataclasses.replace(component, config=config)


def _conditioning(given: dict, where: str) -> ConditioningConfig:
  """Makes the section whose other keys are those of its kind."""
  name = str(given.pop("name", ""))
  if not name and not given:
    return ConditioningConfig()
  kind = choose("conditioning", name, CONDITIONINGS)
  return ConditioningConfig(name, values.make(kind, given, where))


def as_dict(stage: Stage) -> dict[str, Any]:
  """Returns every value of a stage but its name, as `stage_of` reads it."""
  return {key: _plain_section(getattr(stage, key)) for key in STAGE}


def _plain_section(section: Any) -> Any:
  """Returns a section as the dict of a file; other values as they are."""
  if not dataclasses.is_dataclass(section) or isinstance(section, type):
    return section
  plain = dataclasses.asdict(section)
  if isinstance(section, ComponentConfig | ConditioningConfig):
    for inner in ("config", "options"):  # beside the name, as in a file
      plain |= plain.pop(inner, None) or {}
  return plain


def changed(stage: Stage, path: str, value: Any) -> Stage:
  """Changes a stage's value at "section.key", checked as in a file."""
  section, _, key = path.partition(".")
  choose("section", section, STAGE)
  if not key or not dataclasses.is_dataclass(STAGE[section]):
    raise ValueError(
      f"{path!r}: expected 'section.key', such as 'tensorar.window'."
    )
  before = getattr(stage, section)
  plain = _plain_section(before)
  if key == "variant" and before.config is not None:
    # The values of the old size go with it.
    module = families.family(before.kind, before.name)
    base = vars(families.base_of(module, before.variant, section))
    plain = {k: v for k, v in plain.items() if k not in base or base[k] != v}
  after = _section(STAGE[section], {**plain, key: value}, section)
  return dataclasses.replace(stage, **{section: after})


def value_at(stage: Stage, path: str) -> Any:
  """Returns the value of a stage at "section.key"."""
  section, _, key = path.partition(".")
  choose("section", section, STAGE)
  plain = _plain_section(getattr(stage, section))
  if not isinstance(plain, dict) or not key:
    raise ValueError(
      f"{path!r}: expected 'section.key', such as 'tensorar.window'."
    )
  return choose(f"{section}: key", key, plain)


def _override(tree: dict, path: str, text: str) -> None:
  """Sets a value of the tree as the command line writes it."""
  *parents, key = path.split(".")
  target, known = tree, {**STAGE, **WHOLE, "stages": None}
  flag = f"--config.{path}"
  if parents[:1] == ["stages"]:
    if len(parents) == 1:
      raise ValueError(f"{flag}={text}: name what to set of the stage.")
    name = choose(f"{flag}: stage", parents[1], list(tree["stages"]))
    target, known, parents = tree["stages"][name], STAGE, parents[2:]
  kind = known[choose(f"{flag}: section", [*parents, key][0], list(known))]
  if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
    if parents or kind is None:
      raise ValueError(f"{flag}={text}: nothing of that name can be set.")
    target[key] = values.convert(Text(text), kind, flag)
    return
  if len(parents) != 1:
    keys = ", ".join(values.fields(kind))
    raise ValueError(
      f"{flag}={text}: expected --config.SECTION.KEY=VALUE; keys: {keys}."
    )
  value = Text(text)
  if not issubclass(kind, ComponentConfig | ConditioningConfig):
    # Those convert it later: the type depends on the family, or the kind.
    field_type = choose(f"{flag}: key", key, values.fields(kind))
    value = values.convert(value, field_type, flag)
  target[parents[0]] = {**(target.get(parents[0]) or {}), key: value}


def _check_effect(path: str, stage_trees: Mapping[str, Mapping]) -> None:
  """Raises ValueError for a shared value that every stage overrides."""
  section, _, key = path.partition(".")

  def has(sections):
    value = sections.get(section, {})
    return key in value if isinstance(value, Mapping) else section in sections

  if section not in WHOLE and all(map(has, stage_trees.values())):
    names = ", ".join(stage_trees)
    raise ValueError(
      f"--config.{path} would change nothing: every stage has a value of its"
      f" own. Set --config.stages.NAME.{path}; stages: {names}."
    )
