"""Places every array on one mesh of devices; says what its axes split.

| axis     | splits                                                           |
| -------- | ---------------------------------------------------------------- |
| `data`   | the rows of a batch; weights are copied                          |
| `fsdp`   | the rows as well, and all weights, with their optimiser moments  |
|          | and averages; a layer's are gathered when it runs                |
| `tensor` | heads, hidden units and vocabulary: weights, activations, cache  |

A weight's place follows from its path by the first rule that matches: those of
the modules that hold it (`sharding_rules`, a family's own), then `RULES`. The
optimiser's arrays follow their weights. Axes that do not divide a dimension are
left out there. Because rules go by names, models need no annotations; all that
they call is `constrain`, which does nothing on one device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import (
  AbstractDevice,
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
  use_abstract_mesh,
)

from tensorar_jax.parallel import weights as weights_lib

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # what splits a batch
HEADS = (ROWS, "tensor")  # the first axes of queries, keys and values
SPLIT = ("tensor", "fsdp")  # both on one dimension of a weight
GATHERED = "gathered"
VECTORS = r"scale|bias|gain|pad|offsets|queries"  # the ends of their paths

# (the end of a path, the axes of the last dimensions); the others are whole.
Rules = tuple[tuple[str, tuple[Any, ...]], ...]
RULES: Rules = (
  # Into heads and hidden units, and out of them: one sum over `tensor` a pair.
  (r"(qkv|query|key|value|gate|up)/kernel", ("fsdp", "tensor")),
  (r"(out|down)/kernel", ("tensor", "fsdp")),
  (r"(head|heads/\d+)/kernel", ("fsdp", "tensor")),
  # By width, which every size has a nice number of, and vocabularies not.
  (r"embedding|codebook", (SPLIT,)),
  # The other projections and convolutions, by what they put out.
  (r"kernel", ("fsdp",)),
  (VECTORS, ("fsdp",)),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The size of each axis; one of them may be -1, the devices that are left."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self):
    sizes = dataclasses.astuple(self)
    if min(sizes) < -1 or 0 in sizes or sizes.count(-1) > 1:
      raise ValueError(
        f"mesh={dict(zip(AXES, sizes))}: expected sizes of 1 or more, of which"
        " one may be -1, for the devices that are left."
      )

  def sizes(self, devices: int) -> tuple[int, int, int]:
    """The axes over so many devices; ValueError if they do not use them all."""
    sizes = dataclasses.astuple(self)
    known = math.prod(size for size in sizes if size > 0)
    data, fsdp, tensor = (
      devices // known if size < 0 else size for size in sizes
    )
    if data * fsdp * tensor != devices:
      raise ValueError(
        f"mesh={dataclasses.asdict(self)} does not fit {devices} devices:"
        " expected sizes whose product is that. Set config.mesh, or leave one"
        " axis at -1."
      )
    return data, fsdp, tensor


# --- meshes ------------------------------------------------------------------


def make_mesh(
  config: MeshConfig = MeshConfig(), devices: Sequence | None = None
) -> Mesh:
  """Makes a mesh over all devices of all processes, or over those given."""
  devices = jax.devices() if devices is None else devices
  array = mesh_utils.create_device_mesh(
    config.sizes(len(devices)), devices, allow_split_physical_axes=True
  )
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh(config: MeshConfig = MeshConfig()) -> Mesh:
  """Makes a mesh of this process's devices: `config` as far as it fits."""
  devices = jax.local_devices()
  tensor = math.gcd(max(config.tensor, 0), len(devices))
  fsdp = math.gcd(max(config.fsdp, 0), len(devices) // tensor)
  return make_mesh(MeshConfig(-1, fsdp, tensor), devices)


def row_parts(mesh: Mesh | AbstractMesh) -> int:
  """Returns into how many parts the rows of a batch are split."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def check_batch(
  mesh: Mesh | AbstractMesh, batch_size: int, accumulate: int = 1
) -> None:
  """ValueError unless the mesh splits each part of a global batch evenly."""
  if batch_size % (row_parts(mesh) * accumulate):
    raise ValueError(
      f"train.batch_size={batch_size} on a mesh of {dict(mesh.shape)}: expected"
      f" a multiple of data * fsdp = {row_parts(mesh)}, times"
      f" train.accumulate={accumulate}. Change one of them."
    )


# --- weights and what follows them -------------------------------------------


def specs(model: nnx.Module) -> dict[str, PartitionSpec]:
  """The axes of every weight by its path, of any size; see `fit`.

  ValueError with the names of all weights that no rule claims.
  """
  of_modules = [
    ("/".join(map(str, path)), getattr(module, "sharding_rules", ()))
    for path, module in nnx.iter_modules(model)
  ]
  rules = [
    (re.compile(rf"{prefix}{'/' if prefix else ''}(.*/)?({end})"), axes)
    for prefix, module_rules in [*of_modules, ("", RULES)]
    for end, axes in module_rules
  ]
  _, params, frozen = weights_lib.split(model)
  axes_of = {
    path: next((axes for rule, axes in rules if rule.fullmatch(path)), None)
    for path in {**params, **frozen}
  }
  unclaimed = [path for path, axes in axes_of.items() if axes is None]
  if unclaimed:
    raise ValueError(
      f"no rule says how a mesh splits {unclaimed}: add them to"
      " `sharding_rules` of the module that holds them, (end of the path, axes"
      " of the last dimensions)."
    )
  return {
    path: PartitionSpec(*axes)
    for path, axes in axes_of.items()
    if axes is not None
  }


def fit(
  spec: PartitionSpec, shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
  """Extends a `spec` of the last dimensions to all, as far as axes divide them.

  An axis is left out if it does not divide its dimension (with those before).
  """
  padded = (None,) * (len(shape) - len(spec)) + tuple(spec)
  fitted = []
  for size, axes in zip(shape, padded, strict=True):
    kept = []
    for axis in _names(axes):
      parts = mesh.shape[axis]
      if parts > 1 and size % parts == 0:
        kept.append(axis)
        size //= parts
    fitted.append(tuple(kept) or None)
  return PartitionSpec(*fitted)


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
  """Returns the axes of one dimension of a spec."""
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def layout(tree: Any, model: nnx.Module, mesh: Mesh) -> Any:
  """Returns the shapes and shardings of a tree of arrays, such as a state's.

  An array whose last key is the path of a weight, and that has its shape, is
  split as the weight is; every other one is copied to all devices. `tree` holds
  arrays or `ShapeDtypeStruct`s.
  """
  _, params, frozen = weights_lib.split(model)
  shapes, weight_specs = {**params, **frozen}, specs(model)

  def with_sharding(path, leaf):
    name = getattr(path[-1], "key", None) if path else None
    spec = PartitionSpec()
    if name in weight_specs and shapes[name].shape == leaf.shape:
      spec = fit(weight_specs[name], leaf.shape, mesh)
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(with_sharding, tree)


def shardings(like: Any) -> Any:
  """Returns the shardings alone of a tree of `layout`."""
  return jax.tree.map(lambda leaf: leaf.sharding, like)


def shard(model: weights_lib.Model, mesh: Mesh) -> weights_lib.Model:
  """Puts a model's arrays on the mesh, by the rules."""
  skeleton, params, frozen = weights_lib.split(model)
  arrays = {**params, **frozen}
  return skeleton.merge(
    jax.device_put(arrays, shardings(layout(arrays, model, mesh)))
  )


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Puts a copy of a tree, an nnx module for example, on every device."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def bytes_of(tree: Any) -> tuple[int, int]:
  """Returns a tree's bytes: (on one device of this process, in all)."""
  here = total = 0
  for array in jax.tree.leaves(tree):
    if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
      here += math.prod(array.sharding.shard_shape(array.shape)) * (
        array.dtype.itemsize
      )
      total += array.nbytes
  return here, total


# --- activations -------------------------------------------------------------


def platform() -> str:
  """Returns what a program is traced for: "cpu", "gpu" or "tpu"."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return _family(device.platform if device else jax.default_backend())


def platform_of(device: Any) -> str:
  """Returns the platform of a device: "cpu", "gpu" or "tpu"."""
  return _family(device.platform)


def _family(name: str) -> str:
  return "gpu" if name in ("cuda", "rocm") else name


def as_if_plain():
  """A context in which programs are traced for one device without kernels."""
  return use_abstract_mesh(_one_device("cpu"))


def on_one_device(wanted: str, mesh: Mesh | None = None):
  """A context in which programs are traced for one device of a platform.

  By default a program is traced for the default backend. But the device may be
  one that is compiled for and not there, or one of several kinds.

  Args:
    wanted: "cpu", "gpu" or "tpu".
    mesh: that of the program's inputs, if they have one.
  """
  if wanted == platform():
    return contextlib.nullcontext()
  return use_abstract_mesh(mesh.abstract_mesh if mesh else _one_device(wanted))


def _one_device(name: str) -> AbstractMesh:
  types = (AxisType.Auto,) * len(AXES)
  device = AbstractDevice(name, None, name)
  return AbstractMesh((1,) * len(AXES), AXES, types, abstract_device=device)


def _free(mesh: AbstractMesh) -> set[str]:
  """The axes of more than one device that nobody has split by hand."""
  types = dict(zip(mesh.axis_names, mesh.axis_types))
  auto = {axis for axis in AXES if types.get(axis) == AxisType.Auto}
  return {axis for axis in auto if mesh.shape[axis] > 1}


def spec_of(x: jax.Array, *axes: Any) -> PartitionSpec:
  """Returns how the set mesh splits x, given axes for its first dimensions.

  Axes that someone has split by hand (`shard_map`) are left out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  free = _free(mesh)
  names = [_names(axis) for axis in axes] + [()] * (x.ndim - len(axes))
  kept = [tuple(axis for axis in group if axis in free) for group in names]
  return fit(PartitionSpec(*kept), x.shape, mesh)


def is_split() -> bool:
  """Whether a mesh is set that splits anything."""
  return bool(_free(jax.sharding.get_abstract_mesh()))


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
  """Splits x as `spec_of` says; without a mesh, or on one device, returns x.

  Without this the compiler would follow the weights and move activations.
  """
  if not is_split():
    return x
  return jax.lax.with_sharding_constraint(x, spec_of(x, *axes))


def gather(model: weights_lib.Model) -> weights_lib.Model:
  """Gathers a model's weights, so that none is split over `fsdp` any more.

  Stacked layers stay as they are: each is gathered when its turn comes. Left to
  itself, the compiler would now and then split activations by a weight's width,
  and XLA 0.10 has summed wrongly what was split along two axes at once. The
  results are named GATHERED for `jax.checkpoint`: the backward pass gathers
  again.
  """
  if not is_split():
    return model
  skeleton, params, frozen = weights_lib.split(model)
  weight_specs = specs(model)
  arrays = cast(dict[str, jax.Array], {**params, **frozen})  # while tracing
  for path, array in arrays.items():
    if "/stacked/" not in path:
      axes = [_without(names, "fsdp") for names in weight_specs[path]]
      axes = [None] * (array.ndim - len(axes)) + axes
      arrays[path] = checkpoint_name(constrain(array, *axes), GATHERED)
  return skeleton.merge(arrays)


def _without(axes: str | Sequence[str] | None, name: str) -> tuple[str, ...]:
  return tuple(axis for axis in _names(axes) if axis != name)


# --- batches -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Share:
  """The part of a batch that a process reads: `blocks` of `count` parts."""

  blocks: tuple[int, ...] = (0,)
  count: int = 1

  def __post_init__(self):
    if not self.blocks or not set(self.blocks) <= set(range(self.count)):
      raise ValueError(
        f"blocks={self.blocks} of count={self.count}: expected at least one, of"
        f" 0 to {self.count - 1}."
      )


def rows(mesh: Mesh) -> NamedSharding:
  """The sharding of an array with a leading batch axis."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


def share(mesh: Mesh) -> Share:
  """Returns the rows that this process's devices need, in the largest blocks.

  Processes that differ in the tensor axis alone need the same rows.
  """
  count = row_parts(mesh)
  indices = rows(mesh).addressable_devices_indices_map((count,)).values()
  starts = sorted({index[0].indices(count)[0] for index in indices if index})
  edges = [s for s in starts if s - 1 not in starts]  # where a run starts
  edges += [s + 1 for s in starts if s + 1 not in starts]  # and ends
  size = math.gcd(count, *edges)
  blocks = sorted({start // size for start in starts})
  return Share(tuple(blocks), count // size)


def global_batch(batch: Mapping, mesh: Mesh, part: Share) -> Any:
  """Makes arrays on the mesh of a tree of this process's rows on the host."""

  def to_mesh(local):
    local = np.asarray(local)
    block = len(local) // len(part.blocks)

    def read(index):
      start, stop, _ = index[0].indices(block * part.count)
      first = part.blocks.index(start // block) * block + start % block
      return local[first : first + stop - start]

    shape = (block * part.count, *local.shape[1:])
    return jax.make_array_from_callback(shape, rows(mesh), read)

  return jax.tree.map(to_mesh, batch)
