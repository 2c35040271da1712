"""Published PyTorch weights -> a model of ours, by a table of `Rule`s.

Strict both ways: a tensor that no rule claims, or two do, a parameter that
nothing fills and a wrong shape are listed together in one ValueError. Files are
read as data: code in a pickle is refused, never run.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import zipfile
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tensorar_jax import weights as weights_lib
from tensorar_jax.interfaces import Rule

# The wrappers that training scripts put around a state dict, in the order in
# which LlamaGen's sampling scripts look for them; "ema" is never read.
CONTAINERS = ("model", "module", "state_dict")


def load_state_dict(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(
      f"{path}: no such file. Download the published checkpoint and pass its"
      " path."
    )
  if path.suffix == ".safetensors":
    return _load_safetensors(path)
  return _load_torch(path)


def _load_safetensors(path):
  from safetensors import SafetensorError
  from safetensors.flax import load_file

  try:
    return load_file(path)
  except SafetensorError as error:
    raise ValueError(
      f"{path}: not a readable safetensors file ({error}). It may be"
      " truncated: download it again."
    ) from error


def _load_torch(path):
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      f"{path}: reading PyTorch files needs torch. Run `pip install"
      " torch==2.13.0`, or convert the file to safetensors."
    ) from error
  import pickle

  try:
    # weights_only refuses every class but tensors and containers; training
    # checkpoints also hold their parsed arguments, which are plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
      content = torch.load(
        path,
        map_location="cpu",
        weights_only=True,
        mmap=zipfile.is_zipfile(path),
      )
  except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
    raise ValueError(
      f"{path}: refused. It is truncated, no PyTorch checkpoint, or holds code"
      f" beside tensors, which is never run ({str(error).splitlines()[0]})"
    ) from error
  for name in CONTAINERS:
    if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
      content = content[name]
      break
  tensors = {
    name: value
    for name, value in dict(content).items()
    if isinstance(value, torch.Tensor)
  }
  if not tensors:
    raise ValueError(
      f"{path}: found no tensors, neither at the top nor under {CONTAINERS}."
    )
  return {name: _to_numpy(value) for name, value in tensors.items()}


def _to_numpy(tensor) -> np.ndarray:
  import torch

  if tensor.dtype == torch.bfloat16:  # NumPy has it from ml_dtypes only
    bits = tensor.contiguous().view(torch.int16).numpy()
    return bits.view(jnp.bfloat16.dtype)
  return tensor.numpy()


def plan(
  model: nnx.Module, rules: list[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[tuple[str, Rule]]]:
  """path -> the tensors that make it, in layer order; needs shapes only.

  Raises one ValueError with everything that does not fit.
  """
  _, params, frozen = weights_lib.split(model)
  want = {path: leaf.shape for path, leaf in {**params, **frozen}.items()}
  targets, problems = _claim(rules, shapes)
  problems += [f"nothing fills {path}" for path in want if path not in targets]
  result = {}
  for path, parts in targets.items():
    parts = sorted(parts, key=lambda part: part[0])
    if path not in want:
      problems.append(f"{parts[0][1]} goes to {path}, which the model lacks")
      continue
    problems += _misfits(path, parts, want[path], shapes)
    result[path] = [(name, rule) for _, name, rule in parts]
  if problems:
    shown = "\n  ".join(problems[:40])
    more = f"\n  ... {len(problems) - 40} more" if len(problems) > 40 else ""
    raise ValueError(
      f"the checkpoint does not fit the model ({len(problems)} problems; is"
      f" it the right family, variant and size?):\n  {shown}{more}"
    )
  return result


def _claim(rules, names):
  """(path -> [(layer or -1, name, rule)], complaints about names)."""
  targets, problems = {}, []
  for name in names:
    hits = [(r, m) for r in rules if (m := re.fullmatch(r.source, name))]
    if not hits:
      problems.append(f"no rule claims {name}")
    elif len(hits) > 1:
      problems.append(f"{len(hits)} rules claim {name}")
    elif hits[0][0].target is not None:
      rule, found = hits[0]
      groups = found.groupdict()
      layer = int(groups.get("layer", -1))
      target = rule.target.format(**groups)
      targets.setdefault(target, []).append((layer, name, rule))
  return targets, problems


def _misfits(path, parts, want, shapes):
  """Complaints about the layers and shapes of the tensors of one path."""
  layers = [layer for layer, _, _ in parts]
  stacked = layers[0] >= 0
  if stacked and layers != list(range(want[0])):
    return [f"{path} has {want[0]} layers, the file has layers {layers}"]
  if not stacked and len(parts) > 1:
    return [f"{path} is claimed by {[name for _, name, _ in parts]}"]
  problems = []
  for _, name, rule in parts:
    shape = tuple(shapes[name])
    if rule.axes and len(rule.axes) == len(shape):
      shape = tuple(shape[axis] for axis in rule.axes)
    if shape != tuple(want[1:] if stacked else want):
      problems.append(f"{name} gives {shape} for {path} {tuple(want)}")
  return problems


def fill(
  model: nnx.Module, rules: list[Rule], tensors: Mapping[str, np.ndarray]
) -> nnx.Module:
  """The model with every weight from `tensors`, in the model's dtypes.

  `model` may be abstract (`nnx.eval_shape`). Raises one ValueError with
  everything that does not fit.
  """
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  planned = plan(model, rules, shapes)
  skeleton, params, frozen = weights_lib.split(model)
  dtypes = {path: leaf.dtype for path, leaf in {**params, **frozen}.items()}
  return skeleton.merge(
    {
      path: _assemble(parts, tensors, dtypes[path])
      for path, parts in planned.items()
    }
  )


def _assemble(parts, tensors, dtype):
  """One parameter from its tensors, stacked if they are layers."""
  arrays = []
  for name, rule in parts:
    array = np.asarray(tensors[name])
    if not np.isfinite(array.astype(np.float32)).all():
      raise ValueError(
        f"{name} holds NaN or infinite values: the checkpoint is damaged."
        " Download it again."
      )
    arrays.append(array.transpose(rule.axes) if rule.axes else array)
  stacked = "layer" in re.compile(parts[0][1].source).groupindex
  return jnp.asarray(np.stack(arrays) if stacked else arrays[0], dtype)
