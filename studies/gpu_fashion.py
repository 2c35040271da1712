"""Compares TensorAR with a converged base, in six minutes of one GPU.

  python -m studies.gpu_fashion --prepare    # before, on any machine: minutes
  python -m studies.gpu_fashion              # on the GPU, with the folder above

`--prepare` trains the tokenizer and the classifier of configs/fashion_mnist.py.
It keeps the tokens of all images and the features of the real ones, so that the
GPU needs no data set. Then, with a base of width 256 and 6 layers:

- The base trains in rounds until the held-out loss stops falling, or its share
  of the time is over. One more round lowers the learning rate to 0. The round
  with the least held-out loss is the base.
- For each of three seeds the base goes on (`continued`), and becomes a TensorAR
  by the published recipe (`tensorar`), for equally many steps. 10,000 images of
  each are measured at the guidance that a scan chose, as in `refinement_study`.

How many steps a round and a seed have follows from the measured time of a step.
Every result is written at once to results.jsonl, summary.json and summary.md in
--output. At the end of the time a signal stops the program; the same command
continues. `--tiny` does everything with tiny models, on digits.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from configs import digits, fashion_mnist
from launch import gpu_check, gpu_report
from studies import gpu_fashion_report
from tensorar_jax import paths
from tensorar_jax.ablations import runs
from tensorar_jax.checkpoints import files, orbax_io
from tensorar_jax.data import codes, sources, tokenize
from tensorar_jax.evaluation import diagnostics, evaluate, metrics, yardsticks
from tensorar_jax.experiment import build
from tensorar_jax.experiment.parse import parse
from tensorar_jax.experiment.schema import (
  DataConfig,
  EvaluationConfig,
  OptimConfig,
  Stage,
  TrainConfig,
)
from tensorar_jax.experiment.stages import parents
from tensorar_jax.generation import batches
from tensorar_jax.interfaces import Batch
from tensorar_jax.parallel import chips
from tensorar_jax.training import logs, loop

SEEDS = 3
RECIPES = ("continued", "tensorar")
BASE_SHARE = 0.4  # of the time, for the base at most
ROUNDS = 8  # of the base at most, each an equal part of its share
FIRST_STEPS = 2000  # of the first round, which measures the time of a step
LEAST_GAIN = 0.002  # nats; a round that gains less is the last but one
# Guesses: a TensorAR's step takes so many of the base's (it has 1.5 times the
# FLOPs), and its first measurement so many of the base's (both compile).
STEP_RATIO, MEASURE_RATIO = 1.6, 1.5
LATER_RATIO = 0.4  # of a measurement that compiles nothing to one that does
MARGIN = 0.9  # of the time left is planned for
KEPT = "yardstick.npz"
REFERENCE = "reference.json"


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the command line."""

  folder: pathlib.Path
  output: pathlib.Path
  seconds: float = 345.0  # and some for the imports: 6 minutes
  prepare: bool = False
  tiny: bool = False


def parse_options(argv: Sequence[str]) -> Options:
  """Parses a command line; SystemExit with a message if it is invalid."""
  parser = argparse.ArgumentParser(
    description=(__doc__ or "").partition("\n")[0]
  )
  parser.add_argument(
    "--folder",
    default="runs/gpu_fashion",
    help="what --prepare makes, and the models",
  )
  parser.add_argument("--output", help="of the results; FOLDER/results")
  parser.add_argument("--seconds", type=float, default=Options.seconds)
  parser.add_argument("--prepare", action="store_true")
  parser.add_argument("--tiny", action="store_true")
  given = vars(parser.parse_args(argv))
  folder = pathlib.Path(paths.local(given.pop("folder")))
  output = pathlib.Path(
    paths.local(given.pop("output") or str(folder / "results"))
  )
  return Options(folder=folder, output=output, **given)


# --- what is trained and how it is measured ----------------------------------


def stages_of(tiny: bool) -> Mapping[str, Stage]:
  """Returns the stages of a config with a backbone of another size."""
  config = (digits if tiny else fashion_mnist).get_config()
  config.backbone.update(width=256, num_layers=6, num_heads=8)
  config.train.batch_size = 128
  if tiny:
    config.backbone.update(width=16, num_layers=1, num_heads=2, mlp_multiple=8)
    config.train.batch_size = 8
    config.stages.tensorar.tensorar.window = 2
    config.stages.classifier.train.update(batch_size=16, num_steps=20)
  return parse(config, name="gpu_fashion").stages


def settings_of(tiny: bool) -> EvaluationConfig:
  """Returns how every model is measured."""
  return EvaluationConfig(
    models=("base",),
    guidance=(1.5, 2.0) if tiny else (1.0, 1.25, 1.5, 2.0),
    scan_images=20 if tiny else 2000,
    num_images=40 if tiny else 10_000,
    seeds=1,
    batch_size=20 if tiny else 2000,  # one compiled shape for all
    held_out_images=20 if tiny else 1000,
  )


class Kept(yardsticks.ByClassifier):
  """Measures by what `prepare` has kept of the real images."""

  def __init__(self, stages, settings: EvaluationConfig, workdir: pathlib.Path):
    folder = workdir / settings.classifier
    self.classifier = build.load_stage(stages[settings.classifier], folder)
    self.identity = orbax_io.read_meta(orbax_io.find(folder))["id"]
    with np.load(workdir / KEPT) as kept:
      self.real = metrics.FeatureSet(pool=kept["real"])
      self.test_images, self.test_labels = kept["images"], kept["labels"]
    self.num_classes = stages["base"].conditioning.options.num_classes
    self.names = [str(label) for label in range(self.num_classes)]
    self.notes = []


def prepare(options: Options) -> None:
  """Trains tokenizer and classifier; writes tokens, features, reference."""
  folder, stages = options.folder, stages_of(options.tiny)
  settings, stage = settings_of(options.tiny), stages["base"]
  for name in ("classifier", *parents(stage).values()):
    train = dataclasses.replace(stages[name].train, keep=1)
    loop.fit(dataclasses.replace(stages[name], train=train), folder / name)
  tokenizer = build.frozen_tokenizer(stage, folder)
  for split in ("train", "test"):
    source = sources.load(stage.data.name, split, data_dir=stage.data.data_dir)
    assert isinstance(source, sources.Source)  # of images
    tokenize.tokenize(
      source,
      tokenizer,
      folder / "tokens" / split,
      recipe="center",
      image_size=stage.tokenizer.config.image_size[0],
      batch_size=256,
      shard_size=10_000,
    )
  yardstick = yardsticks.ByClassifier(stages, settings, folder)
  count, pool = settings.held_out_images, yardstick.real.pool
  assert pool is not None
  held_out = yardstick.held_out(count)
  files.write_arrays(
    folder / KEPT,
    real=np.asarray(pool),
    images=held_out["image"],
    labels=held_out["label"],
  )
  tokens = batches.encode(tokenizer, yardstick.test_images)
  decoded = batches.decode(tokenizer, tokens)
  labels = yardstick.test_labels
  reference = {
    **yardstick.reference(),
    "the same, through the tokenizer": yardstick.measure_set(decoded, labels),
  }
  files.write_json(folder / REFERENCE, reference)
  logging.info("%s is ready: %s", folder, reference)


# --- plans -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Next:
  """The next round of the base: what it goes on from, and whether it decays."""

  init: str | None
  decays: bool


def next_round(rounds: Sequence[Mapping], seconds: float) -> Next | None:
  """Returns what follows the base's rounds; None if the base is complete.

  Args:
    rounds: result lines of the rounds that are done.
    seconds: what is left of the base's share of the time.
  """
  if not rounds:
    return Next(None, decays=False)
  last = rounds[-1]
  if last["decays"]:
    return None
  late = 2 * last["seconds"] > seconds or len(rounds) >= ROUNDS - 1
  return Next(best(rounds)["group"], decays=late or converged(rounds))


def converged(rounds: Sequence[Mapping]) -> bool:
  """Says whether the held-out loss has stopped falling at a constant rate."""
  losses = [one["loss"] for one in rounds if not one["decays"]]
  return len(losses) > 1 and losses[-1] > min(losses[:-1]) - LEAST_GAIN


def best(rounds: Sequence[Mapping]) -> Mapping:
  """Returns the round with the least held-out loss."""
  return min(rounds, key=lambda one: one["loss"])


def steps_of_seed(
  rounds: Sequence[Mapping], measurement: float, seconds: float
) -> int:
  """Plans the steps that the base and TensorAR train on for, of each seed.

  Args:
    rounds: result lines of the base's rounds.
    measurement: seconds that measuring the base took.
    seconds: the time that is left for all seeds.
  """
  step = rounds[-1]["step_seconds"]
  beside = [r["seconds"] - r["steps"] * r["step_seconds"] for r in rounds]
  # The first seed's trainings compile their programs, as some rounds did.
  fixed = len(RECIPES) * (max(beside) + (SEEDS - 1) * min(beside))
  later = len(RECIPES) * SEEDS - 1
  fixed += measurement * (MEASURE_RATIO + later * LATER_RATIO)
  free = MARGIN * seconds - fixed
  return int(np.clip(free / (SEEDS * (1 + STEP_RATIO) * step), 200, 10_000))


# --- the study ---------------------------------------------------------------


class Study:
  """Trains and measures what is missing, until the time is up.

  Args:
    options: of the command line.
    end: `time.monotonic()` at the end of the time.
  """

  def __init__(self, options: Options, end: float):
    if not (options.folder / REFERENCE).exists():
      raise ValueError(
        f"{options.folder / REFERENCE} is missing: run the same command with"
        " --prepare first, where the data set is, and bring the folder here."
      )
    self.options, self.end = options, end
    self.folder, self.tiny = options.folder, options.tiny
    self.stages = stages_of(self.tiny)
    self.settings = settings_of(self.tiny)
    self.results = gpu_check.Results(options.output)

  def run(self) -> None:
    """Trains the base, then compares; writes the summary after each result."""
    backend = jax.default_backend()
    self._add(
      "about",
      **gpu_check.about(self.tiny),
      products=chips.products_of("float32", backend),
      reference=files.read_json(self.folder / REFERENCE),
    )
    rounds = self._lines("round")
    base_end = time.monotonic() + BASE_SHARE * self._left()
    while following := next_round(rounds, base_end - time.monotonic()):
      if self._left() < 0:
        return
      self._base_round(following, rounds)
      rounds = self._lines("round")
    base = best(rounds)
    if not self._do("base", base["group"], steps=0, seed=0):
      return
    (measured,) = (m for m in self._lines("model") if m["recipe"] == "base")
    if not (plans := self._lines("plan")):
      seconds = measured["measure_seconds"]
      steps = steps_of_seed(rounds, seconds, self._left())
      self._add("plan", base=base["group"], steps=4 if self.tiny else steps)
      plans = self._lines("plan")
    for seed in range(SEEDS):
      for recipe in RECIPES:
        if not self._do(recipe, plans[-1]["base"], plans[-1]["steps"], seed):
          return

  def _do(self, recipe: str, base: str, steps: int, seed: int) -> bool:
    """Trains and measures a model, unless it is done; False: the time is up."""
    group = "base" if recipe == "base" else f"{recipe}-seed{seed}"
    models = self._lines("model")
    if group in {line["group"] for line in models}:
      return True
    took = [line["seconds"] for line in models if line["recipe"] == recipe]
    if self._left() < min(took, default=0.0):
      logging.info("%s: no time is left for it", group)
      return False
    began = time.monotonic()
    name, stage = base, self.stages["base"]
    if recipe != "base":
      stage = self._on_tokens(
        self.stages[recipe],
        group,
        init=base,
        seed=seed,
        train=self._train_config(steps),
      )
      name = group
      loop.fit(stage, self.folder / name)
    trained = time.monotonic()
    subject = evaluate.Subject(name, stage, self.folder / name)
    measured = evaluate.measure_model(subject, self._yardstick, self.settings)
    now = time.monotonic()
    self._add(
      "model",
      group=group,
      recipe=recipe,
      seed=seed,
      steps=steps,
      metrics=evaluate.one_set(measured["metrics"]),
      guidance_scan=measured["guidance_scan"],
      diagnostics=measured["diagnostics"],
      measure_seconds=round(now - trained, 1),
      seconds=round(now - began, 1),
    )
    return True

  def _base_round(self, following: Next, rounds: Sequence[Mapping]) -> None:
    """Trains and records one round of the base."""
    began = time.monotonic()
    steps = 4 if self.tiny else FIRST_STEPS
    if rounds and not self.tiny:
      of_round = BASE_SHARE * self.options.seconds / ROUNDS
      steps = max(int(of_round / rounds[-1]["step_seconds"]) // 2 * 2, 200)
    number = len(rounds) + 1
    stage = self._on_tokens(
      self.stages["base"],
      f"base-{number}",
      init=following.init,
      seed=1000 * number,  # data in another order than all other stages
      optim=OptimConfig(
        learning_rate=1e-3,
        warmup_steps=min(100, steps // 2),
        schedule="cosine" if following.decays else "constant",
      ),
      train=self._train_config(steps),
    )
    loop.fit(stage, self.folder / stage.name)
    half, whole = (
      orbax_io.read_meta(orbax_io.find(self.folder / stage.name, step))
      for step in (steps // 2, steps)
    )
    self._add(
      "round",
      group=stage.name,
      init=following.init,
      decays=following.decays,
      steps=steps,
      loss=self._held_out_loss(stage),
      step_seconds=(whole["seconds"] - half["seconds"]) / (steps - steps // 2),
      seconds=round(time.monotonic() - began, 1),
    )

  def _on_tokens(self, stage: Stage, name: str, **changes: Any) -> Stage:
    """Returns a stage that trains on the tokens on disk."""
    data = DataConfig(name=f"tokens:{self.folder / 'tokens'}")
    return dataclasses.replace(stage, name=name, data=data, **changes)

  def _train_config(self, steps: int) -> TrainConfig:
    """Returns settings that keep the state in the middle, and at the end."""
    return TrainConfig(
      batch_size=self.stages["base"].train.batch_size,
      num_steps=steps,
      log_every=max(steps // 10, 1),
      checkpoint_every=max(steps // 2, 1),
    )

  def _held_out_loss(self, stage: Stage) -> float:
    """Returns the cross-entropy of all test images, in nats a token."""
    found = diagnostics.held_out(
      build.load_tensorar(stage, self.folder / stage.name),
      build.conditioning(stage.conditioning),
      self._test_tokens,
      stage.sampling,
      stage.noise,
      self.settings.batch_size,
    )
    return found["cross_entropy"]["training_noise"][0]

  @functools.cached_property
  def _test_tokens(self) -> Batch:
    source = sources.load(f"tokens:{self.folder / 'tokens'}", "test")
    assert isinstance(source, codes.TokenSource)
    positions = np.arange(len(source))
    return source.fetch(positions, np.zeros_like(positions))

  @functools.cached_property
  def _yardstick(self) -> Kept:
    return Kept(self.stages, self.settings, self.folder)

  def _left(self) -> float:
    return self.end - time.monotonic()

  def _lines(self, kind: str) -> list[dict[str, Any]]:
    """Returns the result lines of a kind, the newest of each group."""
    lines = gpu_report.read(self.options.output / gpu_report.RESULTS)
    return gpu_fashion_report.newest(lines, kind)

  def _add(self, line: str, **fields: Any) -> None:
    """Adds a result line and writes the summary anew."""
    self.results.add(line, **fields)
    gpu_fashion_report.write(self.options.output)


@contextlib.contextmanager
def stopped_at(end: float) -> Iterator[None]:
  """Sends this process SIGTERM at `time.monotonic() == end`.

  A training saves and exits then; anything else ends at once.
  """
  stop = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
  timer = threading.Timer(max(end - time.monotonic(), 0.0), stop)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def main(argv: Sequence[str]) -> None:
  """Prepares, or runs the study until the time is up."""
  began = time.monotonic()
  options = parse_options(argv)
  end = began + options.seconds
  logging.use_absl_handler()
  logs.log_to_console()
  try:
    if options.prepare:
      prepare(options)
      return
    runs.keep_programs(options.folder.absolute())
    with stopped_at(end):
      Study(options, end).run()
  except (ValueError, OSError) as error:
    if logging.vlog_is_on(1):
      raise
    sys.exit(f"error: {error}")
  print((options.output / gpu_fashion_report.PAGE).read_text())


if __name__ == "__main__":
  main(sys.argv[1:])
