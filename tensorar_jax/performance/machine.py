"""What the machine can do, measured: the yardsticks of every other figure.

Two limits: how many FLOP/s a large matrix product reaches, and how many bytes/s
a read of more memory than any cache holds. And what a run of a program takes:
its seconds, what compiling it took, and how much memory it needed.
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
PARTS = 16  # of the memory to read: a core that is interrupted does fewer
LIMIT_SECONDS = 0.4  # what a measurement of a limit takes, at least
RUN_SECONDS = 0.2  # shorter runs are timed several at a time
_STATUS = pathlib.Path("/proc/self/status")


def cores() -> int:
  """The cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def describe() -> dict[str, Any]:
  """What the figures were measured on."""
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
  """Measures the limits of one device, again and again."""

  def __init__(self, dtype: str, once: bool = False):
    """`dtype` is that of the matrices; products are summed in float32.

    `once` measures the first time and then says the same: for a device that
    nobody else uses, in minutes that are few.
    """
    self._once, self._known = once, None
    on_cpu = jax.default_backend() == "cpu"
    self._rows = MATMUL.get(jax.default_backend(), MATMUL_LARGE)
    self._matrix = jnp.ones((self._rows, self._rows), dtype)
    self._product = jax.jit(
      lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32)
    )
    shape = (PARTS, READ_BYTES // 4 // PARTS)
    # NumPy's inner product in a thread for each core reads faster than XLA's
    # reductions do on a CPU, and the limit is the fastest read there is.
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
    """{"flops": FLOP/s of a product, "read": bytes/s}, the best of a few."""
    if self._known:
      return self._known
    flops = 2 * self._rows**3 / _best(self._multiply)
    read = self._memory.nbytes / _best(self._read)
    found = {"flops": flops, "read": read}
    if self._once:
      self._known = found
      del self._matrix, self._memory
    return found


def _best(run: Callable[[], object]) -> float:
  """The shortest of at least three runs, in seconds."""
  times: list[float] = []
  while len(times) < 3 or sum(times) < LIMIT_SECONDS:
    times.append(seconds(run))
  return min(times)


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
  """How long a run takes, on average over so many."""
  started = time.perf_counter()
  for _ in range(repeats):
    run()
  return (time.perf_counter() - started) / repeats


def repeats(run_seconds: float) -> int:
  """How many runs to time at once, for the clock and its noise."""
  return max(1, round(RUN_SECONDS / max(run_seconds, 1e-5)))


@contextlib.contextmanager
def compile_clock() -> Iterator[Callable[[], float]]:
  """A function that says how long JAX has traced and compiled, in seconds."""
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
  """Bytes of a line of this process's status; None where there is none."""
  if not _STATUS.exists():
    return None
  lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
  return int(lines[key].split()[0]) * 1024 if key in lines else None


def resident() -> int | None:
  """Bytes of memory that this process holds."""
  return _status("VmRSS")


def watched(run: Callable[[], object], count: int) -> dict[str, float | None]:
  """{"seconds", "extra_bytes"} of so many runs; seconds are their mean.

  The bytes are what the process holds at its peak beyond what it held before;
  None where the system cannot forget an earlier peak.
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
  """The most bytes that a device has held so far, where the backend says."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
  return max(peaks, default=None)


def peak_flops(dtype: str, devices: int) -> float | None:
  """FLOP/s of so many devices by their data sheet, if there is one.

  Of products as JAX makes them now of arrays of `dtype`.
  """
  chip = chips.of(jax.devices()[0])
  products = chips.products_of(dtype, jax.default_backend())
  return chip.peak(products) * devices if chip else None
