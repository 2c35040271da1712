"""Configs and command lines become typed stages; every option can be set."""

import dataclasses
import inspect
import pathlib
import re

import pytest

import configs
from tensorar_jax.experiment import build, config_file, parse, schema, values
from tensorar_jax.experiment.schema import Stage
from tensorar_jax.method.tensorar import TensorAR
from tests import tiny_configs

ROOT = pathlib.Path(configs.__path__[0])
FILES = sorted(ROOT.glob("*.py")) + [ROOT / "ablations" / "window.py"]
FILES = [path for path in FILES if path.stem != "published"]
# A section's own name and size decide what its other keys are.
KINDS = {"name", "variant", "objective", "axes"}


def text(value) -> str:
  """A value as a command line has it."""
  return value if isinstance(value, str) else repr(value)


def other(value, kind):
  """Another value of the same type, not always one that the field allows."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return 2 * value or 1
  if isinstance(value, float):
    return value / 2 or 0.125
  if isinstance(value, str):
    return f"{value}x"
  if isinstance(value, tuple) and value:
    return tuple(other(one, None) for one in value)
  for sample in (1, 0.5, (1, 2), ("x",), "x"):  # of None, or of an empty tuple
    if sample != value:
      try:
        return values.convert(sample, kind, "")
      except ValueError:
        continue
  raise AssertionError(f"no sample of {kind}")


def options(stage):
  """(dotted name, value, type) of everything that a command line can set."""
  for key, section in parse.as_dict(stage).items():
    typed = getattr(stage, key)
    if not isinstance(section, dict):
      yield key, section, values.fields(Stage)[key]
      continue
    kinds = values.fields(type(typed))
    for inner in ("config", "options"):
      if getattr(typed, inner, None) is not None:
        kinds = {**kinds, **values.fields(type(getattr(typed, inner)))}
    for name, value in section.items():
      if isinstance(typed, schema.ComponentConfig) and not typed.name:
        continue  # a model of no family
      yield f"{key}.{name}", value, kinds[name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_option_can_be_set(path):
  config = config_file.read(path)
  before = parse.parse(config)
  name, stage = list(before.stages.items())[-1]
  count = 0
  for option, value, kind in options(stage):
    is_kind = option.split(".")[-1] in KINDS
    wanted = value if is_kind else other(value, kind)
    flag = {f"stages.{name}.{option}": text(wanted)}
    try:
      made = parse.as_dict(parse.parse(config, flag).stages[name])
    except ValueError as error:  # of a value that is read, and not allowed
      words = str(error)
      assert not re.search("(key|section) '.*' is unknown", words), words
      assert "expected a whole number" not in words, words
      assert option.split(".")[-1] in words or str(wanted) in words, words
    else:
      section, _, key = option.partition(".")
      assert (made[section][key] if key else made[section]) == wanted, option
    count += 1
  assert count > 80
  for kind in ("evaluation", "ablation"):
    section = getattr(before, kind)
    for field in dataclasses.fields(section) if section else ():
      value = getattr(section, field.name)
      flag = {f"{kind}.{field.name}": text(value)}
      assert getattr(parse.parse(config, flag), kind) == section


@pytest.mark.parametrize(
  "option, value, read",
  [
    ("noise.schedule_start", "1", 1),
    ("sampling.draft_temperature", "0.5", 0.5),
    ("stages.tensorar.noise.kind", "drafts", "drafts"),
    ("mesh.fsdp", "8", 8),
    ("backbone.dtype", "bfloat16", "bfloat16"),
    ("sampling.guidance", "(1.0, 1.5)", (1.0, 1.5)),
    ("tensorar.input_residual", "false", False),
    ("noise.schedule", "(0, 0.5, 1, 1)", (0, 0.5, 1, 1)),
    ("tokenizer.init", "None", None),
  ],
)
def test_what_the_documents_promise_works(option, value, read):
  found = config_file.load("configs/llamagen_b.py:384", {option: value})
  stage = found.stages["tensorar"]
  path = option.removeprefix("stages.tensorar.")
  assert parse.value_at(stage, path) == read
  assert stage.backbone.config.grid == (24, 24)


def test_an_empty_source_trains_from_nothing():
  flag = {"stages.base.source": ""}
  stage = config_file.load("llamagen_b", flag).stages["base"]
  assert stage.source is None and stage.train.num_steps > 10**6


def test_the_nearest_value_counts():
  """default < variant < shared < shared flag < stage < flag of the stage."""

  def width(**parts):
    tree = {
      **tiny_configs.SECTIONS,
      "backbone": dict(name="llamagen", grid=(8, 8), **parts.get("shared", {})),
      "stages": {
        "a": {"backbone": parts.get("own", {})},
        "b": {},
      },
    }
    stage = parse.parse(tree, parts.get("flags")).stages["a"]
    return stage.backbone.config.width

  shared = {"variant": "L"}
  assert width() == 768
  assert width(shared=shared) == 1024
  shared["width"] = 320
  flags = {"backbone.width": "384"}
  own = {"width": 448}
  assert width(shared=shared) == 320
  assert width(shared=shared, flags=flags) == 384
  assert width(shared=shared, flags=flags, own=own) == 448
  flags["stages.a.backbone.width"] = "512"
  assert width(shared=shared, flags=flags, own=own) == 512


@pytest.mark.parametrize(
  "option, value, words",
  [
    ("noise.knd", "x", "noise.knd: key 'knd' is unknown. Did you mean 'kind'"),
    ("nose.kind", "x", "section 'nose' is unknown. Did you mean 'noise'"),
    ("stages.tensr.seed", "1", "stage 'tensr' is unknown.*'tensorar'"),
    ("stages.base.backbone.widht", "3", "'widht' is unknown.*'width'"),
    ("backbone.widht", "3", "^backbone: key 'widht' is unknown.*'width'"),
    ("noise", "drafts", "keys: kind, schedule"),
    ("noise.kind.x", "1", "expected --config.SECTION.KEY=VALUE"),
    ("stages.base", "1", "name what to set of the stage"),
    ("seed", "one", "seed='one': expected a whole number"),
    ("train.batch_size", "8.5", "batch_size='8.5': expected a whole number"),
    ("train.batch_size", "True", "expected a whole number"),
    ("data.flip", "2", "data.flip='2': expected True or False"),
    ("sampling.guidance", "high", "expected a number or a tuple of numbers"),
    ("backbone.grid", "(8, 8, 8)", r"expected \(a whole number, a whole"),
    ("evaluation.models", "(1,)", "expected a tuple of texts"),
    ("train.num_steps", "7", "change nothing.*stages.NAME.train.num_steps"),
    ("objective", "paint", "objective 'paint' is unknown"),
    ("conditioning.name", "sound", "conditioning 'sound' is unknown"),
  ],
)
def test_a_wrong_flag_says_what_was_expected(option, value, words):
  with pytest.raises(ValueError, match=words) as error:
    config_file.load("configs/digits.py", {option: value})
  assert "\n" not in str(error.value)


def test_one_value_stands_for_a_tuple_of_it():
  flags = {"evaluation.models": "base", "evaluation.guidance": "2"}
  found = config_file.load("configs/digits.py", flags).evaluation
  assert found.models == ("base",) and found.guidance == (2.0,)


def test_a_wrong_config_lists_those_there_are(tmp_path):
  with pytest.raises(ValueError, match="mean configs/digits.py.*rar_xxl.py"):
    config_file.load("configs/digit.py")
  with pytest.raises(ValueError, match="'384' after a colon: expected nothing"):
    config_file.load("configs/digits.py:384")
  (tmp_path / "empty.py").write_text("")
  with pytest.raises(ValueError, match="has no get_config"):
    config_file.load(str(tmp_path / "empty.py"))


def test_stages_overlay_the_shared_sections_in_the_order_of_training():
  stages = config_file.load("configs/digits.py").stages
  assert list(stages)[-1] == "drafts" and stages["tensorar"].init == "base"
  assert stages["drafts"].noise.kind == "drafts"
  assert stages["drafts"].noise.schedule == "exponential"
  assert stages["base"].tensorar.window == 1
  stages = config_file.load("configs/fashion_mnist.py").stages
  assert list(stages).index("tokenizer") < list(stages).index("base")
  tree = {**tiny_configs.SECTIONS, "stages": {"a": {"init": "b"}, "b": {}}}
  assert list(parse.parse(tree).stages) == ["b", "a"]
  tree["stages"]["b"] = {"init": "a"}
  with pytest.raises(ValueError, match="start from one another"):
    parse.parse(tree)


def test_an_error_of_one_stage_names_it():
  tree = {**tiny_configs.SECTIONS, "stages": {"a": {}, "b": {}}}
  tree["stages"]["b"] = {"loss": {"weight": "rdm"}}
  with pytest.raises(ValueError, match="^stage b: loss: key 'weight' is unk"):
    parse.parse(tree)
  with pytest.raises(ValueError, match="config.stages is empty"):
    parse.parse(tiny_configs.SECTIONS)
  with pytest.raises(ValueError, match="backbone.name is missing"):
    parse.parse({"backbone": {"width": 3}, "stages": {"a": {}}})


def test_a_stage_can_be_written_and_read():
  for path in FILES:
    for name, stage in parse.parse(config_file.read(path)).stages.items():
      assert parse.stage_of(parse.as_dict(stage), name) == stage


def test_a_value_of_a_stage_can_be_changed():
  stage = config_file.load("configs/llamagen_b.py").stages["tensorar"]
  found = parse.changed(stage, "noise.kind", "none")
  assert found.noise.kind == "none" and found.tensorar == stage.tensorar
  large = parse.changed(stage, "backbone.variant", "L").backbone.config
  assert (large.width, large.grid) == (1024, (16, 16))
  with pytest.raises(ValueError, match="expected 'section.key'"):
    parse.changed(stage, "noise", "none")
  with pytest.raises(ValueError, match="key 'kindd' is unknown"):
    parse.changed(stage, "noise.kindd", "none")


def test_defaults_are_those_of_what_the_sections_are_for():
  pairs = [(schema.TensorARConfig, TensorAR.__init__)]
  for name, kind in schema.CONDITIONINGS.items():
    pairs.append((kind, build.CONDITIONINGS[name].__init__))
  for section, function in pairs:
    parameters = inspect.signature(function).parameters
    for field in dataclasses.fields(section):
      default = parameters[field.name].default
      assert default in (field.default, inspect.Parameter.empty), field.name
