"""Makes models, conditionings and text encoders from the sections of a stage.

Models are fresh, without arrays, or with the weights of a checkpoint; what a
stage's training starts from is in `initial_weights`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

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
from tensorar_jax.parallel import sharding, weights

CONDITIONINGS = {
  "class": ClassConditioning,
  "text": TextConditioning,
  "prompt": PromptConditioning,
}


def _words(name, texts, mesh):
  """Makes the encoder of the words that captions of drawings are made of."""
  return words.WordEncoder(shapes.WORDS, width=texts.width, length=texts.length)


# By kind: (folder or kind, conditioning, mesh) -> interfaces.TextEncoder.
TEXT_ENCODERS = {**encoders.TEXT_ENCODERS, "words": _words}


# Any: an nnx.Module that is a `Backbone` or a `Tokenizer`, too; Python has no
# type for both.
def component(part: ComponentConfig, rngs: nnx.Rngs) -> Any:
  """Makes a freshly initialised backbone or tokenizer."""
  module = families.family(part.kind, part.name)
  return module.Model(part.config, rngs=rngs)


@functools.cache  # the stages of a config share their tokenizer
def abstract(part: ComponentConfig) -> Any:
  """Makes a backbone or tokenizer with shapes in place of its arrays."""
  return weights.abstract(lambda rngs: component(part, rngs))


def conditioning(
  section: ConditioningConfig,
) -> ClassConditioning | TextConditioning:
  """Makes the `interfaces.Conditioning` that a section describes."""
  kind = choose("conditioning", section.name, CONDITIONINGS)
  options = dataclasses.asdict(section.options) if section.options else {}
  return kind(**options)


def text_conditioning(section: ConditioningConfig) -> TextConditioning:
  """Makes a conditioning that reads texts; ValueError if it reads classes."""
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
  """Loads the conditioning's `encoder`, the name of a kind or a folder.

  Raises:
    ValueError: there is no `encoder`, or its features have other sizes.
  """
  if not section.encoder:
    raise ValueError(
      f"conditioning.name={section.name!r}, encoder='': expected an `encoder`"
      " that reads texts, such as weights/flan-t5-xl."
    )
  texts = text_conditioning(section)
  kind = texts.encoder if texts.encoder in TEXT_ENCODERS else texts.reads
  encoder = TEXT_ENCODERS[kind](texts.encoder, texts, mesh)
  sizes = encoder.width, encoder.length
  if sizes != (texts.width, texts.length):
    raise ValueError(
      f"{texts.encoder} encodes texts as (width, length) = {sizes}: set those"
      f" of the conditioning, {texts.width} and {texts.length}."
    )
  return encoder


def model(stage: Stage, rngs: nnx.Rngs) -> nnx.Module:
  """Makes the freshly initialised model that a stage trains."""
  if stage.objective == "tokenizer":
    return component(stage.tokenizer, rngs)
  if stage.objective == "classifier":
    return classifier.Model(stage.classifier, rngs=rngs)
  return tensorar(stage, rngs)


def tensorar(stage: Stage, rngs: nnx.Rngs) -> TensorAR:
  """Makes a freshly initialised model that draws images."""
  backbone = component(stage.backbone, rngs)
  return TensorAR(backbone, **dataclasses.asdict(stage.tensorar), rngs=rngs)


def abstract_model(stage: Stage) -> nnx.Module:
  """Makes the model that a stage trains with shapes in place of its arrays."""
  return weights.abstract(functools.partial(model, stage))


# --- models of checkpoints ---------------------------------------------------


def load(
  path: str | pathlib.Path, *, ema: bool = False, mesh: Mesh | None = None
) -> nnx.Module:
  """Loads the model of a checkpoint that this project saved.

  Args:
    path: a work directory with one stage, a stage's folder, or that of a step.
    ema: whether to take the averaged weights, where training kept them.
    mesh: splits the weights as they are read; by default one device has all.

  Raises:
    ValueError: there is no checkpoint, or it has no averaged weights.
  """
  folder = orbax_io.find(path)
  abstract = abstract_model(saved.stage_in(folder))
  skeleton, params, frozen = weights.split(abstract)
  shardings = None
  if mesh:
    layout = sharding.layout({**params, **frozen}, abstract, mesh)
    shardings = sharding.shardings(layout)
  trained = "ema" if ema else "params"
  parts = orbax_io.read_weights(folder, (trained, "frozen"), shardings)
  if trained not in parts:
    raise ValueError(f"{folder} holds no EMA: train with optim.ema_decay > 0.")
  return skeleton.merge(parts[trained], parts.get("frozen", {}))


def load_stage(
  stage: Stage, folder: pathlib.Path, mesh: Mesh | None = None
) -> nnx.Module:
  """Loads a trained stage as it is sampled: averaged, if it keeps an EMA."""
  return load(folder, ema=stage.is_averaged, mesh=mesh)


def load_tensorar(
  stage: Stage, folder: pathlib.Path, mesh: Mesh | None = None
) -> TensorAR:
  """As `load_stage`, for stages that draw images; ValueError for others."""
  loaded = load_stage(stage, folder, mesh)
  if not isinstance(loaded, TensorAR):
    raise ValueError(
      f"{folder} holds a {stage.objective}: images are drawn by stages whose"
      " objective is 'tensorar'. Name one of them."
    )
  return loaded


def frozen_tokenizer(stage: Stage, workdir: pathlib.Path) -> Tokenizer:
  """Makes the stage's tokenizer, with the weights that its `init` names."""
  init = stage.tokenizer.init
  if not init:
    return component(stage.tokenizer, nnx.Rngs(stage.seed))
  loaded = load(saved.resolve(init, workdir))
  if not isinstance(loaded, Tokenizer):
    raise ValueError(
      f"tokenizer.init={init!r} holds no tokenizer: name a stage whose"
      " objective is 'tokenizer'."
    )
  return loaded
