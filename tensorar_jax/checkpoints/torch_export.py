"""Exports a model to PyTorch weights: an import table read backwards.

Each `Rule` is turned round: its target becomes the pattern for our path, its
source the template of the PyTorch name, its axes the opposite transposition.
The source must therefore consist of literal text and named groups, all of which
but `layer` occur in the target.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping

import numpy as np
from flax import nnx

from tensorar_jax.checkpoints import files, torch_files, torch_import
from tensorar_jax.interfaces import Rule
from tensorar_jax.parallel import weights as weights_lib

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_TOKEN = re.compile(
  r"\(\?P<(?P<group>\w+)>(?P<body>[^()]*)\)"
  r"|\\(?P<escaped>[^\w{}])|(?P<plain>[^\\.^$*+?{}\[\]|()])"
)


def export_state_dict(
  model: nnx.Module, rules: list[Rule], dtype: str | None = None
) -> dict[str, np.ndarray]:
  """The PyTorch state dict of a model, by its family's import rules.

  `dtype` is one of `torch_import.DTYPES`, by default that of each weight. The
  same rules import the result again.
  """
  torch_import.check_dtype(dtype)
  _, params, frozen = weights_lib.split(model)
  inverses = [
    _Inverse(rule, rule.target)
    for rule in rules
    if rule.target is not None and not rule.is_alias
  ]
  tensors = {}
  for path, array in {**params, **frozen}.items():
    hits = [
      (inverse, match)
      for inverse in inverses
      if (match := inverse.pattern.fullmatch(path))
    ]
    if len(hits) != 1:
      raise ValueError(
        f"{len(hits)} rules lead to {path}, expected one. Pass the rules of the"
        " model's own family; of a TensorAR pass only the backbone."
      )
    inverse, match = hits[0]
    tensors.update(inverse.tensors(match.groupdict(), np.asarray(array), dtype))
  torch_import.plan(model, rules, {n: t.shape for n, t in tensors.items()})
  return tensors


class _Inverse:
  """A rule turned round, which fills `target`."""

  def __init__(self, rule: Rule, target: str):
    self.axes = tuple(int(axis) for axis in np.argsort(rule.axes))
    self.name, groups = _template(rule)
    fields = set(re.findall(r"\{(\w+)\}", target))
    if groups.keys() - {"layer"} != fields:
      raise ValueError(
        f"the rule {rule.source!r} cannot be turned round: its groups"
        f" {sorted(groups)}, but for 'layer', must be the fields of its target"
        f" {target!r}."
      )
    self.stacked = "layer" in groups
    self.pattern = re.compile(_pattern(target, groups))

  def tensors(
    self, groups: dict[str, str], array: np.ndarray, dtype: str | None
  ) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of every layer of a parameter, given its path's groups."""
    for layer, part in enumerate(array if self.stacked else [array]):
      name = self.name.format(layer=layer, **groups)
      part = part.transpose(self.axes) if self.axes else part
      tensor = np.empty(part.shape, dtype or part.dtype)
      torch_import.write(tensor, name, part)
      yield name, tensor


def _template(rule):
  """(PyTorch name with `{group}`s, group -> its regular expression)."""
  name, groups, end = "", {}, 0
  for token in _TOKEN.finditer(rule.source):
    if token.start() != end:
      break
    end = token.end()
    if group := token["group"]:
      groups[group] = token["body"]
      name += f"{{{group}}}"
    else:
      name += token["escaped"] or token["plain"]
  if end != len(rule.source):
    raise ValueError(
      f"the rule {rule.source!r} cannot be turned round: from"
      f" {rule.source[end:]!r} on, it may stand for several names. Write it"
      " with escaped text and named groups, or as several rules."
    )
  return name, groups


def _pattern(target, groups):
  """The regular expression of the paths that a target stands for."""
  pattern = re.escape(target)
  for group, body in groups.items():
    field = re.escape(f"{{{group}}}")
    pattern = pattern.replace(field, f"(?P<{group}>{body})", 1)
    pattern = pattern.replace(field, f"(?P={group})")
  return pattern


def save(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a new file, by its suffix: {'model': tensors} or safetensors.

  A reader sees the whole file or none. An existing one is never replaced.
  """
  path = pathlib.Path(path)
  if path.suffix not in SUFFIXES:
    raise ValueError(f"{path}: expected a file name with one of {SUFFIXES}.")
  if path.exists():
    raise ValueError(f"{path} exists. Remove it, or choose another name.")
  if not path.parent.is_dir():
    raise ValueError(f"{path.parent}: no such folder. Create it first.")
  write = _save_safetensors if path.suffix == ".safetensors" else _save_torch
  files.remove_leftovers_of(path)
  with files.replacing(path, sync=True, new=True) as partial:
    write(partial, tensors)


def _save_safetensors(path, tensors):
  from safetensors import numpy as safetensors

  dense = {n: np.require(t, requirements="C") for n, t in tensors.items()}
  safetensors.save_file(dense, path, metadata={"format": "pt"})


def _save_torch(path, tensors):
  torch = torch_files.import_torch(path)
  state = {}
  for name, array in tensors.items():
    # PyTorch does not know NumPy's bfloat16: hand over bits and a type.
    bits = np.require(array, requirements=["C", "W"]).reshape(-1).view("uint8")
    tensor = torch.from_numpy(bits).view(getattr(torch, array.dtype.name))
    state[name] = tensor.reshape(array.shape)
  with path.open("wb") as file:
    torch.save({"model": state}, file)
