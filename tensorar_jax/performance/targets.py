"""Devices to compile for, by name: local ones, or chips from a data sheet.

XLA's compilers know TPU slices by name, and GPUs by a description. The
compilers come in separate packages, which the extra `compile` installs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from tensorar_jax.parallel import chips

GPUS_OF_A_HOST = 8
# JAX's plugins, each with the package that has ptxas and libdevice for it.
COMPILERS = {
  "jax_cuda13_plugin": "nvidia.cu13",
  "jax_cuda12_plugin": "nvidia.cuda_nvcc",
}
# What the compiler needs to know, from NVIDIA's tuning guides and data sheets.
GPUS = {
  "a100": dict(major=8, cores=108, shared=164, l2=40, clock=1.41),
  "h100": dict(major=9, cores=132, shared=228, l2=50, clock=1.98),
  "h200": dict(major=9, cores=132, shared=228, l2=50, clock=1.98),
}


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices, present or not, and their chip; None if its limits are unknown."""

  name: str
  devices: Sequence
  chip: chips.Chip | None


def stay_off_devices(target: str) -> None:
  """Keeps JAX from looking for accelerators; call it before JAX starts one."""
  if target != "here":
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU host to query
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no device is in use


def find(name: str) -> Target:
  """Returns a target such as v5e:4x4, h100:8 or `here`; or ValueError."""
  if name == "here":
    return Target(name, jax.devices(), chips.of(jax.devices()[0]))
  kind, _, size = name.partition(":")
  form = r"\d+" if kind in GPUS else r"\d+(x\d+)+"
  if kind not in chips.CHIPS or not re.fullmatch(form, size):
    raise ValueError(
      f"--target={name}: expected `here`, or a chip of"
      f" {sorted(chips.CHIPS)} and how many, as v5e:4x4, v5p:2x2x2 or"
      " h100:8."
    )
  topology = _gpus if kind in GPUS else _tpus
  try:
    devices = topology(name, kind, size).devices
  except (RuntimeError, ValueError, NotImplementedError) as error:
    reason = str(error).splitlines()[0]
    raise ValueError(f"--target={name} is not available: {reason}") from error
  return Target(name, devices, chips.CHIPS[kind])


def _folders(module: str) -> list[str]:
  """Returns where a package is installed; nowhere if it is not."""
  try:
    spec = importlib.util.find_spec(module)
  except ModuleNotFoundError:  # the parent package is missing
    spec = None
  return [*(spec.submodule_search_locations or ())] if spec else []


def _missing(module: str, target: str) -> ValueError:
  return ValueError(
    f"{target} needs the compiler of that hardware, {module}: pip install"
    " 'tensorar_jax[compile]'"
  )


def _tpus(name, kind, size):
  if not _folders("libtpu"):
    raise _missing("libtpu", name)
  # The runtime presents both cores of a v4 chip as one device.
  options = {"chip_config_name": "megacore"} if kind == "v4" else {}
  return topologies.get_topology_desc(
    platform="tpu", topology_name=name, **options
  )


def _gpus(name, kind, size):
  plugin = next(filter(_folders, COMPILERS), None)
  if plugin is None:
    raise _missing(" or ".join(COMPILERS), name)
  compiler = COMPILERS[plugin]
  # PyTorch has other parts of CUDA 13 in the same folder.
  places = [pathlib.Path(folder, "bin/ptxas") for folder in _folders(compiler)]
  if not shutil.which("ptxas") and not any(p.exists() for p in places):
    raise _missing(compiler, name)
  count = int(size)
  hosts = max(1, count // GPUS_OF_A_HOST)
  return topologies.get_topology_desc(
    platform="cuda",
    target_config=_gpu_description(kind),
    topology=f"1x{hosts}x{count // hosts}",
  )


def _gpu_description(kind: str) -> str:
  """Returns a GpuTargetConfigProto in text format."""
  chip, gpu = chips.CHIPS[kind], GPUS[kind]
  fields = dict(
    threads_per_block_limit=1024,
    threads_per_warp=32,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=(gpu["shared"] - 1) * 1024,
    shared_memory_per_core=gpu["shared"] * 1024,
    threads_per_core_limit=2048,
    core_count=gpu["cores"],
    fpus_per_core=64 if gpu["major"] == 8 else 128,
    block_dim_limit_x=2**31 - 1,
    block_dim_limit_y=2**16 - 1,
    block_dim_limit_z=2**16 - 1,
    memory_bandwidth=int(chip.hbm_bandwidth),
    l2_cache_size=gpu["l2"] * 2**20,
    clock_rate_ghz=gpu["clock"],
    device_memory_size=int(chip.hbm_bytes),
    registers_per_core_limit=2**16,
    registers_per_block_limit=2**16,
  )
  lines = "\n".join(f"{name}: {value}" for name, value in fields.items())
  capability = f"cuda_compute_capability {{ major: {gpu['major']} }}"
  return (
    f"gpu_device_info {{\n{lines}\n{capability}\n}}\n"
    f'platform_name: "CUDA"\ndevice_description_str: "{kind}"\n'
  )
