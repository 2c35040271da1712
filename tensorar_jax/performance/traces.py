"""What the time of a run goes into: its kernels, from a profiler's trace.

A trace of one decoding run is some 10 MB; what is wanted of it is a table.
"""

from __future__ import annotations

import collections
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

TOP = 25  # kernels that are named


def of_run(run: Callable[[], Any]) -> dict[str, Any]:
  """Runs once under the profiler; see `of_folder`."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # the host's calls are not asked for
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      run()
    return of_folder(pathlib.Path(folder))


def of_folder(folder: pathlib.Path) -> dict[str, Any]:
  """What the devices did, of a folder that `jax.profiler.trace` has written.

  {"busy_seconds", "span_seconds", "launches", "kernels"}: time in which a
  kernel ran, from the first one's start to the last one's end, how many ran,
  and {"name", "count", "seconds"} of those that took most, longest first. On a
  CPU kernels are XLA's calls, and its threads add up.
  """
  seconds: collections.Counter = collections.Counter()
  count: collections.Counter = collections.Counter()
  first, last, busy = float("inf"), 0.0, 0.0
  for line in _lines(folder):
    for event in line.events:
      name, took = event.name, event.duration_ns / 1e9
      seconds[name] += took
      count[name] += 1
      busy += took
      first = min(first, event.start_ns / 1e9)
      last = max(last, event.start_ns / 1e9 + took)
  return {
    "busy_seconds": busy,
    "span_seconds": max(0.0, last - first),
    "launches": sum(count.values()),
    "kernels": [
      {"name": name[:120], "count": count[name], "seconds": took}
      for name, took in seconds.most_common(TOP)
    ],
  }


def _lines(folder: pathlib.Path):
  """The lines of a trace on which kernels are: a GPU's streams, say."""
  for path in sorted(folder.rglob("*.xplane.pb")):
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = [p for p in planes if p.name.startswith("/device:")]
    lines = [line for plane in devices for line in plane.lines]
    # A GPU's streams, a TPU's operations, a CPU's threads.
    streams = [line for line in lines if line.name.startswith("Stream")]
    streams = streams or [line for line in lines if line.name == "XLA Ops"]
    if not devices:
      lines = [line for plane in planes for line in plane.lines]
      streams = [line for line in lines if "tf_XLA" in line.name]
    yield from streams
