"""How fast a config's model is, and how far from what the machine can do.

After a warm-up all cases run round robin, the machine's limits first in every
round, so that a machine that slows down slows everything down. A figure is the
median over the rounds with the least and the largest value beside it; ratios
and shares of a limit are taken within a round, then summed up in the same way.
"""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from tensorar_jax.checkpoints import files
from tensorar_jax.experiment import saved
from tensorar_jax.experiment.schema import Stage, choose
from tensorar_jax.generation import sample_files
from tensorar_jax.performance import benchmark_report as report
from tensorar_jax.performance import machine, peer_torch, workloads
from tensorar_jax.performance.workloads import Case, Work
from tensorar_jax.training import logs

PARTS = ("decode", "tokenizer", "train")
PEERS = ("torch",)
TRAIN_BATCH_CPU = 4


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
    peer: of PEERS, or None.
  """

  batches: tuple[int, ...] = (1, 8)
  windows: tuple[int, ...] = (1, 2, 4, 8)
  depths: tuple[int, ...] = (1, 2, 4)
  rounds: int = 3
  train_batch: int | None = None
  parts: tuple[str, ...] = PARTS
  peer: str | None = None

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
    if not self.parts:
      raise ValueError(f"--parts is empty: expected some of {PARTS}.")
    if self.peer is not None:
      choose("--peer", self.peer, list(PEERS))


def parse(given: Mapping[str, Any]) -> Settings:
  """Settings from the values of flags; lists are of words."""
  values = dict(given)
  for name in ("batches", "windows", "depths"):
    try:
      values[name] = tuple(map(int, given.get(name, getattr(Settings, name))))
    except ValueError as error:
      raise ValueError(
        f"--{name}={given[name]}: expected integers, as 1,8."
      ) from error
  values["parts"] = tuple(given.get("parts", PARTS))
  return Settings(**values)


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
      if 1 in settings.windows:
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
  peer = _peer(loads) if settings.peer else None
  record = {
    "stage": name,
    "started": datetime.datetime.now(datetime.UTC).isoformat(
      timespec="seconds"
    ),
    "config": saved.saved_config(
      dataclasses.replace(stages[name], source=None)
    ),
    "settings": dataclasses.asdict(settings),
    "dtype": loads.backbone.dtype,
    "machine": machine.describe(),
    "software": sample_files.software() | (peer.about if peer else {}),
  }
  folder.mkdir(parents=True, exist_ok=True)
  try:
    cases = _Cases(loads, settings, peer)
    cases.warm_up()
    for _ in range(settings.rounds):
      cases.round()
      found = {**record, **cases.record()}
      files.write_json(folder / "benchmark.json", found)
  finally:
    if peer:
      peer.close()
  report.write(folder, found)
  print(report.text(found))
  print(f"{folder}")
  return folder


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


def _peer(loads: workloads.Workloads) -> peer_torch.Peer:
  cond = loads.conditioning.example()
  return peer_torch.Peer(
    peer_torch.sizes_of(loads.backbone, cond), loads.stage.sampling
  )


# --- rounds ------------------------------------------------------------------


class _Cases:
  """The cases of a run and what was measured of each."""

  def __init__(self, loads, settings: Settings, peer):
    self.loads, self.peer, self.settings = loads, peer, settings
    stage = loads.stage
    own = stage.tensorar.window, stage.tensorar.depth
    train_batch = settings.train_batch or (
      TRAIN_BATCH_CPU
      if jax.default_backend() == "cpu"
      else stage.train.batch_size
    )
    self.works = plan(settings, own, train_batch)
    devices = loads.mesh.size
    self.limit = machine.Limits(loads.backbone.dtype)
    self.devices, self.limits = devices, []
    self.cases: list[Case] = []
    self.warm: list[dict[str, Any]] = []
    self.runs: list[list[dict[str, Any]]] = []

  def warm_up(self) -> None:
    """Builds and runs every case for the first time."""
    for i, wanted in enumerate(self.works):
      logging.info("warm-up %d/%d: %s", i + 1, len(self.works), wanted.name)
      case = self._build(wanted)
      self._start(case)
      alike = wanted.kind == "train" or wanted.guided
      if self.peer and alike and wanted.window == 1:
        for mode in peer_torch.MODES:
          logging.info("warm-up of the peer: %s, %s", wanted.name, mode)
          self._start(self.peer.case(case.work, mode))

  def _build(self, work: Work) -> Case:
    w, sizes = work, (work.batch, work.window, work.depth)
    if work.kind == "decode":
      return self.loads.decode(*sizes, w.guided)
    if work.kind == "tokenizer":
      return self.loads.tokenizer(w.batch)
    return self.loads.train(*sizes)

  def _start(self, case: Case) -> None:
    # What does not fit or does not compile is a line of the table.
    try:
      warm = case.warm_up()
    except RuntimeError as error:
      logging.info("%s, %s: %s", case.work.name, case.program, error)
      warm = {"error": str(error).splitlines()[0]}
    self.cases.append(case)
    self.warm.append(warm)
    self.runs.append([])

  def round(self) -> None:
    """Times the limits and then every case once."""
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
        *(at, rounds, case.work.name, case.program, found["seconds"]),
        logs.duration(left),
      )

  def record(self) -> dict[str, Any]:
    """Everything measured so far, and what follows from it."""
    rows = [
      report.case_record(*measured, self.limits)
      for measured in zip(self.cases, self.warm, self.runs)
    ]
    return {
      "limits": {
        key: report.summary([one[key] for one in self.limits])
        for key in self.limits[0]
      },
      "device_peak_bytes": machine.device_peak(),
      "cases": rows,
      "ratios": report.ratios(rows),
    }
