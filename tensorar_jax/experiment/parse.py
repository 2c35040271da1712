"""A config, as a tree of plain values, to typed objects and back.

What a value of a stage is, from weakest to strongest:

  the default in `schema`, or in the family's Config
  the published size that `variant` names
  the shared section of the file, then `--config.SECTION.KEY`
  the stage's own section of the file, then `--config.stages.NAME.SECTION.KEY`

So a value that a stage has for itself stands, whatever is said for all stages.
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

# Of the whole experiment, not of a stage.
WHOLE = {"evaluation": EvaluationConfig, "ablation": AblationConfig}
STAGE = {k: kind for k, kind in values.fields(Stage).items() if k != "name"}


def parse(
  config: ConfigDict | Mapping,
  overrides: Mapping[str, str] | None = None,
  name: str = "",
) -> Experiment:
  """The experiment of a config, checked.

  Args:
    config: sections by name, what all stages share, and `stages`; nested.
    overrides: {"noise.kind": "drafts", "stages.base.train.num_steps": "10"},
      texts by the dotted name of what they set.
    name: what the experiment is called.

  Raises:
    ValueError: of one line, for a section, key or value that is not known; it
      says what was expected.
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
  own = tree.pop("stages")
  for path in overrides or {}:
    _check_effect(path, own)
  sections = {key: tree.pop(key, None) for key in WHOLE}
  whole = {
    key: _section(WHOLE[key], section, key)
    for key, section in sections.items()
    if section is not None
  }
  return Experiment(name, stages.parents_first(_stages(tree, own)), **whole)


def _stages(shared: dict, own: Mapping[str, Mapping]) -> dict[str, Stage]:
  found, errors = {}, {}
  for name, sections in own.items():
    try:
      found[name] = stage_of(_merge(shared, sections), name)
    except ValueError as error:
      errors[name] = error
  for name, error in errors.items():
    # What is wrong with all of them is wrong with what they share.
    everywhere = {str(e) for e in errors.values()} == {str(error)}
    if everywhere and len(errors) == len(own):
      raise error
    raise ValueError(f"stage {name}: {error}") from error
  return found


def _merge(shared: dict, own: Mapping) -> dict:
  """The shared sections with a stage's own values on top."""
  merged = copy.deepcopy(shared)
  for key, value in own.items():
    both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
    merged[key] = {**merged[key], **value} if both else value
  return merged


def stage_of(tree: Mapping[str, Any], name: str = "") -> Stage:
  """The stage of a full tree of sections, such as `as_dict` gives."""
  given = {}
  for key, value in tree.items():
    kind = choose("section", key, STAGE)
    given[key] = _section(kind, value, key)
  return Stage(name=name, **given)


def _section(kind: Any, value: Any, where: str) -> Any:
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
  own = [key for key in values.fields(kind) if key != "config"]
  head = {key: given.pop(key) for key in own if key in given}
  head = values.make(kind, head, where)
  if not head.name:
    if given:
      raise ValueError(f"{where}.name is missing: {given} are of no family.")
    return head
  module = families.family(kind.kind, head.name)
  config = families.config_of(module, head.variant, given, where)
  return dataclasses.replace(head, config=config)


def _conditioning(given: dict, where: str) -> ConditioningConfig:
  name = str(given.pop("name", ""))
  if not name and not given:
    return ConditioningConfig()
  kind = choose("conditioning", name, CONDITIONINGS)
  return ConditioningConfig(name, values.make(kind, given, where))


def as_dict(stage: Stage) -> dict[str, Any]:
  """Every value of a stage but its name, as `stage_of` reads it."""
  return {key: _plain_section(getattr(stage, key)) for key in STAGE}


def _plain_section(section: Any) -> Any:
  if not dataclasses.is_dataclass(section) or isinstance(section, type):
    return section
  found = dataclasses.asdict(section)
  for inner in ("config", "options"):  # beside the name, as in a file
    if isinstance(section, ComponentConfig | ConditioningConfig):
      found |= found.pop(inner, None) or {}
  return found


def changed(stage: Stage, path: str, value: Any) -> Stage:
  """The stage with the value at "section.key" changed, checked as in a file."""
  section, _, key = path.partition(".")
  choose("section", section, STAGE)
  if not key or not dataclasses.is_dataclass(STAGE[section]):
    raise ValueError(
      f"{path!r}: expected 'section.key', such as 'tensorar.window'."
    )
  before = getattr(stage, section)
  found = _plain_section(before)
  if key == "variant" and before.config is not None:
    # What the old size says goes with it.
    module = families.family(before.kind, before.name)
    base = vars(families.base_of(module, before.variant, section))
    found = {k: v for k, v in found.items() if k not in base or base[k] != v}
  made = _section(STAGE[section], {**found, key: value}, section)
  return dataclasses.replace(stage, **{section: made})


def value_at(stage: Stage, path: str) -> Any:
  """The value at "section.key" of a stage."""
  section, _, key = path.partition(".")
  choose("section", section, STAGE)
  found = _plain_section(getattr(stage, section))
  if not isinstance(found, dict) or not key:
    raise ValueError(
      f"{path!r}: expected 'section.key', such as 'tensorar.window'."
    )
  return choose(f"{section}: key", key, found)


def _override(tree: dict, path: str, text: str) -> None:
  """Sets a value of the tree to a text that the parser will read."""
  *parents, key = path.split(".")
  where, known = tree, {**STAGE, **WHOLE, "stages": None}
  flag = f"--config.{path}"
  if parents[:1] == ["stages"]:
    if len(parents) == 1:
      raise ValueError(f"{flag}={text}: name what to set of the stage.")
    name = choose(f"{flag}: stage", parents[1], list(tree["stages"]))
    where, known, parents = tree["stages"][name], STAGE, parents[2:]
  kind = known[choose(f"{flag}: section", [*parents, key][0], list(known))]
  if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
    if parents or kind is None:
      raise ValueError(f"{flag}={text}: nothing of that name can be set.")
    where[key] = values.convert(Text(text), kind, flag)
    return
  if len(parents) != 1:
    keys = ", ".join(values.fields(kind))
    raise ValueError(
      f"{flag}={text}: expected --config.SECTION.KEY=VALUE; keys: {keys}."
    )
  value = Text(text)
  if not issubclass(kind, ComponentConfig | ConditioningConfig):
    # Those need to know the family, or kind, to know what a key is.
    keys = values.fields(kind)
    one = choose(f"{flag}: key", key, keys)
    value = values.convert(value, one, flag)
  where[parents[0]] = {**(where.get(parents[0]) or {}), key: value}


def _check_effect(path: str, own: Mapping[str, Mapping]) -> None:
  """ValueError for a value for all stages that each stage has for itself."""
  section, _, key = path.partition(".")

  def has(sections):
    value = sections.get(section, {})
    return key in value if isinstance(value, Mapping) else section in sections

  if section not in WHOLE and all(map(has, own.values())):
    raise ValueError(
      f"--config.{path} would change nothing: every stage has a value of its"
      f" own. Set --config.stages.NAME.{path}; stages: {', '.join(own)}."
    )
