"""Where the time of a training run goes: steps, input, compilation.

| scalar                 | over the steps since the last row of the log        |
| ---------------------- | --------------------------------------------------- |
| `step_seconds`         | wall time a step; includes logs and checkpoints    |
| `tokens_per_second`    | image tokens of the global batch                    |
| `images_per_second`    | the same in images                                  |
| `tflops_per_second`    | model TFLOP/s of all devices together, see `flops`  |
| `mfu`                  | its share of the chips' peak; for known chips       |
| `data_wait`            | share of the time that the devices lacked a batch   |

The host runs ahead of the devices: it fetches the next batch while a step runs,
so a fetch costs nothing until that step has ended. A thread notes when each
step ends; the rest of the fetch from then on counts as waiting. (A fetch that
never releases Python's lock hides up to 5 ms of it, the time between two
switches of thread.) The first call, which compiles, is timed separately.
"""

from __future__ import annotations

import pathlib
import re
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
from absl import logging

from tensorar_jax.parallel import chips, processes

STARVED = 0.05  # the share of waiting that is worth a warning
JUDGED_SECONDS = 1.0  # no warning after shorter intervals, which vary by chance

Steps = tuple[int, int]  # the first and the last, counted from this start


def parse_profile(text: str | None) -> Steps | None:
  """Reads the steps of --profile=FIRST:LAST; None gives None."""
  if text is None:
    return None
  match = re.fullmatch(r"(\d+):(\d+)", text)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last:
    raise ValueError(
      f"--profile={text}: expected FIRST:LAST, two steps counted from this"
      " start of training, as 10:12; step 1 compiles."
    )
  return first, last


class Trace:
  """Records some steps, from the first to the last, into a folder.

  Without steps, or in any but the first process, it does nothing.
  """

  def __init__(self, folder: pathlib.Path, steps: Steps | None = None):
    self._first, self._last = 0, 0
    if steps and processes.is_first():
      self._first, self._last = steps
    self._folder, self._runs = folder, False

  def before(self, step: int, newest: Any) -> None:
    """Is called before a batch is fetched; `newest` is the last result."""
    if step == self._first:
      jax.block_until_ready(newest)
      jax.profiler.start_trace(str(self._folder))
      self._runs = True

  def after(self, step: int, result: Any) -> None:
    """Is called when a step that makes `result` has been dispatched."""
    if step == self._last:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Ends the trace, if it runs, and writes it."""
    if self._runs:
      jax.profiler.stop_trace()
      logging.info("the trace is in %s", self._folder)
    elif self._first:
      logging.warning("nothing traced: no step %d in this start", self._first)
    self._first, self._runs = 0, False


class Meter:
  """Fetches batches, runs steps, and times both without delaying them.

  Args:
    folder: of the stage.
    train_step: (state, context, batch) -> (state, scalars) with a "loss".
    count_flops: the same arguments -> model FLOPs of the step.
    profile: steps to trace into `<folder>/profile`.
    dtype: of the arrays that are multiplied; chips have a peak for each.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    train_step: Callable,
    count_flops: Callable[..., int],
    profile: Steps | None = None,
    dtype: str = "float32",
  ):
    self._dtype = dtype
    self._name, self._train_step = folder.name, train_step
    self._count_flops = count_flops
    self._trace = Trace(folder / "profile", profile)
    self._watcher = futures.ThreadPoolExecutor(1, "end of step")
    self._loss: Any = None  # of the newest step
    self._end: futures.Future | None = None  # the time at which it ended
    self._flops: int | None = None
    self._steps = 0
    self._mark = (0.0, 0)  # time and steps at the last reading
    self._waited = 0.0  # seconds since then
    self._warned = STARVED / 2

  def fetch(self, read: Callable[[], Any]) -> Any:
    """Returns the batch of `read()`."""
    self._trace.before(self._steps + 1, self._loss)
    begin = time.monotonic()
    with jax.profiler.TraceAnnotation("fetch"):
      batch = read()
    end = time.monotonic()
    if self._end and self._end.done():
      self._waited += max(end - max(begin, self._end.result()), 0.0)
    return batch

  def step(self, state: Any, context: Any, batch: Any) -> tuple[Any, dict]:
    """Starts a step and returns its (state, scalars), not yet computed."""
    run = self._train_step if self._steps else self._first_step
    self._steps += 1
    with jax.profiler.StepTraceAnnotation("train", step_num=self._steps):
      state, scalars = run(state, context, batch)
    self._loss = scalars["loss"]
    self._end = self._watcher.submit(_end_of, self._loss)
    self._trace.after(self._steps, self._loss)
    return state, scalars

  def _first_step(self, state, context, batch):
    try:
      self._flops = self._count_flops(state, context, batch)
      size = f"{self._flops / 1e12:.4g} model TFLOP"
    except (TypeError, ValueError) as error:
      # An error of the step itself comes again in the next lines.
      size = f"FLOPs that cannot be counted ({error})"
    begin = time.monotonic()
    result = self._train_step(state, context, batch)
    self._mark = time.monotonic(), 0
    seconds = self._mark[0] - begin
    logging.info("%s: compiled in %.1f s; %s a step", self._name, seconds, size)
    return result

  def read(self, images: int, tokens: int) -> dict[str, float]:
    """Returns the scalars above since the last reading; warns of slow input.

    Is called when the newest step has ended.

    Args:
      images: of one global batch.
      tokens: of one global batch.
    """
    now, (then, before) = time.monotonic(), self._mark
    count = self._steps - before
    seconds = (now - then) / count
    data_wait = self._waited / (now - then)
    self._mark, self._waited = (now, self._steps), 0.0
    speeds = {
      "step_seconds": seconds,
      "tokens_per_second": tokens / seconds,
      "images_per_second": images / seconds,
      "data_wait": data_wait,
    }
    if self._flops:
      speeds["tflops_per_second"] = self._flops / seconds / 1e12
      chip = chips.of(jax.devices()[0])
      if chip:
        products = chips.products_of(self._dtype, jax.default_backend())
        peak = chip.peak(products) * jax.device_count()
        speeds["mfu"] = self._flops / seconds / peak
    if now - then >= JUDGED_SECONDS:
      self._warn(data_wait, count)
    return speeds

  def _warn(self, data_wait, count):
    """Warns of slow input: once, and again whenever it is twice as bad."""
    if data_wait < max(STARVED, 2 * self._warned):
      return
    self._warned = data_wait
    logging.warning(
      "%s: input is too slow: process %d had no batch for %.0f %% of the time"
      " of the last %d steps. Make the tokens beforehand (--mode=tokenize),"
      " put the data on a faster disk, or give the process more CPU cores;"
      " what the time goes into shows --profile=FIRST:LAST.",
      self._name,
      jax.process_index(),
      100 * data_wait,
      count,
    )

  def close(self) -> None:
    """Ends the thread, and a trace that still runs."""
    self._watcher.shutdown(wait=False, cancel_futures=True)
    self._trace.close()


def _end_of(loss: Any) -> float:
  """Waits for a step and returns the time at which it ended."""
  jax.block_until_ready(loss)
  return time.monotonic()
