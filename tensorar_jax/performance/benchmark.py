"""Measures a model's speed, and how close it comes to the machine's limits.

After a warm-up, every round measures the machine's limits and then each case
once, so a slow spell of the machine affects them all. A figure is the median
over the rounds, with the minimum and maximum beside it. Ratios and shares of a
limit are computed within a round and then summarised in the same way.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from tensorar_jax.checkpoints import files, orbax_io, resumable
from tensorar_jax.experiment import saved
from tensorar_jax.experiment.schema import Stage, choose
from tensorar_jax.generation import sample_files
from tensorar_jax.method.sampling_config import DECODERS
from tensorar_jax.parallel import chips
from tensorar_jax.performance import benchmark_report as report
from tensorar_jax.performance import machine, peer_torch, traces, workloads
from tensorar_jax.performance.workloads import Case, Work
from tensorar_jax.training import logs

PARTS = ("decode", "tokenizer", "train")
PEERS = ("torch",)
TRAIN_BATCH_CPU = 4
NO_TIME = {"error": "no time was left"}
# What others read of benchmark.json.
RESULTS = {
  "cases": [
    {"name": str, "guided": bool, "batch": int, "window": int, "depth": int}
  ],
  "ratios": [{"name": str}],
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to measure, and how often.

  Attributes:
    batches: batch sizes in images, for decoding and for the tokenizer.
    windows: values of k; each runs at every batch, guided, at the first depth.
    depths: depths for the stage's window size. If that is not among `windows`,
      they apply to the smallest window above 1.
    rounds: how many times every case is timed.
    train_batch: images in a training step. None takes the config's batch size,
      or 4 on a CPU.
    parts: a selection of PARTS.
    unguided: whether the base model also runs without guidance.
    decoders: a selection of DECODERS, for the guided cases.
    rows: how many steps the parallel decoder tries at once; each runs at every
      batch and window, at the first depth.
    peer: one of PEERS, or None.
    peer_modes: a selection of `peer_torch.MODES`.
    precision: the value of --precision, for the record only; the caller has
      already applied it.
    profile: a selection of PARTS. The first case of each runs once more under
      the profiler, and the time of its kernels is recorded.
    seconds: no new case begins after this time. None runs them all.
  """

  batches: tuple[int, ...] = (1, 8)
  windows: tuple[int, ...] = (1, 2, 4, 8)
  depths: tuple[int, ...] = (1, 2, 4)
  rounds: int = 3
  train_batch: int | None = None
  parts: tuple[str, ...] = PARTS
  unguided: bool = True
  decoders: tuple[str, ...] = ("window",)
  rows: tuple[int, ...] = (4, 16)
  peer: str | None = None
  peer_modes: tuple[str, ...] = ("eager", "compile")
  precision: str | None = None
  profile: tuple[str, ...] = ()
  seconds: float | None = None

  def __post_init__(self):
    for name in ("batches", "windows", "depths", "rows"):
      values = getattr(self, name)
      if not values or min(values) < 1 or len({*values}) < len(values):
        raise ValueError(
          f"--{name}={values}: expected numbers from 1 on, each once, as 1,8."
        )
    for name in ("rounds", "train_batch"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"--{name}={value}: expected at least 1.")
    for part in self.parts:
      choose("--parts", part, list(PARTS))
    for decoder in self.decoders:
      choose("--decoders", decoder, list(DECODERS))
    for part in self.profile:
      choose("--profile", part, list(PARTS))
    for mode in self.peer_modes:
      choose("--peer_modes", mode, list(peer_torch.MODES))
    if not self.parts:
      raise ValueError(f"--parts is empty: expected some of {PARTS}.")
    if self.peer is not None:
      choose("--peer", self.peer, list(PEERS))


def plan(
  settings: Settings, stage_size: tuple[int, int], train_batch: int
) -> list[Work]:
  """Lists the cases in order; `stage_size` is the stage's (window, depth)."""
  stage_window, stage_depth = stage_size
  first, wider = settings.depths[0], [w for w in settings.windows if w > 1]
  deep = stage_window if stage_window in wider else min(wider, default=None)
  works = []
  if "decode" in settings.parts:
    for batch in settings.batches:
      for window in settings.windows:
        depths = settings.depths if window == deep else (first,)
        depths = depths if window > 1 else (1,)
        if "window" in settings.decoders:
          works += [Work("decode", batch, window, d, True) for d in depths]
        if "parallel" in settings.decoders:
          works += [
            Work("decode", batch, window, depths[0], True, rows)
            for rows in settings.rows
          ]
      if 1 in settings.windows and settings.unguided:
        works.append(Work("decode", batch, 1, 1, False))
  if "tokenizer" in settings.parts:
    works += [Work("tokenizer", batch) for batch in settings.batches]
  if "train" in settings.parts:
    windows = [w for w in settings.windows if w in (1, stage_window)]
    depths = [stage_depth if w > 1 else 1 for w in windows]
    works += [
      Work("train", train_batch, window, depth)
      for window, depth in zip(windows, depths)
    ]
  if not works:
    raise ValueError(
      f"--parts={settings.parts} with --windows={settings.windows}: nothing to"
      f" measure. Training is measured at window 1 and at the stage's window,"
      f" {stage_window}."
    )
  return works


def run(
  stages: Mapping[str, Stage],
  workdir: pathlib.Path,
  settings: Settings,
  *,
  stage: str | None = None,
  output: str | None = None,
) -> pathlib.Path:
  """Measures a stage and writes benchmark.json, .md and .png.

  Args:
    stages: the stages of an experiment; none of them needs to be trained.
    workdir: the folder that holds the folders of the stages.
    settings: what to measure.
    stage: the stage's name; by default the last one that generates images.
    output: a new folder; by default `<workdir>/benchmark/<number>`.

  Returns:
    The folder with the results.

  Raises:
    ValueError: the stage generates no images, `output` is in use, the peer is
      not installed or does not support the model, or there is nothing to
      measure.
  """
  makers = [n for n, s in stages.items() if s.objective == "tensorar"]
  if not makers or stage not in (None, *makers):
    raise ValueError(
      f"--stage={stage}: expected one that generates images, of {makers}."
    )
  name = stage or makers[-1]
  if settings.peer:
    peer_torch.check_installed()
  folder = _new_folder(output, workdir / "benchmark")
  with resumable.holding(folder):
    _check_empty(folder)
    return _run(stages[name], name, workdir, settings, folder)


def _run(
  stage: Stage,
  name: str,
  workdir: pathlib.Path,
  settings: Settings,
  folder: pathlib.Path,
) -> pathlib.Path:
  """Measures a stage in a folder that this run holds."""
  trained = (workdir / name / "checkpoints").is_dir()
  checkpoint = orbax_io.find(workdir / name) if trained else None
  loads = workloads.Workloads(stage, workdir, checkpoint)
  peer = make_peer(loads) if settings.peer else None
  record = {"stage": name, **about(stage, loads, settings, peer)}
  limit = machine.Limits(loads.backbone.dtype)
  try:
    cases = Cases(loads, settings, limit, peer)
    cases.warm_up()
    for _ in range(settings.rounds):
      cases.round()
      results = {**record, **cases.record()}
      files.write_json(folder / "benchmark.json", results)
    if settings.profile:
      results["profiles"] = cases.profiles()
      files.write_json(folder / "benchmark.json", results)
  finally:
    if peer:
      peer.close()
  report.write(folder, results)
  print(report.text(results))
  print(f"{folder}")
  return folder


def about(stage, loads, settings: Settings, peer) -> dict[str, Any]:
  """Describes the stage, the settings, the machine and the software."""
  now = datetime.datetime.now(datetime.UTC)
  dtype = loads.backbone.dtype
  return {
    "started": now.isoformat(timespec="seconds"),
    "config": saved.saved_config(dataclasses.replace(stage, source=None)),
    "weights": str(loads.checkpoint) if loads.checkpoint else "random",
    "settings": dataclasses.asdict(settings),
    "dtype": dtype,
    "products": chips.products_of(dtype, jax.default_backend()),
    "machine": machine.describe(),
    "software": sample_files.software() | (peer.about if peer else {}),
  }


def _new_folder(output: str | None, numbered: pathlib.Path) -> pathlib.Path:
  """Returns the folder for this run, which may not be there yet."""
  if output is None:
    files.remove_leftovers(numbered.glob("*/*"))
    return resumable.new_folder(numbered)
  folder = pathlib.Path(output).absolute()
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"--output={output} is a file: name a new folder.")
  return folder


def _check_empty(folder: pathlib.Path) -> None:
  """ValueError if a folder holds more than the lock of this run."""
  if others := [p for p in folder.iterdir() if p.name != ".lock"]:
    raise ValueError(
      f"{others[0]} is there already: name a new folder by --output."
    )


def make_peer(loads: workloads.Workloads) -> peer_torch.Peer:
  """Starts a peer of the stage's sizes and precision; the caller closes it."""
  cond = loads.conditioning.example()
  return peer_torch.Peer(
    peer_torch.sizes_of(loads.backbone, cond), loads.stage.sampling
  )


# --- rounds ------------------------------------------------------------------


class Cases:
  """The cases of a run, and the measurements of each."""

  def __init__(self, loads, settings: Settings, limit: machine.Limits, peer):
    self.loads, self.peer, self.settings = loads, peer, settings
    self.limit, self.limits = limit, []
    stage = loads.stage
    stage_size = stage.tensorar.window, stage.tensorar.depth
    train_batch = settings.train_batch or (
      TRAIN_BATCH_CPU
      if jax.default_backend() == "cpu"
      else stage.train.batch_size
    )
    tokens = loads.backbone.num_tokens
    if "parallel" in settings.decoders and max(settings.rows) > tokens:
      raise ValueError(
        f"--rows={settings.rows}: an image of this stage has {tokens} tokens."
        " Run at most as many rows at once."
      )
    self.works = plan(settings, stage_size, train_batch)
    self.devices = loads.mesh.size
    self.peak = machine.peak_flops(loads.backbone.dtype, self.devices)
    self.end = time.monotonic() + (settings.seconds or math.inf)
    self.cases: list[Case] = []
    self.warm: list[dict[str, Any]] = []
    self.runs: list[list[dict[str, Any]]] = []

  def warm_up(self) -> None:
    """Builds every case and runs it once."""
    for i, work in enumerate(self.works):
      logging.info("warm-up %d/%d: %s", i + 1, len(self.works), work.name)
      if self.is_over():
        not_run = Case(work, workloads.OURS, dict, lambda count: {})
        self._keep(not_run, NO_TIME)
        continue
      case = self._build(work)
      self._start(case)
      peer_can_run = work.kind == "train" or work.guided and not work.rows
      if self.peer and peer_can_run and work.window == 1:
        for mode in self.settings.peer_modes:
          logging.info("warm-up of the peer: %s, %s", work.name, mode)
          self._start(self.peer.case(case.work, mode))

  def is_over(self) -> bool:
    """Returns whether the time is up, so that no new case may begin."""
    return time.monotonic() > self.end

  def _build(self, work: Work) -> Case:
    if work.kind == "decode":
      return self.loads.decode(
        work.batch, work.window, work.depth, work.guided, work.rows
      )
    if work.kind == "tokenizer":
      return self.loads.tokenizer(work.batch)
    return self.loads.train(work.batch, work.window, work.depth)

  def _start(self, case: Case) -> None:
    # A case that does not fit or compile becomes a line of the table.
    before = machine.device_peak()
    warm: dict[str, Any]
    try:
      warm = {**case.warm_up()}
    except RuntimeError as error:
      logging.info("%s, %s: %s", case.work.name, case.program, error)
      warm = {"error": str(error).splitlines()[0]}
    peak = machine.device_peak()
    if case.program == workloads.OURS and peak != before:
      warm["device_bytes"] = peak
    self._keep(case, warm)

  def _keep(self, case: Case, warm: dict[str, Any]) -> None:
    self.cases.append(case)
    self.warm.append(warm)
    self.runs.append([])

  def round(self) -> None:
    """Measures the limits and times every case, unless the time is up."""
    if self.limits and self.is_over():
      return
    limits = self.limit.measure()
    self.limits.append({k: v * self.devices for k, v in limits.items()})
    round_number, rounds = len(self.limits), self.settings.rounds
    running = [i for i, warm in enumerate(self.warm) if "error" not in warm]
    last = {i: (self.runs[i] or [self.warm[i]])[-1]["seconds"] for i in running}
    for n, i in enumerate(running):
      case = self.cases[i]
      timing = case.time(machine.repeats(last[i]))
      self.runs[i].append(timing)
      last[i] = timing["seconds"]
      left = sum(last[j] for j in running[n + 1 :])
      left += (rounds - round_number) * sum(last.values())
      logging.info(
        "round %d/%d: %s, %s: %.4g s; ETA %s",
        round_number,
        rounds,
        case.work.name,
        case.program,
        timing["seconds"],
        logs.duration(left),
      )

  def profiles(self) -> list[dict[str, Any]]:
    """Traces one more run of each part in `settings.profile`."""
    profiles = []
    for kind in self.settings.profile:
      for case, warm in zip(self.cases, self.warm):
        ours = case.program == workloads.OURS and "error" not in warm
        if ours and case.work.kind == kind:
          traced = traces.of_run(lambda case=case: case.time(1))
          profiles.append({"name": case.work.name, **traced})
          break
    return profiles

  def record(self) -> dict[str, Any]:
    """Returns all measurements so far, with their summaries and ratios."""
    rows = [
      report.case_record(*measured, self.limits, self.peak)
      for measured in zip(self.cases, self.warm, self.runs)
    ]
    return {
      "limits": {
        key: report.summary([one[key] for one in self.limits])
        for key in self.limits[0]
      },
      "peak_flops": self.peak,
      "device_peak_bytes": machine.device_peak(),
      "cases": rows,
      "ratios": report.ratios(rows),
    }
