"""Imports published PyTorch weights into a model, by a table of `Rule`s.

Strict both ways: a tensor that no rule claims, or two do, a parameter that
nothing fills, a wrong shape or dtype are listed together in one ValueError.
Weights are filled and cast layer by layer, in place: an import needs the memory
of the model in its new dtype and of one tensor of the file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tensorar_jax.checkpoints.torch_files import (
  Tensor,
  describe,
  load_state_dict,
)
from tensorar_jax.interfaces import Rule
from tensorar_jax.parallel import sharding
from tensorar_jax.parallel import weights as weights_lib

__all__ = ("DTYPES", "Tensor", "describe", "fill", "load_state_dict", "plan")


class MisfitError(ValueError):
  """Names, shapes or types of a file's tensors are not those of a model."""


DTYPES = ("float32", "bfloat16", "float16")  # what weights can be cast to
FLOATS = (*DTYPES, "float64")  # what a file may hold
ALIGNMENT = 64  # bytes; JAX takes such an array over without a copy
STRIP = 64  # columns


def check_dtype(dtype: str | None) -> None:
  if dtype not in (None, *DTYPES):
    raise ValueError(f"dtype={dtype!r}: expected one of {DTYPES}, or None.")


def plan(
  model: nnx.Module, rules: list[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[tuple[str, Rule]]]:
  """path -> the tensors that make its weight, in layer order, by shapes alone.

  Raises one MisfitError with everything that does not fit.
  """
  _, params, frozen = weights_lib.split(model)
  planned, problems = _match({**params, **frozen}, rules, shapes)
  _complain(problems)
  return planned


def fits(
  model: nnx.Module, rules: list[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
  """Whether tensors of these shapes fill the model, and none is left over."""
  try:
    plan(model, rules, shapes)
  except MisfitError:
    return False
  return True


def _match(want, rules, shapes):
  """(path -> [(name, rule)], everything that does not fit)."""
  targets, problems = _assign(rules, shapes)
  problems += [f"nothing fills {path}" for path in want if path not in targets]
  planned = {}
  for path, parts in targets.items():
    parts = sorted(parts, key=lambda part: part[0])
    if path not in want:
      problems.append(f"{parts[0][1]} goes to {path}, which the model lacks")
      continue
    problems += _misfits(path, parts, want[path].shape, shapes)
    planned[path] = [(name, rule) for _, name, rule in parts]
  return planned, problems


def _complain(problems):
  """Raises all problems in one MisfitError, if there are any."""
  if not problems:
    return
  shown = "\n  ".join(problems[:40])
  more = f"\n  ... {len(problems) - 40} more" if len(problems) > 40 else ""
  raise MisfitError(
    f"the checkpoint does not fit the model ({len(problems)} problems). Pass"
    f" its own family, variant and sizes:\n  {shown}{more}"
  )


def foreign_prefix(rules: list[Rule], names: Collection[str]) -> str:
  """What all names begin with, if some rule claims every one without it."""
  prefix = os.path.commonprefix(list(names)).rpartition(".")[0]
  while prefix:
    rest = [name[len(prefix) + 1 :] for name in names]
    if not any("no rule" in problem for problem in _assign(rules, rest)[1]):
      return f"{prefix}."
    prefix = prefix.rpartition(".")[0]
  return ""


def _assign(rules, names):
  """(path -> [(layer or -1, name, rule)], complaints about names)."""
  targets, problems = {}, []
  patterns = [(rule, re.compile(rule.source)) for rule in rules]
  for name in names:
    hits = [(r, m) for r, p in patterns if (m := p.fullmatch(name))]
    if not hits:
      problems.append(f"no rule claims {name}")
    elif len(hits) > 1:
      problems.append(f"{len(hits)} rules claim {name}")
    elif hits[0][0].target is not None:
      rule, match = hits[0]
      groups = match.groupdict()
      layer = int(groups.get("layer", -1))
      target = rule.target.format(**groups)
      targets.setdefault(target, []).append((layer, name, rule))
  return targets, problems


def _misfits(path, parts, want, shapes):
  """Complaints about the layers and shapes of the tensors of one path."""
  problems = []
  layers = [layer for layer, _, _ in parts]
  stacked = layers[0] >= 0
  if stacked and layers != list(range(want[0])):
    problems.append(
      f"{path} has {want[0]} layers, the file has layers {layers}"
    )
  if not stacked and len(parts) > 1:
    problems.append(f"{path} is claimed by {[name for _, name, _ in parts]}")
  for _, name, rule in parts:
    shape = tuple(shapes[name])
    if rule.axes and len(rule.axes) == len(shape):
      shape = tuple(shape[axis] for axis in rule.axes)
    if shape != tuple(want[1:] if stacked else want):
      problems.append(f"{name} gives {shape} for {path} {tuple(want)}")
  return problems


def fill(
  model: weights_lib.Model,
  rules: list[Rule],
  tensors: Mapping[str, Tensor | np.ndarray | jax.Array],
  dtype: str | None = None,
  mesh: Mesh | None = None,
) -> weights_lib.Model:
  """Fills every weight of a model from `tensors`.

  `model` may be abstract (`nnx.eval_shape`). `dtype`, one of DTYPES, is that of
  all weights; by default they get the model's own. Each weight goes from the
  host straight to its shards on `mesh`; None: to one device. Raises one
  MisfitError with everything that does not fit, and a ValueError for a damaged
  value.
  """
  check_dtype(dtype)
  skeleton, params, frozen = weights_lib.split(model)
  want = {**params, **frozen}
  shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  planned, problems = _match(want, rules, shapes)
  used = [name for parts in planned.values() for name, _ in parts]
  problems += [
    f"{name} is {kind}, expected one of {FLOATS}: take the file that is not"
    " quantised"
    for name in used
    if (kind := str(tensors[name].dtype)) not in FLOATS
  ]
  _complain(problems)
  like = sharding.layout(want, model, mesh) if mesh else want
  return skeleton.merge(
    {
      path: _to_devices(
        _assemble(parts, tensors, like[path].shape, dtype or like[path].dtype),
        like[path].sharding if mesh else None,
      )
      for path, parts in planned.items()
    }
  )


def _assemble(parts, tensors, shape, dtype):
  """One parameter from its tensors, which are its layers if it is stacked."""
  array = _aligned(shape, np.dtype(dtype))
  stacked = "layer" in re.compile(parts[0][1].source).groupindex
  for layer, (name, rule) in enumerate(parts):
    part = array[layer, ...] if stacked else array
    write(part, name, tensors[name], rule.axes)
  return array


def _to_devices(array, layout):
  """The array on the devices of a sharding; None: on the default one."""
  if layout is None or layout.num_devices == 1:
    return jax.device_put(array, layout, may_alias=True)
  return jax.make_array_from_callback(array.shape, layout, array.__getitem__)


def _aligned(shape, dtype):
  """An empty array that starts where JAX wants it."""
  size = math.prod(shape) * dtype.itemsize
  raw = np.empty(size + ALIGNMENT, np.uint8)
  start = -raw.ctypes.data % ALIGNMENT
  return raw[start : start + size].view(dtype).reshape(shape)


def write(
  target: np.ndarray,
  name: str,
  tensor: Tensor | np.ndarray | jax.Array,
  axes: tuple[int, ...] = (),
) -> None:
  """Fills `target` with a tensor, transposed and cast; a ValueError if damaged.

  The memory of the tensor's values is free again on return.
  """
  values = np.asarray(tensor)
  if not np.isfinite(values).all():
    raise ValueError(
      f"{name} holds NaN or infinite values: the weights are damaged. Download"
      " the file again, or take another checkpoint."
    )
  source = values.transpose(axes) if axes else values
  with np.errstate(over="ignore"):
    # A transposition in strips is several times faster: they fit the cache.
    for start in range(0, source.shape[-1] if axes else 1, STRIP):
      strip = np.s_[..., start : start + STRIP] if axes else ...
      target[strip] = source[strip]
  if target.dtype != values.dtype and not np.isfinite(target).all():
    raise ValueError(
      f"{name} reaches {np.abs(values).max():g}, which {target.dtype} cannot"
      " hold. Pass dtype='float32' or 'bfloat16'."
    )
