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

from tensorar_jax.interfaces import Frozen, Rule

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


def match(
  rules: list[Rule], names: list[str]
) -> tuple[dict[str, list[tuple[int, str, Rule]]], list[str]]:
  """target path -> [(layer or -1, name, rule)], and a list of complaints."""
  targets: dict[str, list[tuple[int, str, Rule]]] = {}
  problems = []
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


def fill(
  model: nnx.Module, rules: list[Rule], tensors: Mapping[str, np.ndarray]
) -> None:
  """Sets every weight of `model` from `tensors`; all problems in one error."""
  weights = {
    "/".join(map(str, path)): variable
    for path, variable in nnx.to_flat_state(
      nnx.state(model, nnx.Any(nnx.Param, Frozen))
    )
  }
  targets, problems = match(rules, list(tensors))
  problems += [f"nothing fills {path}" for path in weights if path not in targets]
  values = {}
  for path, parts in targets.items():
    if path not in weights:
      names = [name for _, name, _ in parts]
      problems.append(f"{names[0]} goes to {path}, which the model lacks")
      continue
    want = weights[path].shape
    value, problem = _assemble(path, parts, tensors, want)
    problems += problem
    values[path] = value
  if problems:
    shown = "\n  ".join(problems[:40])
    more = f"\n  ... {len(problems) - 40} more" if len(problems) > 40 else ""
    raise ValueError(
      f"the checkpoint does not fit the model ({len(problems)} problems; is"
      f" it the right family, variant and size?):\n  {shown}{more}"
    )
  leaves = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, Frozen)))
  for path, variable in leaves:
    value = values["/".join(map(str, path))]
    variable[...] = jnp.asarray(value, variable.dtype)
  nnx.update(model, nnx.from_flat_state(leaves))


def _assemble(path, parts, tensors, want):
  """(the array of one parameter, complaints) from its stacked parts."""
  parts = sorted(parts, key=lambda part: part[0])
  stacked = parts[0][0] >= 0
  if stacked and [p[0] for p in parts] != list(range(want[0])):
    found = [p[0] for p in parts]
    return None, [f"{path} has {want[0]} layers, the file has layers {found}"]
  if not stacked and len(parts) > 1:
    return None, [f"{path} is claimed by {[p[1] for p in parts]}"]
  shape = want[1:] if stacked else want
  arrays, problems = [], []
  for _, name, rule in parts:
    array = np.asarray(tensors[name])
    if rule.axes and len(rule.axes) == array.ndim:
      array = array.transpose(rule.axes)
    if array.shape != shape:
      problems.append(f"{name} gives {array.shape} for {path} {shape}")
    elif not np.isfinite(array.astype(np.float32)).all():
      problems.append(f"{name} holds NaN or infinite values")
    arrays.append(array)
  if problems:
    return None, problems
  return np.stack(arrays) if stacked else arrays[0], []
