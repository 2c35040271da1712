"""Reads the tensors of PyTorch and safetensors files, as data and when needed.

Code in a pickle is refused, never run. Files are mapped into memory, not
loaded: a tensor's values take memory of their own only while they are used.
(PyTorch's format from before 1.6 cannot be mapped; it is loaded whole.) Names
are those of the model itself, without what PyTorch's wrappers add to them.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from tensorar_jax.checkpoints import hub

# The wrappers that training scripts put around a state dict, in the order in
# which the published sampling scripts look for them; "ema" is read on request.
CONTAINERS = ("model", "module", "state_dict")
# What torch.compile, FSDP and recomputation put between the names of modules,
# and data parallelism before all of them.
_WRAPPER = re.compile(
  r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PARALLEL = "module."
_SAFETENSORS = {
  "F16": "float16",
  "BF16": "bfloat16",
  "F32": "float32",
  "F64": "float64",
}
_ZIP = b"PK\x03\x04"


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file; its values are read when NumPy asks for them."""

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.array(self.read(), dtype=dtype, copy=copy)


def load_state_dict(
  path: str | pathlib.Path, key: str | None = None
) -> dict[str, Tensor]:
  """The tensors of a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file.

  The path may be a name on the hub, see `hub.find`; an `.index.json` stands for
  all the files that it names. `key` names the entry of a PyTorch file to read,
  such as "ema"; by default the first of CONTAINERS, or the file itself where it
  is a bare state dict. The log names the entry if there are others.
  """
  path = hub.find(path)
  return _without_wrappers(path, _open(path, key)[1])


def _without_wrappers(path, tensors):
  """The tensors by their names without those of PyTorch's wrappers."""
  names = {name: _WRAPPER.sub("", name) for name in tensors}
  while names and all(name.startswith(_PARALLEL) for name in names.values()):
    names = {old: new[len(_PARALLEL) :] for old, new in names.items()}
  if len(set(names.values())) < len(names):
    raise ValueError(
      f"{path}: some tensors have one name but for a wrapper's prefix, such as"
      f" {_WRAPPER.pattern}. Save the state dict of the model itself."
    )
  if changed := next((old for old, new in names.items() if old != new), None):
    logging.info("%s: %s is read as %s", path, changed, names[changed])
  return {new: tensors[old] for old, new in names.items()}


def describe(path: str | pathlib.Path, key: str | None = None) -> dict:
  """Describes weights: file, size, sha256, container, number, dtypes.

  Size and sha256 of a divided model cover the index and all its files.
  """
  path = hub.find(path)
  container, tensors = _open(path, key)
  divided = path.name.endswith(hub.INDEX)
  parts = [path]
  if divided:
    parts += hub.parts_of(path)
  digest = hashlib.sha256()
  for part in parts:
    with part.open("rb") as file:
      hashlib.file_digest(file, lambda: digest)
  dtypes = collections.Counter(tensor.dtype for tensor in tensors.values())
  return {
    "file": path.name,
    "size": sum(part.stat().st_size for part in parts),
    "sha256": digest.hexdigest(),
    "container": container,
    "num_tensors": len(tensors),
    "dtypes": dict(sorted(dtypes.items())),
  }


def _open(path, key):
  """(name of the container or None, its tensors)."""
  if not path.is_file():
    folder = ", it is a folder" if path.is_dir() else ""
    raise ValueError(f"{path}: no such file{folder}. {hub.advice(path)}")
  if not path.stat().st_size:
    raise ValueError(f"{path}: the file is empty. Download it again.")
  if path.name.endswith(hub.INDEX):
    return _open_index(path, key)
  if path.suffix != ".safetensors":
    return _open_torch(path, key)
  if key is not None:
    raise ValueError(
      f"{path}: key={key!r}, but a safetensors file holds one state dict only."
      " Leave the key out: source_key of the stage, from Python key."
    )
  return None, _open_safetensors(path)


def _open_index(path, key):
  """(container of the parts, the tensors of all)."""
  all_tensors, container = {}, None
  for part, names in hub.parts_of(path).items():
    container, tensors = _open(part, key)
    if differing := sorted(names ^ tensors.keys()):
      raise ValueError(
        f"{part} and {path.name} do not agree on the tensors {differing[:5]}"
        f"{' and others' * (len(differing) > 5)}. Download all the files again."
      )
    all_tensors |= tensors
  return container, all_tensors


def _open_safetensors(path):
  import safetensors

  try:
    file = safetensors.safe_open(path, framework="np")
    parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path}: not a readable safetensors file ({error}). It is truncated or"
      " of another format: download it again, or correct its suffix."
    ) from error
  if not parts:
    raise ValueError(f"{path}: the file holds no tensors. Download it again.")
  return {
    name: Tensor(
      tuple(part.get_shape()),
      _SAFETENSORS.get(dtype := str(part.get_dtype()), dtype),
      functools.partial(file.get_tensor, name),
    )
    for name, part in parts.items()
  }


def import_torch(path: pathlib.Path) -> Any:
  """Imports the torch package, which is an optional extra."""
  try:
    import torch
  except ImportError as error:
    raise ValueError(
      f"{path}: PyTorch files need the package torch. Run `pip install"
      " 'tensorar_jax[torch]'`, or use a .safetensors file."
    ) from error
  return torch


def _open_torch(path, key):
  torch = import_torch(path)
  with path.open("rb") as file:
    zipped = file.read(len(_ZIP)) == _ZIP  # the older format cannot be mapped
  try:
    # weights_only refuses every class but tensors and containers; training
    # checkpoints also hold their parsed arguments, which are plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
      content = torch.load(
        path, map_location="cpu", weights_only=True, mmap=zipped
      )
  except Exception as error:  # torch raises many kinds for bytes it cannot read
    raise ValueError(f"{path}: {_refusal(str(error))}") from error
  container, state = _find_state(path, content, key, torch.Tensor)
  return container, {str(n): _torch_tensor(torch, v) for n, v in state.items()}


def _refusal(error: str) -> str:
  if code := re.search(r"GLOBAL (\S+)", error):
    return (
      f"refused, it holds code beside tensors ({code[1]}), which is never run."
      " If you trust its author, load it with PyTorch and save its state dict"
      " alone."
    )
  reason = error.rpartition("WeightsUnpickler error: ")[2].strip()
  return (
    "refused, it is truncated, no PyTorch checkpoint, or holds code beside"
    " tensors, which is never run. Download it again"
    f" ({reason.splitlines()[0] if reason else 'the file ends too early'})."
  )


# How users choose an entry of a file.
_HOW = "--config.stages.NAME.source_key=ENTRY, from Python key=ENTRY"


def _find_state(path, content, key, tensor_type):
  """(container, state dict) of a file's content."""

  def is_state(value):
    return isinstance(value, Mapping) and any(
      isinstance(entry, tensor_type) for entry in value.values()
    )

  entries = content if isinstance(content, Mapping) else {}
  names = CONTAINERS if key is None else (key,)
  container = next((n for n in names if is_state(entries.get(n))), None)
  if container is None and not (key is None and is_state(content)):
    held = sorted(map(str, entries))[:20] or type(content).__name__
    found = [name for name, value in entries.items() if is_state(value)]
    advice = f"Choose one of {found}: {_HOW}" if found else "Take another file"
    raise ValueError(
      f"{path}: found no tensors under {names}{' or at the top' * (not key)};"
      f" the file holds {held}. {advice}."
    )
  unread = [n for n in entries if n != container and is_state(entries[n])]
  if container and unread and key is None:
    logging.warning(
      "%s: these are the weights of the entry %r; the file has others under"
      " %s, which %s reads",
      path,
      container,
      unread,
      _HOW,
    )
  state = content if container is None else content[container]
  others = [n for n, v in state.items() if not isinstance(v, tensor_type)]
  if others:
    raise ValueError(
      f"{path}: the entries {others} of the state dict are no tensors. Remove"
      " them with PyTorch and save the file again."
    )
  return container, state


def _torch_tensor(torch, value):
  dtype = str(value.dtype).removeprefix("torch.")
  if value.layout != torch.strided or value.is_meta:
    dtype = f"{'meta' if value.is_meta else value.layout} {dtype}"

  def read():
    tensor = value.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy has it from ml_dtypes only
      return tensor.view(torch.int16).numpy().view("bfloat16")
    return tensor.numpy()

  return Tensor(tuple(value.shape), dtype, read)
