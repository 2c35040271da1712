"""Kills a training run many times and checks that its results are the same.

  python -m studies.soak --config=configs/digits.py --kills=20   # or: make soak

Trains all stages of a config twice. One run is left alone. The other gets kill
-9 at random moments, half of them during a save (soon after its temporary
folder appears), and SIGTERM a few times. Then the logs must be equal byte for
byte and the last checkpoints bit for bit: weights, optimiser, average, key,
position in the data. Writes soak.json into the folder; exits with 1 if anything
differs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from tensorar_jax import paths
from tensorar_jax.checkpoints import files, orbax_io
from tensorar_jax.experiment import config_file
from tensorar_jax.parallel import preemption
from tensorar_jax.training import logs

# The most seconds after the start, after a save, and into one.
STARTING, PAUSE, INTO_SAVE = 12.0, 1.0, 0.08
ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Moment:
  """When a run is ended, and by what.

  Attributes:
    number: of the signal.
    save: the n-th save after the start of the process; 0: the start itself.
    seconds: after that.
  """

  number: int
  save: int
  seconds: float


def draw_moments(
  kills: int, terms: int, seed: int, most_saves: int = 4
) -> list[Moment]:
  """Draws moments in random order: kills in saves and elsewhere, SIGTERMs."""
  draw, moments = random.Random(seed), []
  for i in range(kills):
    save = draw.randint(1 if i % 2 == 0 else 0, most_saves)
    longest = INTO_SAVE if i % 2 == 0 else PAUSE if save else STARTING
    moments.append(Moment(signal.SIGKILL, save, draw.uniform(0, longest)))
  for _ in range(terms):
    save = draw.randint(1, most_saves)
    moments.append(Moment(signal.SIGTERM, save, draw.uniform(0, PAUSE)))
  draw.shuffle(moments)
  return moments


def train_command(config: str, workdir: pathlib.Path, *others) -> list[str]:
  """Returns the command line that trains all stages of a config file."""
  run = [sys.executable, "-m", "tensorar_jax.main", "--mode=train"]
  return [*run, f"--config={config}", f"--workdir={workdir}", *others]


def start(command: list[str], log: pathlib.Path) -> subprocess.Popen:
  """Starts the command in a process of its own that prints to a file."""
  return subprocess.Popen(
    command, cwd=ROOT, stdout=log.open("a"), stderr=subprocess.STDOUT
  )


def unfinished(workdir: pathlib.Path) -> set[pathlib.Path]:
  """Lists the folders of unfinished saves, those of ended processes too."""
  return set(workdir.glob("*/checkpoints/*.orbax-checkpoint-tmp*"))


def end_at(
  moment: Moment, command: list[str], workdir: pathlib.Path, log: pathlib.Path
) -> str:
  """Runs the command until the moment, and says how it was ended.

  Raises:
    RuntimeError: the command fails, or is done before.
  """
  before, seen = unfinished(workdir), set()
  process = start(command, log)
  while len(seen) < moment.save and process.poll() is None:
    seen |= unfinished(workdir) - before
    time.sleep(0.001)
  time.sleep(moment.seconds)
  process.send_signal(moment.number)
  code = process.wait()
  if code == preemption.EXIT_CODE and moment.number == signal.SIGTERM:
    return "SIGTERM, saved"
  if code != -moment.number:
    raise RuntimeError(
      f"exit code {code} before {moment}; see {log}. If it is 0, the run was"
      " over: take more steps, or fewer kills and saves."
    )
  if moment.number == signal.SIGTERM:
    return "SIGTERM between stages"
  if unfinished(workdir) - before:
    return "kill -9 in a save"
  return "kill -9 in training" if seen else "kill -9 before a save"


def run_to_the_end(command: list[str], log: pathlib.Path) -> None:
  """Runs the command to its end; RuntimeError if it fails."""
  if code := start(command, log).wait():
    raise RuntimeError(f"exit code {code}; see {log}")


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
  """Lists what differs in the results of two work directories."""
  stages = sorted(path.parent.name for path in a.glob("*/checkpoints"))
  different = [] if stages else [f"nothing was trained in {a}"]
  for stage in stages:
    texts = [(path / stage / "log.jsonl").read_bytes() for path in (a, b)]
    different += [f"{stage}/log.jsonl"] * (texts[0] != texts[1])
    left, right = (_bits(orbax_io.find(path / stage)) for path in (a, b))
    different += [
      f"{stage}: {name}"
      for name in sorted(left.keys() | right.keys())
      if left.get(name) != right.get(name)
    ]
    different += [f"{stage}: left {path}" for path in unfinished(b)]
  return different


def _bits(path: pathlib.Path) -> dict[str, bytes]:
  """Reads a checkpoint: every array by name, its step, the data's position."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp
  from etils import epath

  # On the host: this process may have other devices than the run had.
  on_host = ocp.RestoreArgs(restore_type=np.ndarray)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(path / "state").item_metadata.tree
    args = jax.tree.map(lambda _: on_host, tree)
    state = reader.restore(
      path / "state", args=ocp.args.PyTreeRestore(restore_args=args)
    )
  arrays = {
    jax.tree_util.keystr(name): np.asarray(leaf).tobytes()
    for name, leaf in jax.tree_util.tree_leaves_with_path(state)
  }
  data = ocp.JsonCheckpointHandler().restore(epath.Path(path / "data"))
  return {
    **arrays,
    "name": path.name.encode(),
    "data": json.dumps(data).encode(),
  }


def main(argv: list[str]) -> None:
  """Trains twice, kills one of the runs, and compares them."""
  del argv
  given = flags.FLAGS
  logs.log_to_console()
  folder = paths.local(given.folder or "") or tempfile.mkdtemp(prefix="soak")
  folder = pathlib.Path(folder).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  values = {"num_steps": given.steps, "checkpoint_every": given.save_every}
  settings = [
    f"--config.stages.{name}.train.{key}={value}"
    for name in config_file.load(given.config).stages
    for key, value in values.items()
  ]
  config = given.config
  straight, killed, log = (folder / n for n in ("straight", "killed", "log"))
  started = time.monotonic()
  run_to_the_end(train_command(config, straight, *settings), log)
  alone = time.monotonic() - started
  print(f"the run left alone: {logs.duration(alone)}", flush=True)
  command, done = train_command(config, killed, *settings), {}
  moments = draw_moments(given.kills, given.terms, given.seed)
  started = time.monotonic()
  for i, moment in enumerate(moments, 1):
    what = end_at(moment, command, killed, log)
    done[what] = done.get(what, 0) + 1
    left = (time.monotonic() - started) / i * (len(moments) - i) + alone
    print(f"{i}/{len(moments)} {what}, ETA {logs.duration(left)}", flush=True)
  run_to_the_end(command, log)
  different = differences(straight, killed)
  record = {
    "config": config,
    "interruptions": dict(sorted(done.items())),
    "different": different,
    "seconds": {"alone": alone, "killed": time.monotonic() - started},
  }
  files.write_json(folder / "soak.json", record)
  print(json.dumps(record, indent=2))
  print("DIFFERENT" if different else f"equal bit for bit; {folder}/soak.json")
  sys.exit(1 if different else 0)


if __name__ == "__main__":
  flags.DEFINE_string("config", "configs/digits.py", "As of main.")
  flags.DEFINE_integer("kills", 20, "How many kill -9.", lower_bound=0)
  flags.DEFINE_integer("terms", 5, "How many SIGTERM.", lower_bound=0)
  flags.DEFINE_integer("seed", 0, "Of the moments.")
  flags.DEFINE_integer("steps", 120, "Steps of every stage.")
  flags.DEFINE_integer("save_every", 5, "Steps between saves.")
  flags.DEFINE_string("folder", None, "A new one. Default: temporary.")
  app.run(main)
