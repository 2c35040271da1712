"""Reads published PyTorch files into models and stages, and writes them."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any, cast

from absl import logging
from flax import nnx
from jax.sharding import Mesh

from tensorar_jax.checkpoints import (
  hub,
  orbax_io,
  torch_export,
  torch_import,
)
from tensorar_jax.checkpoints.locations import LOCATIONS, SCHEME
from tensorar_jax.experiment import build, families, parse, saved
from tensorar_jax.experiment.schema import Stage, choose
from tensorar_jax.interfaces import Backbone, Tokenizer
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import processes, sharding, weights

# Endings of published files; an index stands for the files that it names.
FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", hub.INDEX)


def import_backbone(
  name: str,
  path: str,
  variant: str | None = None,
  *,
  weights_dtype: str | None = None,
  key: str | None = None,
  **fields,
) -> Backbone:
  """Makes a family's backbone with published PyTorch weights.

  Args:
    name: a module of `backbones/`, such as "llamagen".
    path: the published file, see the family's SOURCES, or its name on the hub,
      `hf://OWNER/REPOSITORY/FILE[@REVISION]`.
    variant: a published size; `fields` of its Config override it.
    weights_dtype: of the weights in memory, one of torch_import.DTYPES; None:
      the model's own, float32.
    key: the entry of the file, such as "ema" for the averaged weights of a
      training checkpoint; None: see `torch_import.load_state_dict`.

  Raises:
    ValueError: the file does not fit; it says what would, if anything does.
  """
  module = families.family("backbones", name)
  config = families.config_of(module, variant, fields, name)
  return _import(module, config, path, weights_dtype, key=key)


def import_tokenizer(
  name: str,
  path: str,
  variant: str | None = None,
  *,
  weights_dtype: str | None = None,
  key: str | None = None,
  **fields,
) -> Tokenizer:
  """Makes a tokenizer with published PyTorch weights; as `import_backbone`."""
  module = families.family("tokenizers", name)
  config = families.config_of(module, variant, fields, name)
  return _import(module, config, path, weights_dtype, key=key)


def _import(
  module: ModuleType,
  config: Any,
  path: str,
  dtype: str | None,
  mesh: Mesh | None = None,
  key: str | None = None,
) -> Any:
  """Makes the model of a family's Config with the weights of a file."""
  rules = module.import_rules(config)
  tensors = torch_import.load_state_dict(path, key)
  model = _abstract(module, config)
  try:
    return torch_import.fill(model, rules, tensors, dtype, mesh)
  except torch_import.MisfitError as error:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if advice := _what_fits(module, config, shapes):
      raise ValueError(f"{path} does not fit this model: {advice}") from error
    raise ValueError(f"{path}: {error}") from error


def _abstract(module: ModuleType, config: Any) -> Any:
  return weights.abstract(lambda rngs: module.Model(config, rngs=rngs))


def _what_fits(
  module: ModuleType, config: Any, shapes: Mapping[str, tuple[int, ...]]
) -> str:
  """Says what to change for tensors of these shapes; "" where nothing helps.

  Tried are other kinds of files, `weights`, and the published sizes.
  """
  if prefix := torch_import.foreign_prefix(module.import_rules(config), shapes):
    return (
      f"every name in it begins with {prefix!r}, which the published ones lack."
      " Save its state dict without that prefix."
    )
  kinds = tuple(getattr(module, "WEIGHTS", ())) or (None,)
  for variant, size in {None: config, **module.VARIANTS}.items():
    model = _abstract(module, size)  # of every kind: they differ in names
    for kind in kinds:
      changes = {} if kind is None else {"weights": kind}
      rules = module.import_rules(dataclasses.replace(size, **changes))
      if torch_import.fits(model, rules, shapes):
        if kind == getattr(config, "weights", None):
          changes = {}
        changes |= {"variant": variant} if variant else {}
        section = module.__name__.split(".")[-2].removesuffix("s")
        flags = [f"--config.{section}.{k}={v}" for k, v in changes.items()]
        fields = ", ".join(f"{k}={v!r}" for k, v in changes.items())
        return f"it holds those of {fields}. Pass {' '.join(flags)}."
  return ""


def start_from(
  stages: Mapping[str, Stage], init: str, name: str | None = None
) -> dict[str, Stage]:
  """Lets a stage start from `init` in place of what the config names.

  Args:
    stages: of an experiment.
    init: a published file, by path or by name on the hub: the stage is imported
      from it. Another stage or a checkpoint of this project: its training
      starts there. "hf://" alone: all published files of the config, that of
      the text encoder too, come from the hub.
    name: the stage; by default the base model, which is the first that starts
      from no other.

  Returns:
    All stages, that one changed.
  """
  if init == SCHEME:
    return {n: _read_from_hub(stage) for n, stage in stages.items()}
  if name is None:
    models = {n: s for n, s in stages.items() if s.objective == "tensorar"}
    bases = [n for n, s in models.items() if not s.init]
    if not bases:
      raise ValueError(
        f"--init={init}: every model starts from another one already. Name the"
        f" stage that it is for by --stage; stages: {', '.join(stages)}."
      )
    name = bases[0]
  stage = choose("--stage of --init", name, stages)
  published = hub.is_name(init) or init.endswith(FILES)
  published |= pathlib.Path(init).name in LOCATIONS  # a folder
  changed = dataclasses.replace(
    stage,
    source=init if published else None,
    init=None if published else init,
  )
  return {**stages, name: changed}


def _read_from_hub(stage: Stage) -> Stage:
  """Replaces paths of published files by their names on the hub."""
  if stage.source:
    stage = dataclasses.replace(stage, source=_hub_name(stage.source))
  encoder = stage.conditioning.encoder
  if encoder and encoder not in build.TEXT_ENCODERS:
    hub_name = _hub_name(encoder)
    stage = parse.changed(stage, "conditioning.encoder", hub_name)
  return stage


def _hub_name(path: str) -> str:
  if hub.is_name(path):
    return path
  hub_name = hub.location(path)
  if hub_name is None or not hub.is_name(hub_name):
    raise ValueError(
      f"{path}: no published file of this name is known on the hub. Name the"
      f" source itself, as --init={SCHEME}OWNER/REPOSITORY/FILE."
    )
  return hub_name


def import_stage(stage: Stage, folder: pathlib.Path) -> None:
  """Imports a stage's `source` into its folder, unless that was done before.

  The checkpoint's `meta` says where the weights come from (file, size, sha256)
  and what they are here (variant, dtype). It is complete, or not there at all.

  Raises:
    ValueError: the file does not fit; the folder is another config's.
  """
  part, source = stage.component, stage.source
  if source is None:
    raise ValueError(f"stage {folder.name} has no `source` to import.")
  config = saved.claim(folder, stage)
  if orbax_io.steps(folder / "checkpoints"):
    logging.info("%s: imported before from %s", folder.name, source)
    return
  checkpoints = orbax_io.Checkpoints(folder / "checkpoints")
  started = time.monotonic()
  if stage.objective == "tensorar" and stage.tensorar.window != 1:
    raise ValueError(
      f"stage {folder.name} imports {source} with"
      f" window={stage.tensorar.window}: published files hold base"
      " models. Import with window=1 and start a stage from it with init."
    )
  dtype, mesh = stage.source_dtype, sharding.make_mesh(stage.mesh)
  module, key = families.family(part.kind, part.name), stage.source_key
  model = _import(module, part.config, source, dtype, mesh, key)
  if stage.objective == "tensorar":
    model = TensorAR(model, window=1)
  _, params, frozen = weights.split(model)
  meta = {
    "config": config,
    "seconds": time.monotonic() - started,
    "source": torch_import.describe(source, key),
    "variant": part.variant,
    "dtype": dtype,
  }
  checkpoints.save(0, {"params": params, "frozen": frozen}, {}, meta)
  checkpoints.close()
  processes.wait_for_all(folder.name)
  seconds = time.monotonic() - started
  entry = meta["source"]["container"]
  logging.info(
    "%s: imported %s in %.0f s%s",
    folder.name,
    source,
    seconds,
    f", its entry {entry!r}" if entry else "",
  )


def export_stage(
  folder: pathlib.Path, path: pathlib.Path, *, ema: bool = False
) -> None:
  """Writes a stage's base weights in the layout they are published in.

  TensorAR's own modules have no place there and are left out. `ema` takes the
  averaged weights, where training kept them. The log says what was written.
  """
  stage = saved.stage_in(saved.trained(folder))
  part = stage.component
  module = families.family(part.kind, part.name)
  model = build.load(folder, ema=ema)
  left_out = ""
  if isinstance(model, TensorAR):
    if model.window > 1:
      left_out = (
        " TensorAR's own modules, its encoder and decoder, are left out: no"
        f" published layout has them, so the file draws as k = 1. {folder} has"
        " them."
      )
    model = cast(nnx.Module, model.backbone)
  tensors = torch_export.export_state_dict(
    model, module.import_rules(part.config)
  )
  torch_export.save(path, tensors)
  which = "averaged" if ema else "trained"
  if stage.is_averaged and not ema:
    which = "trained, not averaged"
    left_out += " --ema writes the average, with which the stage is sampled."
  logging.info(
    "%s: the %d tensors of the %s %s, its %s weights, are in %s.%s",
    folder.name,
    len(tensors),
    part.kind.removesuffix("s"),
    part.name,
    which,
    path,
    left_out,
  )
