"""Sections -> objects: models, conditionings, text encoders; and weights."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.conditioning import encoders, words
from tensorar_jax.conditioning.conditions import (
  ClassConditioning,
  PromptConditioning,
  TextConditioning,
)
from tensorar_jax.data import shapes
from tensorar_jax.experiment import families, saved
from tensorar_jax.experiment.schema import (
  ComponentConfig,
  ConditioningConfig,
  Stage,
  choose,
)
from tensorar_jax.interfaces import TextEncoder, Tokenizer
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.nn import classifier
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
NEW_MODULES = ("encoder/", "decoder/")  # what TensorAR adds to a backbone


# Any: an nnx.Module that is a `Backbone` or a `Tokenizer`, too; Python has no
# type for both.
def component(part: ComponentConfig, rngs: nnx.Rngs) -> Any:
  """A freshly initialised backbone or tokenizer."""
  module = families.family(part.kind, part.name)
  return module.Model(part.config, rngs=rngs)


@functools.cache  # the stages of a config share their tokenizer
def abstract(part: ComponentConfig) -> Any:
  """The model of a section without its arrays."""
  return weights_lib.abstract(lambda rngs: component(part, rngs))


def conditioning(
  section: ConditioningConfig,
) -> ClassConditioning | TextConditioning:
  """What makes conditions: an `interfaces.Conditioning`."""
  kind = choose("conditioning", section.name, CONDITIONINGS)
  options = dataclasses.asdict(section.options) if section.options else {}
  return kind(**options)


def text_conditioning(section: ConditioningConfig) -> TextConditioning:
  """What makes conditions of texts; ValueError for classes."""
  made = conditioning(section)
  if not isinstance(made, TextConditioning):
    raise ValueError(
      f"conditioning.name={section.name!r}: expected one that reads texts,"
      " 'text' or 'prompt'."
    )
  return made


def text_encoder(
  section: ConditioningConfig, mesh: Mesh | None = None
) -> TextEncoder:
  """What the conditioning's `encoder` names: a kind, or the folder of one."""
  if not section.encoder:
    raise ValueError(
      f"conditioning.name={section.name!r}, encoder='': expected an `encoder`"
      " that reads texts, such as weights/flan-t5-xl."
    )
  texts = text_conditioning(section)
  kind = texts.encoder if texts.encoder in TEXT_ENCODERS else texts.reads
  made = TEXT_ENCODERS[kind](texts.encoder, texts, mesh)
  if (has := (made.width, made.length)) != (texts.width, texts.length):
    raise ValueError(
      f"{texts.encoder} encodes texts as (width, length) = {has}: set those of"
      f" the conditioning, {texts.width} and {texts.length}."
    )
  return made


def model(stage: Stage, rngs: nnx.Rngs) -> nnx.Module:
  """A freshly initialised model of a stage's objective."""
  if stage.objective == "tokenizer":
    return component(stage.tokenizer, rngs)
  if stage.objective == "classifier":
    return classifier.Model(stage.classifier, rngs=rngs)
  return tensorar(stage, rngs)


def tensorar(stage: Stage, rngs: nnx.Rngs) -> TensorAR:
  """A freshly initialised model that draws images."""
  backbone = component(stage.backbone, rngs)
  return TensorAR(backbone, **dataclasses.asdict(stage.tensorar), rngs=rngs)


# --- initial and trained weights ---------------------------------------------


def initial_model(
  stage: Stage, workdir: pathlib.Path, mesh: Mesh
) -> nnx.Module:
  """The model a stage starts from: fresh, or with `init`'s weights in it.

  Its weights are made, and read, where they belong on the mesh: no device ever
  has more than its part.
  """

  def fresh():
    _, params, frozen = weights_lib.split(model(stage, nnx.Rngs(stage.seed)))
    # An initialiser may leave a weak type, which the first update makes strong.
    return {p: jnp.asarray(a, a.dtype) for p, a in {**params, **frozen}.items()}

  abstract = weights_lib.abstract(lambda rngs: model(stage, rngs))
  want = sharding.layout(jax.eval_shape(fresh), abstract, mesh)
  found = _parent_weights(stage.init, workdir, want) if stage.init else {}
  missing = {path: like for path, like in want.items() if path not in found}

  @functools.partial(jax.jit, out_shardings=sharding.shardings(missing))
  def make():
    made = fresh()
    return {path: made[path] for path in missing}

  skeleton, _, _ = weights_lib.split(abstract)
  return skeleton.merge(found, make() if missing else {})


def _parent_weights(init: str, workdir: pathlib.Path, want: dict) -> dict:
  """The weights that `init` names, which must fit those that are wanted."""
  source = saved.resolve(init, workdir)
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
      f"init={init!r} ({source}) does not fit this stage's model"
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
  stage = saved.stage_in(folder)
  abstract = weights_lib.abstract(lambda rngs: model(stage, rngs))
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
  stage: Stage, folder: pathlib.Path, mesh: Mesh | None = None
) -> nnx.Module:
  """A trained stage's model as it is sampled: averaged, if it keeps an EMA."""
  return load(folder, ema=stage.is_averaged, mesh=mesh)


def load_tensorar(
  stage: Stage, folder: pathlib.Path, mesh: Mesh | None = None
) -> TensorAR:
  """As `load_stage`, for a stage that draws images; ValueError for others."""
  found = load_stage(stage, folder, mesh)
  if not isinstance(found, TensorAR):
    raise ValueError(
      f"{folder} holds a {stage.objective}: images are drawn by stages whose"
      " objective is 'tensorar'. Name one of them."
    )
  return found


def frozen_tokenizer(stage: Stage, workdir: pathlib.Path) -> Tokenizer:
  """The stage's tokenizer with the weights that its `init` names."""
  init = stage.tokenizer.init
  if not init:
    return component(stage.tokenizer, nnx.Rngs(stage.seed))
  found = load(saved.resolve(init, workdir))
  if not isinstance(found, Tokenizer):
    raise ValueError(
      f"tokenizer.init={init!r} holds no tokenizer: name a stage whose"
      " objective is 'tokenizer'."
    )
  return found
