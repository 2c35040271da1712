"""Config sections -> objects. The only file that reaches a family by name.

A family is a module of `backbones/` or `tokenizers/`; a new file there is known
at once. Every unknown name or key is a ValueError that lists the known ones.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import inspect
import json
import pathlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.conditioning import encoders, words
from tensorar_jax.conditioning.conditions import (
  ClassConditioning,
  PromptConditioning,
  TextConditioning,
)
from tensorar_jax.data import shapes
from tensorar_jax.interfaces import TextEncoder
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import sharding
from tensorar_jax.parallel import weights as weights_lib

CONDITIONINGS = {
  "class": ClassConditioning,
  "text": TextConditioning,
  "prompt": PromptConditioning,
}


def _words(name, texts, mesh):
  """The vectors of the words that captions of drawings are made of."""
  return words.WordEncoder(shapes.WORDS, width=texts.width, length=texts.length)


# Kind -> (folder or kind, conditioning, mesh) -> interfaces.TextEncoder.
TEXT_ENCODERS = {**encoders.TEXT_ENCODERS, "words": _words}
# What each objective's training depends on; the rest of a config may change.
OBJECTIVES = {
  "tensorar": (
    *("tokenizer", "conditioning", "backbone", "tensorar", "noise", "loss"),
  ),
  "tokenizer": ("tokenizer",),
  "classifier": ("classifier",),
}
ALWAYS = ("seed", "objective", "init", "source", "source_dtype")
TRAINING = ("data", "optim", "train")  # what imported weights do not need
SECTIONS = {
  *(name for names in OBJECTIVES.values() for name in names),
  *(*ALWAYS, *TRAINING, "mesh", "sampling", "evaluation", "ablation", "stages"),
}
NEW_MODULES = ("encoder/", "decoder/")  # what TensorAR adds to a backbone


def choose(kind: str, name: str, known: Mapping | list) -> Any:
  """known[name], or a ValueError that lists what there is."""
  if name not in known:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
      f"{kind} {name!r} is unknown.{hint} Known: {sorted(known)}."
    )
  return known[name] if isinstance(known, Mapping) else name


def call(make: Callable, section: Mapping, where: str, *args, **kwargs) -> Any:
  """make(*args, **kwargs, **section) with every key and type checked."""
  is_module = inspect.isclass(make) and issubclass(make, nnx.Module)
  # The metaclass of NNX hides the constructor's own parameters.
  source = make.__init__ if is_module else make
  parameters = inspect.signature(source).parameters
  given = {}
  for key, value in dict(section).items():
    choose(f"{where}: key", key, {k: k for k in parameters})
    given[key] = _typed(f"{where}.{key}", value, parameters[key])
  try:
    return make(*args, **kwargs, **given)
  except TypeError as error:
    raise ValueError(f"{where}: {error}. Given: {given}.") from error


def _typed(where: str, value: Any, parameter: inspect.Parameter) -> Any:
  """`value` as the type of the default: NumPy's numbers, lists, ints pass."""
  default = parameter.default
  value = _plain(value)
  # Annotations such as `float | tuple[float, ...]` allow several values.
  if isinstance(value, tuple) and re.search(
    r"tuple|Sequence", str(parameter.annotation)
  ):
    return value
  kinds = {bool: bool, int: int, float: (int, float), str: str, tuple: tuple}
  kind = kinds.get(type(default))
  wrong = kind and not isinstance(value, kind)
  if isinstance(value, bool) and type(default) in (int, float):
    wrong = True
  if wrong:
    raise ValueError(
      f"{where}={value!r}: expected a {type(default).__name__}, such as"
      f" {default!r}."
    )
  return float(value) if isinstance(default, float) else value


def _plain(value: Any) -> Any:
  """NumPy's numbers and arrays, and lists, as plain numbers and tuples."""
  if isinstance(value, np.ndarray | np.generic):
    value = value.tolist()
  return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def family(kind: str, name: str):
  """The module `tensorar_jax.<kind>.<name>`; kind is a package's name."""
  package = importlib.import_module(f"tensorar_jax.{kind}")
  known = {m.name: m.name for m in pkgutil.iter_modules(package.__path__)}
  choose(kind.removesuffix("s"), name, known)
  return importlib.import_module(f"tensorar_jax.{kind}.{name}")


def component(kind: str, section: Mapping, rngs: nnx.Rngs) -> nnx.Module:
  """The model of {name, variant=None, **Config fields}."""
  fields = dict(section)
  fields.pop("init", None)
  module = family(kind, fields.pop("name", None))
  config = component_config(module, fields.pop("variant", None), fields)
  return module.Model(config, rngs=rngs)


def abstract(kind: str, section: Mapping) -> nnx.Module:
  """The model of a section without its arrays."""
  return _abstract(kind, json.dumps(section))


@functools.cache  # the stages of a config share their tokenizer
def _abstract(kind, section):
  return weights_lib.abstract(
    lambda rngs: component(kind, json.loads(section), rngs)
  )


def component_config(module, variant, fields):
  where = module.__name__.rsplit(".", 1)[-1]
  if variant is not None:
    base = choose(f"{where}: variant", variant, module.VARIANTS)
    fields = {**vars(base), **fields}
  return call(module.Config, fields, where)


def conditioning(section: Mapping):
  fields = dict(section)
  kind = choose("conditioning", fields.pop("name", None), CONDITIONINGS)
  return call(kind, fields, "conditioning")


def mesh_config(stage: Mapping) -> sharding.MeshConfig:
  """The mesh of a stage; it may change from run to run, the numbers do not."""
  return call(sharding.MeshConfig, stage.get("mesh", {}), "mesh")


def text_encoder(section: Mapping, mesh: Mesh | None = None) -> TextEncoder:
  """What the conditioning's `encoder` names: a kind, or the folder of one."""
  texts = conditioning(section)
  if not getattr(texts, "encoder", ""):
    raise ValueError(
      f"{dict(section)}: expected an `encoder`, such as weights/flan-t5-xl."
    )
  kind = texts.encoder if texts.encoder in TEXT_ENCODERS else texts.reads
  made = TEXT_ENCODERS[kind](texts.encoder, texts, mesh)
  if (has := (made.width, made.length)) != (texts.width, texts.length):
    raise ValueError(
      f"{texts.encoder} encodes texts as (width, length) = {has}: set those of"
      f" the conditioning, {texts.width} and {texts.length}."
    )
  return made


def model(config: Mapping, rngs: nnx.Rngs) -> nnx.Module:
  """A freshly initialised model of a stage's objective."""
  choose("objective", objective := config["objective"], OBJECTIVES)
  if objective == "tokenizer":
    return component("tokenizers", config["tokenizer"], rngs)
  if objective == "classifier":
    from tensorar_jax.nn import classifier

    settings = call(classifier.Config, config["classifier"], "classifier")
    return classifier.Model(settings, rngs=rngs)
  backbone = component("backbones", config["backbone"], rngs)
  return call(TensorAR, config["tensorar"], "tensorar", backbone, rngs=rngs)


# --- stages ----------------------------------------------------------------


def stages(config: ConfigDict) -> dict[str, dict]:
  """Each stage's full config: the shared sections with its own on top."""
  shared = json.loads(config.to_json())
  for key in shared:
    choose("config: section", key, {s: s for s in SECTIONS})
  own = shared.pop("stages", {})
  if not own:
    raise ValueError(
      "config.stages is empty: name at least one stage, such as"
      " dict(tensorar=dict(objective='tensorar'))."
    )
  merged = {
    name: _merge(shared, override, f"stages.{name}")
    for name, override in own.items()
  }
  return _parents_first(merged)


def _parents_first(stages: dict[str, dict]) -> dict[str, dict]:
  """The stages in their order, but each behind those it starts from."""
  ordered: dict[str, dict] = {}

  def place(name, below=()):
    if name in below:
      raise ValueError(f"stages {[*below, name]} start from one another.")
    for parent in parents(stages[name]).values():
      if parent in stages and parent not in ordered:
        place(parent, (*below, name))
    ordered.setdefault(name, stages[name])

  for name in stages:
    place(name)
  return ordered


def parents(stage: Mapping) -> dict[str, str]:
  """What a stage's weights come from: {"init": ..., "tokenizer": ...}."""
  found = {"init": stage["init"]}
  if stage["objective"] == "tensorar":
    found["tokenizer"] = stage["tokenizer"].get("init")
  return {role: init for role, init in found.items() if init}


def _merge(shared: dict, override: dict, where: str) -> dict:
  empty = dict.fromkeys(("init", "source", "source_dtype"))
  merged = {"objective": "tensorar", **empty, **copy.deepcopy(shared)}
  for key, value in override.items():
    choose(where, key, {s: s for s in SECTIONS - {"stages"}})
    if isinstance(value, dict) and isinstance(merged.get(key), dict):
      merged[key] = {**merged[key], **value}
    else:
      merged[key] = value
  return merged


def training_config(stage: Mapping) -> dict:
  """The sections that a stage's weights depend on."""
  names = ALWAYS + choose("objective", stage["objective"], OBJECTIVES)
  names += () if stage["source"] else TRAINING
  missing = [name for name in names if name not in stage]
  if missing:
    raise ValueError(f"the config lacks the sections {missing}.")
  return {name: stage[name] for name in names}


def resolve(init: str, workdir: pathlib.Path) -> pathlib.Path:
  """The checkpoint that `init` names: a finished stage, or a path."""
  sibling = workdir / init
  if not sibling.is_dir():
    if not pathlib.Path(init).exists():
      raise ValueError(
        f"init={init!r} is neither a trained stage of {workdir} nor a"
        " checkpoint: train that stage first, or correct the path."
      )
    return orbax_io.find(init)
  folder = orbax_io.find(sibling)
  config = orbax_io.read_meta(folder)["config"]
  last = config["train"]["num_steps"] if "train" in config else 0
  if int(folder.name) != last:
    raise ValueError(
      f"stage {init} has got to step {folder.name} of {last}: finish it before"
      " what starts from it."
    )
  return folder


def lineage(stage: Mapping, workdir: pathlib.Path) -> dict[str, str]:
  """The id of every checkpoint that a stage's weights come from."""
  return {
    role: orbax_io.read_meta(resolve(init, workdir)).get("id", "")
    for role, init in parents(stage).items()
  }


def initial_model(
  stage: Mapping, workdir: pathlib.Path, mesh: Mesh
) -> nnx.Module:
  """The model a stage starts from: fresh, or with `init`'s weights in it.

  Its weights are made, and read, where they belong on the mesh: no device ever
  has more than its part.
  """

  def fresh():
    _, params, frozen = weights_lib.split(model(stage, nnx.Rngs(stage["seed"])))
    # An initialiser may leave a weak type, which the first update makes strong.
    return {p: jnp.asarray(a, a.dtype) for p, a in {**params, **frozen}.items()}

  abstract = weights_lib.abstract(lambda rngs: model(stage, rngs))
  want = sharding.layout(jax.eval_shape(fresh), abstract, mesh)
  found = _parent_weights(stage, workdir, want) if stage["init"] else {}
  missing = {path: like for path, like in want.items() if path not in found}

  @functools.partial(jax.jit, out_shardings=sharding.shardings(missing))
  def make():
    made = fresh()
    return {path: made[path] for path in missing}

  skeleton, _, _ = weights_lib.split(abstract)
  return skeleton.merge(found, make() if missing else {})


def _parent_weights(stage, workdir, want):
  """The weights that `init` names, which must fit those that are wanted."""
  source = resolve(stage["init"], workdir)
  found = orbax_io.weight_shapes(source)
  problems = [f"{path} is not in this model" for path in found.keys() - want]
  problems += [
    f"{path} is missing"
    for path in want.keys() - found.keys()
    if not path.startswith(NEW_MODULES)
  ]
  problems += [
    f"{path} is {found[path]}, the model's {want[path].shape}"
    for path in found.keys() & want.keys()
    if found[path] != want[path].shape
  ]
  if problems:
    listed = "\n  ".join(sorted(problems)[:20])
    raise ValueError(
      f"init={stage['init']!r} ({source}) does not fit this stage's model"
      f" ({len(problems)} problems):\n  {listed}"
    )
  parts = orbax_io.read_weights(
    source, ("params", "frozen"), sharding.shardings(want)
  )
  # Weights imported in another dtype are trained in the model's own.
  return {
    path: array.astype(want[path].dtype)
    for part in parts.values()
    for path, array in part.items()
  }


def load(
  path: str | pathlib.Path, *, ema: bool = False, mesh: Mesh | None = None
) -> nnx.Module:
  """The model of a checkpoint that this project saved.

  `path` is a work directory with one stage, a stage's folder or one step's.
  `ema` takes the averaged weights, where training kept them. `mesh` splits the
  weights as they are read; by default one device has them all.
  """
  folder = orbax_io.find(path)
  config = orbax_io.read_meta(folder)["config"]
  abstract = weights_lib.abstract(lambda rngs: model(config, rngs))
  skeleton, params, frozen = weights_lib.split(abstract)
  shardings = None
  if mesh:
    like = sharding.layout({**params, **frozen}, abstract, mesh)
    shardings = sharding.shardings(like)
  part = "ema" if ema else "params"
  found = orbax_io.read_weights(folder, (part, "frozen"), shardings)
  if part not in found:
    raise ValueError(f"{folder} holds no EMA: train with optim.ema_decay > 0.")
  return skeleton.merge(found[part], found.get("frozen", {}))


def load_stage(
  stage: Mapping, folder: pathlib.Path, mesh: Mesh | None = None
) -> nnx.Module:
  """A trained stage's model as it is sampled: averaged, if it keeps an EMA."""
  return load(folder, ema=is_averaged(stage), mesh=mesh)


def is_averaged(stage: Mapping) -> bool:
  """Whether a stage is sampled with its averaged weights."""
  return not stage["source"] and stage["optim"].get("ema_decay", 0) > 0


def frozen_tokenizer(stage: Mapping, workdir: pathlib.Path) -> nnx.Module:
  """The stage's tokenizer with the weights that its `init` names."""
  section = stage["tokenizer"]
  if section.get("init"):
    return load(resolve(section["init"], workdir))
  return component("tokenizers", section, nnx.Rngs(stage["seed"]))
