"""How fast a config's model is, and how far from what the machine can do.

After a warm-up all cases run round robin, the machine's limits first in every
round, so that a machine that slows down slows everything down. A figure is the
median over the rounds with the least and the largest value beside it; ratios
and shares of a limit are taken within a round, then summed up in the same way.
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

from tensorar_jax.checkpoints import files
from tensorar_jax.experiment import saved
from tensorar_jax.experiment.schema import Stage, choose
from tensorar_jax.generation import sample_files
from tensorar_jax.parallel import chips
from tensorar_jax.performance import benchmark_report as report
from tensorar_jax.performance import machine, peer_torch, traces, workloads
from tensorar_jax.performance.workloads import Case, Work
from tensorar_jax.training import logs

PARTS = ("decode", "tokenizer", "train")
PEERS = ("torch",)
TRAIN_BATCH_CPU = 4
NO_TIME = {"error": "no time was left"}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is measured, and how often.

  Attributes:
    batches: images at once, for decoding and for the tokenizer.
    windows: k; each at every batch, guided, at the first depth.
    depths: the stage's own window (if it has none, the smallest above 1) is
      measured at each of them.
    rounds: how often every case is timed.
    train_batch: images of a training step; None: the config's, on a CPU 4.
    parts: of PARTS.
    unguided: whether the base model is also run without guidance.
    peer: of PEERS, or None.
    peer_modes: of `peer_torch.MODES`.
    precision: of --precision, which is set already; here for the record.
    profile: of PARTS; one more run of the first case of each is traced, and
      what its kernels took is written down.
    seconds: after so many no further case is begun; None: all are run.
  """

  batches: tuple[int, ...] = (1, 8)
  windows: tuple[int, ...] = (1, 2, 4, 8)
  depths: tuple[int, ...] = (1, 2, 4)
  rounds: int = 3
  train_batch: int | None = None
  parts: tuple[str, ...] = PARTS
  unguided: bool = True
  peer: str | None = None
  peer_modes: tuple[str, ...] = ("eager", "compile")
  precision: str | None = None
  profile: tuple[str, ...] = ()
  seconds: float | None = None

  def __post_init__(self):
    for name in ("batches", "windows", "depths"):
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
    for part in self.profile:
      choose("--profile", part, list(PARTS))
    for mode in self.peer_modes:
      choose("--peer_modes", mode, list(peer_torch.MODES))
    if not self.parts:
      raise ValueError(f"--parts is empty: expected some of {PARTS}.")
    if self.peer is not None:
      choose("--peer", self.peer, list(PEERS))


def plan(
  settings: Settings, own: tuple[int, int], train_batch: int
) -> list[Work]:
  """The cases, in their order; `own` are the stage's (window, depth)."""
  first, wider = settings.depths[0], [w for w in settings.windows if w > 1]
  deep = own[0] if own[0] in wider else min(wider, default=None)
  works = []
  if "decode" in settings.parts:
    for batch in settings.batches:
      for window in settings.windows:
        depths = settings.depths if window == deep else (first,)
        for depth in depths if window > 1 else (1,):
          works.append(Work("decode", batch, window, depth, True))
      if 1 in settings.windows and settings.unguided:
        works.append(Work("decode", batch, 1, 1, False))
  if "tokenizer" in settings.parts:
    works += [Work("tokenizer", batch) for batch in settings.batches]
  if "train" in settings.parts:
    found = [w for w in settings.windows if w in (1, own[0])]
    depths = [own[1] if w > 1 else 1 for w in found]
    works += [Work("train", train_batch, *wd) for wd in zip(found, depths)]
  if not works:
    raise ValueError(
      f"--parts={settings.parts} with --windows={settings.windows}: nothing to"
      f" measure. Training is of the windows 1 and {own[0]}, the stage's own."
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
  """Measures a stage; the folder with benchmark.json, .md and .png.

  Args:
    stages: of an experiment; nothing of them needs to be trained.
    workdir: the folder that holds the stages'.
    settings: what to measure.
    stage: its name; by default the last one that generates images.
    output: a new folder; by default `<workdir>/benchmark/<number>`.
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
  loads = workloads.Workloads(stages[name], workdir)
  peer = make_peer(loads) if settings.peer else None
  record = {"stage": name, **about(stages[name], loads, settings, peer)}
  folder.mkdir(parents=True, exist_ok=True)
  limit = machine.Limits(loads.backbone.dtype)
  try:
    cases = Cases(loads, settings, limit, peer)
    cases.warm_up()
    for _ in range(settings.rounds):
      cases.round()
      found = {**record, **cases.record()}
      files.write_json(folder / "benchmark.json", found)
    if settings.profile:
      found["profiles"] = cases.profiles()
      files.write_json(folder / "benchmark.json", found)
  finally:
    if peer:
      peer.close()
  report.write(folder, found)
  print(report.text(found))
  print(f"{folder}")
  return folder


def about(stage, loads, settings: Settings, peer) -> dict[str, Any]:
  """What is measured, on what and with what."""
  now = datetime.datetime.now(datetime.UTC)
  dtype = loads.backbone.dtype
  return {
    "started": now.isoformat(timespec="seconds"),
    "config": saved.saved_config(dataclasses.replace(stage, source=None)),
    "settings": dataclasses.asdict(settings),
    "dtype": dtype,
    "products": chips.products_of(dtype, jax.default_backend()),
    "machine": machine.describe(),
    "software": sample_files.software() | (peer.about if peer else {}),
  }


def _new_folder(output: str | None, numbered: pathlib.Path) -> pathlib.Path:
  """A folder of this run's own."""
  if output is not None:
    folder = pathlib.Path(output).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
      raise ValueError(
        f"--output={output} is there already: name a new folder."
      )
  else:
    numbers = [int(p.name) for p in numbered.glob("*") if p.name.isdigit()]
    folder = numbered / f"{max(numbers, default=-1) + 1:03d}"
  return folder


def make_peer(loads: workloads.Workloads) -> peer_torch.Peer:
  """The peer of a stage's sizes, in JAX's precision; close it."""
  cond = loads.conditioning.example()
  return peer_torch.Peer(
    peer_torch.sizes_of(loads.backbone, cond), loads.stage.sampling
  )


# --- rounds ------------------------------------------------------------------


class Cases:
  """The cases of a run and what was measured of each."""

  def __init__(self, loads, settings: Settings, limit: machine.Limits, peer):
    self.loads, self.peer, self.settings = loads, peer, settings
    self.limit, self.limits = limit, []
    stage = loads.stage
    own = stage.tensorar.window, stage.tensorar.depth
    train_batch = settings.train_batch or (
      TRAIN_BATCH_CPU
      if jax.default_backend() == "cpu"
      else stage.train.batch_size
    )
    self.works = plan(settings, own, train_batch)
    self.devices = loads.mesh.size
    self.peak = machine.peak_flops(loads.backbone.dtype, self.devices)
    self.end = time.monotonic() + (settings.seconds or math.inf)
    self.cases: list[Case] = []
    self.warm: list[dict[str, Any]] = []
    self.runs: list[list[dict[str, Any]]] = []

  def warm_up(self) -> None:
    """Builds and runs every case for the first time."""
    for i, wanted in enumerate(self.works):
      logging.info("warm-up %d/%d: %s", i + 1, len(self.works), wanted.name)
      if self.is_over():
        nothing = Case(wanted, workloads.OURS, dict, lambda count: {})
        self._keep(nothing, NO_TIME)
        continue
      case = self._build(wanted)
      self._start(case)
      alike = wanted.kind == "train" or wanted.guided
      if self.peer and alike and wanted.window == 1:
        for mode in self.settings.peer_modes:
          logging.info("warm-up of the peer: %s, %s", wanted.name, mode)
          self._start(self.peer.case(case.work, mode))

  def is_over(self) -> bool:
    """Whether no further case may begin."""
    return time.monotonic() > self.end

  def _build(self, work: Work) -> Case:
    w, sizes = work, (work.batch, work.window, work.depth)
    if work.kind == "decode":
      return self.loads.decode(*sizes, w.guided)
    if work.kind == "tokenizer":
      return self.loads.tokenizer(w.batch)
    return self.loads.train(*sizes)

  def _start(self, case: Case) -> None:
    # What does not fit or does not compile is a line of the table.
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
    """Times the limits and then every case once, if there is time for all."""
    if self.limits and self.is_over():
      return
    limits = self.limit.measure()
    self.limits.append({k: v * self.devices for k, v in limits.items()})
    at, rounds = len(self.limits), self.settings.rounds
    running = [i for i, warm in enumerate(self.warm) if "error" not in warm]
    last = {i: (self.runs[i] or [self.warm[i]])[-1]["seconds"] for i in running}
    for n, i in enumerate(running):
      case = self.cases[i]
      found = case.time(machine.repeats(last[i]))
      self.runs[i].append(found)
      last[i] = found["seconds"]
      left = sum(last[j] for j in running[n + 1 :])
      left += (rounds - at) * sum(last.values())
      logging.info(
        "round %d/%d: %s, %s: %.4g s; ETA %s",
        at,
        rounds,
        case.work.name,
        case.program,
        found["seconds"],
        logs.duration(left),
      )

  def profiles(self) -> list[dict[str, Any]]:
    """What the kernels of one more run took, of each part to be traced."""
    found = []
    for kind in self.settings.profile:
      for case, warm in zip(self.cases, self.warm):
        ours = case.program == workloads.OURS and "error" not in warm
        if ours and case.work.kind == kind:
          traced = traces.of_run(lambda case=case: case.time(1))
          found.append({"name": case.work.name, **traced})
          break
    return found

  def record(self) -> dict[str, Any]:
    """Everything measured so far, and what follows from it."""
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
