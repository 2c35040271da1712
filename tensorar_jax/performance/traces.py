"""Sums up a profiler's trace: which kernels take the time of a run.

A trace of one decoding run has about 10 MB; only a table of it is kept.
"""

from __future__ import annotations

import collections
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

TOP = 25  # how many kernels to list


def of_run(run: Callable[[], Any]) -> dict[str, Any]:
  """Calls `run` once under the profiler; returns what `of_folder` does."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # leave out Python calls
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      run()
    return of_folder(pathlib.Path(folder))


def of_folder(folder: pathlib.Path) -> dict[str, Any]:
  """Sums up the kernels in a folder that `jax.profiler.trace` has written.

  Returns:
    {"busy_seconds", "span_seconds", "launches", "kernels"}: the total time of
    the kernels, the time from the first one's start to the last one's end, how
    many ran, and {"name", "count", "seconds"} of those that took the most time,
    longest first. On a CPU, kernels are XLA's calls, and the times of its
    threads add up.
  """
  seconds: collections.Counter = collections.Counter()
  count: collections.Counter = collections.Counter()
  first, last, busy = float("inf"), 0.0, 0.0
  for line in _lines(folder):
    for event in line.events:
      name, duration = event.name, event.duration_ns / 1e9
      seconds[name] += duration
      count[name] += 1
      busy += duration
      first = min(first, event.start_ns / 1e9)
      last = max(last, event.start_ns / 1e9 + duration)
  return {
    "busy_seconds": busy,
    "span_seconds": max(0.0, last - first),
    "launches": sum(count.values()),
    "kernels": [
      {"name": name[:120], "count": count[name], "seconds": total}
      for name, total in seconds.most_common(TOP)
    ],
  }


def _lines(folder: pathlib.Path):
  """Yields the lines of a trace that hold kernels."""
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
