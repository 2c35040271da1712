"""Measures the machine's limits, and the time and memory of a run.

There are two limits: the FLOP/s of a large matrix product, and the bytes/s of a
read that is larger than any cache. Of a program it measures the seconds of a
run, the compile time and the memory.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tensorar_jax.parallel import chips

MATMUL = {"cpu": 2048}  # rows of the square matrices; elsewhere MATMUL_LARGE
MATMUL_LARGE = 8192
READ_BYTES = 2**30  # more than the caches of a socket
PARTS = 16  # parts of a read, so that an interrupted core can take fewer
LIMIT_SECONDS = 0.4  # the least time to spend on measuring a limit
RUN_SECONDS = 0.2  # shorter runs are timed several at a time
_STATUS = pathlib.Path("/proc/self/status")


def cores() -> int:
  """Returns how many CPU cores this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def describe() -> dict[str, Any]:
  """Describes the machine: processor, cores, devices, load average."""
  model, file = platform.processor(), pathlib.Path("/proc/cpuinfo")
  if file.exists():
    lines = file.read_text().splitlines()
    names = [line.split(":")[1] for line in lines if "model name" in line]
    model = names[0].strip() if names else model
  return {
    "processor": model,
    "cores": cores(),
    "devices": [device.device_kind for device in jax.local_devices()],
    "load_average": os.getloadavg()[0],
  }


class Limits:
  """Measures the limits of one device."""

  def __init__(self, dtype: str, once: bool = False):
    """Allocates the arrays and compiles the programs.

    Args:
      dtype: dtype of the matrices; products are summed in float32.
      once: measure on the first call only and then repeat the result. This
        saves time on a device that runs nothing else.
    """
    self._once, self._known = once, None
    on_cpu = jax.default_backend() == "cpu"
    self._rows = MATMUL.get(jax.default_backend(), MATMUL_LARGE)
    self._matrix = jnp.ones((self._rows, self._rows), dtype)
    self._product = jax.jit(
      lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32)
    )
    shape = (PARTS, READ_BYTES // 4 // PARTS)
    # On a CPU, NumPy's inner product in one thread per core reads faster than
    # XLA's reductions. The limit should be the fastest possible read.
    self._memory = np.ones(shape, np.float32) if on_cpu else jnp.ones(shape)
    self._sum = jax.jit(jnp.sum)
    self._threads = futures.ThreadPoolExecutor(cores()) if on_cpu else None
    for run in (self._multiply, self._read):
      run()  # compiles

  def _multiply(self):
    self._product(self._matrix).block_until_ready()

  def _read(self):
    if self._threads:
      list(self._threads.map(lambda part: part.dot(part), self._memory))
    else:
      self._sum(self._memory).block_until_ready()

  def measure(self) -> dict[str, float]:
    """Returns {"flops": FLOP/s, "read": bytes/s}, the best of a few runs."""
    if self._known:
      return self._known
    flops = 2 * self._rows**3 / _best(self._multiply)
    read = self._memory.nbytes / _best(self._read)
    limits = {"flops": flops, "read": read}
    if self._once:
      self._known = limits
      del self._matrix, self._memory
    return limits


def _best(run: Callable[[], object]) -> float:
  """Returns the time of the shortest of at least three runs, in seconds."""
  times: list[float] = []
  while len(times) < 3 or sum(times) < LIMIT_SECONDS:
    times.append(seconds(run))
  return min(times)


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
  """Returns the mean seconds of a run over `repeats` runs."""
  started = time.perf_counter()
  for _ in range(repeats):
    run()
  return (time.perf_counter() - started) / repeats


def repeats(run_seconds: float) -> int:
  """Returns how many runs to time together, so that clock noise is small."""
  return max(1, round(RUN_SECONDS / max(run_seconds, 1e-5)))


@contextlib.contextmanager
def compile_clock() -> Iterator[Callable[[], float]]:
  """Yields a function that returns the seconds JAX has spent compiling."""
  spent: list[float] = []

  def listen(event: str, duration_secs: float, **_):
    if event.startswith("/jax/core/compile/"):
      spent.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield lambda: sum(spent)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


# --- memory ------------------------------------------------------------------


def _status(key: str) -> int | None:
  """Returns a size in /proc/self/status in bytes; None if it is not there."""
  if not _STATUS.exists():
    return None
  lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
  return int(lines[key].split()[0]) * 1024 if key in lines else None


def resident() -> int | None:
  """Returns the memory that this process holds, in bytes; None if unknown."""
  return _status("VmRSS")


def watched(run: Callable[[], object], count: int) -> dict[str, float | None]:
  """Times `count` runs; returns {"seconds", "extra_bytes"}.

  "seconds" is the mean of the runs. "extra_bytes" is the process's peak memory
  minus what it held before, or None where the system cannot reset an earlier
  peak.
  """
  before = None
  with contextlib.suppress(OSError):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
  took = seconds(run, count)
  peak = _status("VmHWM")
  extra = None
  if before is not None and peak is not None:
    extra = max(0, peak - before)
  return {"seconds": took, "extra_bytes": extra}


def device_peak() -> int | None:
  """Returns the devices' peak memory in bytes; None if it is not reported."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks, default=None)


def peak_flops(dtype: str, devices: int) -> float | None:
  """Returns the FLOP/s of `devices` chips by the data sheet.

  The peak is for products of arrays of `dtype` at JAX's current precision. It
  is None for a chip that is not in `chips.CHIPS`.
  """
  chip = chips.of(jax.devices()[0])
  products = chips.products_of(dtype, jax.default_backend())
  return chip.peak(products) * devices if chip else None
