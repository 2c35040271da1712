"""Published PyTorch weights in and out: files -> models, stages, and back."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
from flax import nnx

from tensorar_jax.checkpoints import (
  hub,
  orbax_io,
  torch_export,
  torch_import,
)
from tensorar_jax.checkpoints.locations import LOCATIONS, SCHEME
from tensorar_jax.experiment import build
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import processes, sharding, weights

# What published files end with; an index stands for the files that it names.
FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", hub.INDEX)
KINDS = {
  "tensorar": ("backbones", "backbone"),
  "tokenizer": ("tokenizers", "tokenizer"),
}


def import_backbone(
  name: str,
  path: str,
  variant: str | None = None,
  *,
  weights_dtype: str | None = None,
  **fields,
) -> nnx.Module:
  """A family's backbone with published PyTorch weights in it.

  Args:
    name: a module of `backbones/`, such as "llamagen".
    path: the published file, see the family's SOURCES, or its name on the hub,
      `hf://OWNER/REPOSITORY/FILE[@REVISION]`.
    variant: a published size; `fields` of its Config override it.
    weights_dtype: one of torch_import.DTYPES, that of the weights in memory;
      None: the model's own, float32.
  """
  return _import("backbones", name, path, (variant, fields), weights_dtype)


def import_tokenizer(
  name: str,
  path: str,
  variant: str | None = None,
  *,
  weights_dtype: str | None = None,
  **fields,
) -> nnx.Module:
  """A tokenizer with published PyTorch weights; as `import_backbone`."""
  return _import("tokenizers", name, path, (variant, fields), weights_dtype)


def _import(kind, name, path, size, dtype, mesh=None):
  module = build.family(kind, name)
  config = build.component_config(module, *size)
  abstract = weights.abstract(lambda rngs: module.Model(config, rngs=rngs))
  rules = module.import_rules(config)
  tensors = torch_import.load_state_dict(path)
  return torch_import.fill(abstract, rules, tensors, dtype, mesh)


def start_from(
  stages: Mapping[str, dict[str, Any]], init: str, name: str | None = None
) -> None:
  """Has a stage start from the weights `init`, in place of the config's.

  Args:
    stages: full stage configs, which are changed.
    init: a published file, by path or by name on the hub: the stage is imported
      from it. Another stage or a checkpoint of this project: its training
      starts there. "hf://" alone gives whatever stages read from published
      files its name on the hub, the text encoder too.
    name: the stage; by default the first of a model that starts from no other,
      which is the base model.
  """
  if init == SCHEME:
    for stage in stages.values():
      _read_from_hub(stage)
    return
  if name is None:
    models = {n: s for n, s in stages.items() if s["objective"] == "tensorar"}
    name = next((n for n, s in models.items() if not s["init"]), None)
  stage = build.choose("--stage of --init", name, stages)
  published = hub.is_name(init) or init.endswith(FILES)
  published |= pathlib.Path(init).name in LOCATIONS  # a folder
  stage["source"], stage["init"] = (init, None) if published else (None, init)


def _read_from_hub(stage: dict[str, Any]) -> None:
  if stage["source"]:
    stage["source"] = _hub_name(stage["source"])
  conditioning = dict(stage.get("conditioning", {}))
  encoder = conditioning.get("encoder")
  if encoder and encoder not in build.TEXT_ENCODERS:
    conditioning["encoder"] = _hub_name(encoder)
    stage["conditioning"] = conditioning


def _hub_name(path: str) -> str:
  if hub.is_name(path):
    return path
  found = hub.location(path)
  if found is None or not hub.is_name(found):
    raise ValueError(
      f"{path}: no published file of this name is known on the hub. Name the"
      f" source itself, as --init={SCHEME}OWNER/REPOSITORY/FILE."
    )
  return found


def import_stage(stage: Mapping, folder: pathlib.Path) -> None:
  """Fills a stage's folder from its `source`; complete or not there at all.

  The checkpoint's `meta` says where the weights come from: file, size, sha256,
  and what they have become: variant, dtype.
  """
  config = build.training_config(stage)
  orbax_io.claim(folder, config)
  source = stage["source"]
  if orbax_io.steps(folder / "checkpoints"):
    logging.info("%s: imported before from %s", folder.name, source)
    return
  checkpoints = orbax_io.Checkpoints(folder / "checkpoints")
  started = time.monotonic()
  build.choose("objective with a source", stage["objective"], KINDS)
  if stage["objective"] == "tensorar" and stage["tensorar"]["window"] != 1:
    raise ValueError(
      f"stage {folder.name} imports {source} with"
      f" window={stage['tensorar']['window']}: published files hold base"
      " models. Import with window=1 and start a stage from it with init."
    )
  kind, section = KINDS[stage["objective"]]
  fields = dict(stage[section])
  name, variant = fields.pop("name"), fields.pop("variant", None)
  fields.pop("init", None)
  dtype = stage["source_dtype"] or "float32"
  mesh = sharding.make_mesh(build.mesh_config(stage))
  model = _import(kind, name, source, (variant, fields), dtype, mesh)
  if stage["objective"] == "tensorar":
    model = TensorAR(model, window=1)
  _, params, frozen = weights.split(model)
  meta = {
    "config": config,
    "seconds": time.monotonic() - started,
    "source": torch_import.describe(source),
    "variant": variant,
    "dtype": dtype,
  }
  checkpoints.save(0, {"params": params, "frozen": frozen}, {}, meta)
  checkpoints.close()
  processes.wait_for_all(folder.name)
  seconds = time.monotonic() - started
  logging.info("%s: imported %s in %.0f s", folder.name, source, seconds)


def export_stage(folder: pathlib.Path, path: pathlib.Path) -> None:
  """Writes a stage's base weights in the layout they are published in.

  TensorAR's own modules have no place there and stay behind.
  """
  meta = orbax_io.read_meta(orbax_io.find(folder))["config"]
  build.choose("objective to export", meta["objective"], KINDS)
  kind, section = KINDS[meta["objective"]]
  fields = dict(meta[section])
  module = build.family(kind, fields.pop("name"))
  fields.pop("init", None)
  config = build.component_config(module, fields.pop("variant", None), fields)
  model = build.load(folder)
  model = model.backbone if isinstance(model, TensorAR) else model
  tensors = torch_export.export_state_dict(model, module.import_rules(config))
  torch_export.save(path, tensors)
  logging.info("%s: %d tensors written to %s", folder.name, len(tensors), path)
