"""Where numbers go while training: console, TensorBoard, and `log.jsonl`."""

from __future__ import annotations

import json
import logging as py_logging
import pathlib
import re

import jax
import numpy as np
from absl import logging

from tensorar_jax.checkpoints import files


def log_to_console() -> None:
  """Prints logs, but not the libraries', as lines of a time and a message."""
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(
    py_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
  )
  # Orbax reports every file it touches, JAX every backend it does not find.
  handler.addFilter(
    lambda record: not re.search(r"orbax/|jax/_src", record.pathname)
  )


# How the console shows each speed of `throughput.Meter`, and the ETA.
SPEEDS = {
  "step_seconds": lambda value: f"{1000 * value:,.1f} ms/step",
  "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
  "images_per_second": lambda value: f"{value:,.1f} images/s",
  "tflops_per_second": lambda value: f"{value:,.3f} TFLOP/s",
  "mfu": lambda value: f"MFU {value:.1%}",
  "data_wait": lambda value: f"waiting {value:.1%}",
  "eta_seconds": lambda value: f"ETA {duration(value)}",
}


def console_line(
  stage: str, step: int, num_steps: int, scalars: dict[str, float]
) -> str:
  """Writes progress, scalars, speeds and ETA of a row on one line."""
  shown = " ".join(
    f"{name}={value:.4g}"
    for name, value in scalars.items()
    if not name.startswith(("accuracy/", "speed/"))
  )
  speeds = ", ".join(
    show(scalars[f"speed/{name}"])
    for name, show in SPEEDS.items()
    if f"speed/{name}" in scalars
  )
  share = step / num_steps
  return f"{stage} {step}/{num_steps} ({share:.0%}) {shown} | {speeds}"


class TrainLog:
  """Writes one row per log step; a resumed run continues the same files.

  `log.jsonl` holds only what training computed, so that of an interrupted run
  equals that of an uninterrupted one byte for byte. Speeds and ETA go to the
  console and to TensorBoard.
  """

  def __init__(self, folder: pathlib.Path, num_steps: int):
    # TensorBoard's own writer would install its server as well. This one
    # imports PyTorch where that is installed, which takes seconds.
    from tensorboardX import SummaryWriter

    self._path = folder / "log.jsonl"
    self._stage, self._num_steps = folder.name, num_steps
    self._events = SummaryWriter(str(folder / "tensorboard"))

  def resume(self, step: int) -> None:
    """Removes the rows after `step`, which will be computed again."""
    rows = [row for row in read_trace(self._path) if row["step"] <= step]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with files.replacing(self._path) as partial:
      partial.write_text(text)

  def write(
    self, step: int, scalars: dict[str, float], speeds: dict[str, float]
  ) -> None:
    """Writes a row; `speeds` are those of `throughput.Meter.read`."""
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **scalars}) + "\n")
    eta = speeds["step_seconds"] * (self._num_steps - step)
    speeds = {
      f"speed/{name}": value
      for name, value in {**speeds, "eta_seconds": eta}.items()
    }
    row = {**scalars, **speeds}
    for name, value in row.items():
      self._events.add_scalar(name, value, step)
    self._events.flush()
    logging.info("%s", console_line(self._stage, step, self._num_steps, row))

  def close(self) -> None:
    """Closes the files."""
    self._events.close()


class NoLog:
  """A `TrainLog` that writes nothing."""

  def resume(self, step: int) -> None:
    """Does nothing."""

  def write(
    self, step: int, scalars: dict[str, float], speeds: dict[str, float]
  ) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


def train_log(
  folder: pathlib.Path, num_steps: int, writes: bool
) -> TrainLog | NoLog:
  """Makes the log of a stage; one of several processes `writes` it."""
  return TrainLog(folder, num_steps) if writes else NoLog()


def read_trace(path: pathlib.Path) -> list[dict]:
  """Reads the complete rows of a `log.jsonl`, oldest first."""
  if not path.exists():
    return []
  lines = path.read_text().split("\n")
  remedy = "Remove this line."
  return [
    files.parse_json(line, f"{path}, line {i}", {"step": int}, remedy=remedy)
    for i, line in enumerate(lines[:-1], 1)  # a torn last line has no \n
  ]


def floats(
  pending: list[dict], step: int, folder: pathlib.Path
) -> list[dict[str, float]]:
  """Fetches the scalars of the newest steps from the devices.

  Args:
    pending: those of each step.
    step: the newest one.
    folder: of the stage, for the message.

  Raises:
    ValueError: a loss, or the norm of a gradient, is not finite.
  """
  pending = jax.device_get(pending)
  for offset, scalars in enumerate(pending):
    if not np.isfinite([scalars["loss"], scalars["grad_norm"]]).all():
      bad = step - len(pending) + 1 + offset
      raise ValueError(
        f"{folder.name}: the loss of step {bad} is {scalars['loss']}, its"
        f" gradient's norm {scalars['grad_norm']}; expected finite numbers."
        " Nothing was saved since the last checkpoint in"
        f" {folder / 'checkpoints'}. Lower optim.learning_rate or"
        " optim.clip_norm, or look at the data of that step."
      )
  return [{k: float(v) for k, v in scalars.items()} for scalars in pending]


def means(pending: list[dict[str, float]]) -> dict[str, float]:
  """Averages each scalar over some steps."""
  return {
    name: float(np.mean([scalars[name] for scalars in pending]))
    for name in pending[0]
  }


def duration(seconds: float) -> str:
  """Writes seconds for people: 45s, 3m20s, 5h07m."""
  seconds = int(round(seconds))
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m{seconds % 60:02d}s"
  return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
