"""Measures the speed of one GPU and checks its results, in a few minutes.

  launch/gpu_check.sh --output=runs/gpu     # all parts; see its first lines
  python -m launch.gpu_check --part=speed --seconds=240 --output=runs/gpu

| part          | what it does                                               |
| ------------- | ---------------------------------------------------------- |
| `speed`       | guided generation, also with PyTorch; training steps       |
| `correctness` | parity tests; tokens and losses compared with a CPU's      |
| `more`        | other batches, float32, the tokenizer; kernels of two runs |
| `summary`     | writes summary.json and summary.md from all results        |

The most important measurements come first. Each result is written to
results.jsonl at once. A part that is stopped loses only the case it was
running, and the same command continues with the rest. `--tiny` does everything
with a model of a few thousand weights, on any machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from absl import logging

from launch import gpu_report
from launch.gpu_report import RESULTS
from tensorar_jax import paths

if TYPE_CHECKING:  # import JAX only after the flags are checked
  from tensorar_jax.experiment.schema import Stage

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")
FLOATS = ("bfloat16", "tensorfloat32")
# First those that no GPU has passed yet: a part may be stopped.
PARITY_TESTS = (
  "tests/tokenizers",
  "tests/backbones/janus_test.py",
  "tests/backbones/janus_units_test.py",
  "tests/backbones",
)
TRAINING_STEPS = 12

PARTS = ("speed", "correctness", "more", "summary", "tokens")


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the command line; `peer` is whether to run PyTorch too."""

  part: str
  seconds: float = 240.0
  output: str = "runs/gpu"
  tiny: bool = False
  peer: bool = True


def parse(argv: list[str]) -> Options:
  """Parses a command line; SystemExit with a message if it is invalid."""
  parser = argparse.ArgumentParser(
    description=(__doc__ or "").partition("\n")[0]
  )
  parser.add_argument("--part", choices=PARTS, required=True)
  parser.add_argument("--seconds", type=float, default=Options.seconds)
  parser.add_argument("--output", default=Options.output)
  parser.add_argument("--tiny", action="store_true")
  parser.add_argument("--nopeer", action="store_false", dest="peer")
  given = vars(parser.parse_args(argv))
  given["output"] = paths.local(given["output"])
  return Options(**given)


@dataclasses.dataclass(frozen=True)
class Group:
  """Cases that are measured in turn.

  Attributes:
    name: the group's name, by which its results are found again.
    model: a key of `stages`.
    precision: a value of --precision.
    settings: arguments of `benchmark.Settings`.
  """

  name: str
  model: str
  precision: str
  settings: dict[str, Any]


def decode(precision: str, batch: int, **settings) -> Group:
  """Plans guided generation, by the base model and with windows of 4."""
  given = dict(batches=(batch,), parts=("decode",)) | settings
  return Group(f"decode {batch} {precision}", "B", precision, given)


def peer(precision: str, batch: int, tiny: bool) -> Group:
  """Plans PyTorch and the base model in the same rounds."""
  given = dict(batches=(batch,), windows=(1,), parts=("decode",), peer="torch")
  given |= dict(peer_modes=("eager",) if tiny else ("graphs",))
  return Group(f"peer {batch} {precision}", "B", precision, given)


def train(model: str, batch: int, **settings) -> Group:
  """Plans training steps, of the base model and with windows of 4."""
  given = dict(parts=("train",), train_batch=batch) | settings
  return Group(f"train {model} {batch}", model, "bfloat16", given)


def groups(part: str, tiny: bool) -> list[Group]:
  """Lists the groups that a part measures, in order."""
  large, small = (2, 1) if tiny else (128, 1)
  if part == "speed":
    steps = 3 if tiny else 128
    both = large, small
    return [
      *(decode(p, b) for p in FLOATS for b in both),
      *(peer("bfloat16", b, tiny) for b in both),
      train("B", steps),
      train("L", steps // 2),
      *(peer("tensorfloat32", b, tiny) for b in both),
    ]
  others = (3,) if tiny else (8, 64)
  one = dict(windows=(4,), rounds=1)
  return [
    decode("float32", large),
    Group(
      "tokenizer",
      "B",
      "tensorfloat32",
      dict(batches=(small, large), parts=("tokenizer",)),
    ),
    dataclasses.replace(
      decode("bfloat16", large, **one, profile=("decode",)),
      name=f"kernels of decode {large}",
    ),
    dataclasses.replace(
      train("B", 3 if tiny else 128, **one, profile=("train",)),
      name="kernels of train B",
    ),
    *(decode(p, b) for p in FLOATS for b in others),
  ]


def stages(tiny: bool) -> dict[str, Stage]:
  """Returns the stage of each model, with windows of 4."""
  from configs import digits, llamagen_b, llamagen_l
  from tensorar_jax.experiment import parse

  if not tiny:
    made = {"B": llamagen_b, "L": llamagen_l}
    return {
      n: parse.parse(m.get_config()).stages["tensorar"] for n, m in made.items()
    }
  config = digits.get_config()
  with config.unlocked():
    config.backbone.update(num_layers=1, width=16, num_heads=2, grid=(4, 4))
    config.tokenizer.update(image_size=(4, 4))
  stage = parse.parse(config).stages["tensorar"]
  return {"B": stage, "L": stage}


# --- results -----------------------------------------------------------------


class Results:
  """The result lines of a folder; `add` returns once a line is on disk."""

  def __init__(self, folder: pathlib.Path):
    folder.mkdir(parents=True, exist_ok=True)
    self._path = folder / RESULTS

  def add(self, line: str, /, **fields) -> None:
    """Adds a line; `line` is its kind."""
    entry = {"line": line, "at": round(time.time(), 1), **fields}
    with self._path.open("a") as file:
      file.write(json.dumps(entry) + "\n")
      file.flush()
      os.fsync(file.fileno())

  def done(self) -> set[str]:
    """Returns the names of the groups that are complete."""
    lines = gpu_report.read(self._path)
    return {line["group"] for line in lines if line["line"] == "done"}


def about(tiny: bool) -> dict[str, Any]:
  """Describes the card, its driver, and the software versions."""
  import jax

  query = "--query-gpu=name,driver_version,memory.total,power.limit"
  command = ["nvidia-smi", query, "--format=csv,noheader"]
  try:
    card = subprocess.run(command, capture_output=True, text=True, timeout=20)
    card = card.stdout.strip() or None
  except (OSError, subprocess.TimeoutExpired):
    card = None
  versions = {}
  for name in PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return {
    "device": jax.devices()[0].device_kind,
    "card": card,
    "python": platform.python_version(),
    "commit": os.environ.get("COMMIT"),
    "tiny": tiny,
    "versions": versions,
  }


# --- speed -------------------------------------------------------------------


class Bench:
  """What groups share: models, the peer's process and measured limits."""

  def __init__(self, options: Options):
    self.options = options
    self._limits: dict[str, Any] = {}
    self._loads: dict[tuple[str, str], Any] = {}
    self._peer: tuple[str, Any] | None = None

  def loads(self, model: str, precision: str):
    """Returns a model's workloads."""
    from tensorar_jax.experiment.stages import with_precision
    from tensorar_jax.performance import workloads

    if (model, precision) not in self._loads:
      made = with_precision(stages(self.options.tiny), precision)
      self._loads[model, precision] = workloads.Workloads(
        made[model], pathlib.Path(self.options.output)
      )
    return self._loads[model, precision]

  def limit(self, precision: str, dtype: str):
    """Returns limits that are measured only once, to save time."""
    from tensorar_jax.performance import machine

    if precision not in self._limits:
      self._limits[precision] = machine.Limits(dtype, once=True)
    return self._limits[precision]

  def peer(self, precision: str, loads):
    """Returns the PyTorch process for a precision; starts it if needed."""
    from tensorar_jax.performance import benchmark

    if self._peer and self._peer[0] != precision:
      self.close()
    if not self._peer:
      self._peer = precision, benchmark.make_peer(loads)
    return self._peer[1]

  def close(self) -> None:
    """Ends the PyTorch process."""
    if self._peer:
      self._peer[1].close()
    self._peer = None


def measure(group: Group, bench: Bench, results: Results, seconds: float):
  """Measures a group; begins no new case after `seconds`."""
  from tensorar_jax.performance import benchmark

  rounds = 1 if bench.options.tiny else 3
  given = dict(windows=(1, 4), depths=(1,), rounds=rounds, unguided=False)
  given |= dict(precision=group.precision, seconds=seconds)
  settings = benchmark.Settings(**{**given, **group.settings})
  loads = bench.loads(group.model, group.precision)
  with_peer = settings.peer and bench.options.peer
  torch_peer = bench.peer(group.precision, loads) if with_peer else None
  limit = bench.limit(group.precision, loads.backbone.dtype)
  cases = benchmark.Cases(loads, settings, limit, torch_peer)
  same = dict(group=group.name, model=group.model, precision=group.precision)
  cases.warm_up()
  for _ in range(settings.rounds):
    cases.round()
    record = cases.record()
    shared = {key: record[key] for key in ("limits", "peak_flops")}
    for row in record["cases"]:
      results.add("case", **same, **shared, **row)
  for ratio in record["ratios"]:
    results.add("ratio", **same, **ratio)
  for profile in cases.profiles():
    results.add("profile", **same, **profile)
  errors = [row["error"] for row in record["cases"] if "error" in row]
  if not errors:
    results.add("done", **same)


def run_groups(options: Options, results: Results, end: float) -> None:
  """Measures the groups of a part until the time is up."""
  from tensorar_jax.parallel import chips

  done, bench = results.done(), Bench(options)
  try:
    for group in groups(options.part, options.tiny):
      seconds = end - time.monotonic()
      if group.name in done or seconds < 0:
        continue
      logging.info("%s: %.0f s left", group.name, seconds)
      with noted(results, group.name), chips.precision(group.precision):
        measure(group, bench, results, seconds)
  finally:
    bench.close()


class noted:
  """Records an error as a result line, so that the next group can run."""

  def __init__(self, results: Results, group: str):
    self._results, self._group = results, group

  def __enter__(self):
    self._started = time.monotonic()

  def __exit__(self, kind, error, trace) -> bool:
    took = round(time.monotonic() - self._started, 1)
    if not isinstance(error, Exception):
      self._results.add("took", group=self._group, seconds=took)
      return False
    words = f"{type(error).__name__}: {error}"[:2000]
    logging.error(
      "%s: %s", self._group, "".join(traceback.format_exception(error))
    )
    self._results.add("error", group=self._group, error=words, seconds=took)
    return True


# --- correctness -------------------------------------------------------------


def compare_tokens(results: Results, folder: pathlib.Path) -> None:
  """Samples digits here and on the CPU; the tokens must be equal.

  Products must be those of `chips.precision("float32")`.
  """
  import jax
  import numpy as np

  from configs import digits
  from tensorar_jax.experiment import build, initial_weights, parse
  from tensorar_jax.experiment.stages import with_precision
  from tensorar_jax.method import sampling
  from tensorar_jax.method.sampling_config import SamplingConfig
  from tensorar_jax.method.tensorar import TensorAR
  from tensorar_jax.parallel import sharding

  made = with_precision(parse.parse(digits.get_config()).stages, "float32")
  conditioning = build.conditioning(made["tensorar"].conditioning)
  cond = conditioning.encode(np.arange(10))
  null = conditioning.null(cond)
  key = jax.random.key(0)
  cpu = sharding.make_mesh(devices=[jax.devices("cpu")[0]])
  here = sharding.make_mesh(devices=[jax.devices()[0]])
  for name in ("base", "tensorar"):
    model = initial_weights.initial_model(
      dataclasses.replace(made[name], init=None), folder, cpu
    )
    assert isinstance(model, TensorAR)  # the stage's objective is TensorAR
    drawn = []
    for mesh in (cpu, here):
      placed = sharding.shard(model, mesh)
      rows = jax.device_put((cond, null), sharding.rows(mesh))
      config = SamplingConfig(guidance=2.0)
      out = sampling.generate(placed, rows[0], rows[1], key, config)
      drawn.append(np.asarray(out.drafts))
    different = int((drawn[0] != drawn[1]).sum())
    results.add(
      "check",
      name=f"tokens of {name}, drafts included",
      passed=drawn[0].size - different,
      failed=different,
      device=here.devices.flat[0].device_kind,
    )


def command_of(*words: str) -> list[str]:
  """Returns a command that runs a module with this interpreter."""
  return [sys.executable, "-m", *words]


def start_training(folder: pathlib.Path, backend: str, tiny: bool):
  """Starts a short training on digits; returns the process and its log.

  `backend` is for JAX_PLATFORMS; "" leaves it as it is.
  """
  workdir = folder / "work" / (backend or "here")
  workdir.mkdir(parents=True, exist_ok=True)
  steps = 2 if tiny else TRAINING_STEPS
  small = ["--config.backbone.width=16", "--config.backbone.num_layers=1"]
  command = command_of(
    "tensorar_jax.main",
    "--config=configs/digits.py",
    "--mode=train",
    "--stage=base",
    "--precision=float32",
    f"--workdir={workdir}",
    f"--config.stages.base.train.num_steps={steps}",
    "--config.train.log_every=1",
    *(small if tiny else []),
  )
  env = {**os.environ}
  if backend:
    env["JAX_PLATFORMS"] = backend
  log = (workdir / "train.log").open("w")
  process = subprocess.Popen(
    command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT
  )
  return process, workdir / "base" / "log.jsonl"


def compare_training(results: Results, runs, seconds: float) -> None:
  """Compares the losses of two runs, step by step."""
  losses = []
  for process, log in runs:
    try:
      process.wait(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
      process.kill()
    rows = gpu_report.read(log)
    losses.append([row["loss"] for row in rows])
  here, cpu = losses
  if not here or len(here) != len(cpu):
    results.add(
      "check", name="losses of digits", passed=0, failed=1, rows=losses
    )
    return
  worst = max(abs(a - b) / abs(b) for a, b in zip(here, cpu))
  results.add(
    "check",
    name="losses of digits follow the CPU's within 0.1 %",
    passed=int(worst < 1e-3),
    failed=int(worst >= 1e-3),
    largest_relative_difference=worst,
    losses=here,
    losses_of_cpu=cpu,
  )


def run_parity(
  results: Results, folder: pathlib.Path, seconds: float, tiny: bool
) -> None:
  """Runs the parity tests on this device; if stopped, counts those done."""
  tests = ["tests/training/optimizer_test.py"] if tiny else list(PARITY_TESTS)
  workers = min(8, os.cpu_count() or 1)
  chosen = "parity and not slow"
  command = command_of("pytest", *tests, "-m", chosen, "-v", "-rf")
  command += ["-p", "no:cacheprovider", "--tb=line", "-o", "addopts="]
  command += [] if tiny else ["-n", str(workers)]
  default = "cuda,cpu" if shutil.which("nvidia-smi") else "cpu"
  platforms = os.environ.get("JAX_PLATFORMS") or default
  path = folder / "parity.log"
  with path.open("w") as log:
    process = subprocess.Popen(
      command,
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": platforms},
      stdout=log,
      stderr=subprocess.STDOUT,
    )
    try:
      process.wait(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
      process.terminate()
      process.wait()
  for row in parity_rows(path.read_text(errors="replace")):
    results.add("check", **row)


def parity_rows(log: str) -> list[dict[str, Any]]:
  """Counts the outcomes of each test file in a log of pytest.

  Returns:
    {"name", "passed", "failed", "skipped", "failures"} of each file.
  """
  outcomes: dict[str, dict[str, set[str]]] = {}
  for line in log.splitlines():
    name = re.search(r"(tests/\S+\.py)::(\S+)", line)
    outcome = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
    if name and outcome:
      file = outcomes.setdefault(name[1], {})
      file.setdefault(outcome[1], set()).add(name[2])
  rows = []
  for name, tests in sorted(outcomes.items()):
    failures = tests.get("FAILED", set()) | tests.get("ERROR", set())
    rows.append(
      {
        "name": f"parity {name}",
        "passed": len(tests.get("PASSED", set()) - failures),
        "failed": len(failures),
        "skipped": len(tests.get("SKIPPED", set())),
        "failures": sorted(failures),
      }
    )
  return rows


def check_correctness(
  results: Results, folder: pathlib.Path, end: float, tiny: bool
) -> None:
  """Runs all three checks side by side, each in processes of its own."""
  left = lambda: end - time.monotonic()
  runs = [start_training(folder, backend, tiny) for backend in ("", "cpu")]
  tokens = subprocess.Popen(
    command_of("launch.gpu_check", "--part=tokens", f"--output={folder}"),
    cwd=ROOT,
  )
  try:
    with noted(results, "parity"):
      run_parity(results, folder, left() - 5, tiny)
    with noted(results, "losses"):
      compare_training(results, runs, left() - 2)
    tokens.wait(timeout=max(left(), 1.0))
  except subprocess.TimeoutExpired:
    results.add("error", group="tokens", error="no time was left")
  finally:
    for process in (tokens, *(process for process, _ in runs)):
      if process.poll() is None:
        process.kill()


# --- parts -------------------------------------------------------------------


def shrink() -> None:
  """Makes measuring the limits fast and inexact, for --tiny."""
  from tensorar_jax.performance import machine

  machine.MATMUL, machine.MATMUL_LARGE = {"cpu": 64}, 64
  machine.READ_BYTES = 2**20
  machine.LIMIT_SECONDS = machine.RUN_SECONDS = 0.0


def main(argv: list[str]) -> None:
  options = parse(argv)
  end = time.monotonic() + options.seconds
  folder = pathlib.Path(options.output).absolute()
  results = Results(folder)
  logging.set_verbosity(logging.INFO)
  logging.use_absl_handler()
  if options.tiny:
    shrink()
  if options.part == "summary":
    print(gpu_report.write(folder))
  elif options.part == "tokens":
    from tensorar_jax.parallel import chips

    with noted(results, "tokens"), chips.precision("float32"):
      compare_tokens(results, folder)
  elif options.part == "correctness":
    check_correctness(results, folder, end, options.tiny)
  else:
    results.add("about", **about(options.tiny))
    run_groups(options, results, end)


if __name__ == "__main__":
  main(sys.argv[1:])
