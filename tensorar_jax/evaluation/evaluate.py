"""Stages -> metrics.json: sample every model, measure, compare.

A scan with a seed of its own finds the guidance scale that suits a model best
(unless there is a single scale); then several seeds at that scale give mean and
spread. Measurements are kept and not made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

from tensorar_jax.checkpoints import files, orbax_io, resumable
from tensorar_jax.conditioning.conditions import ClassConditioning
from tensorar_jax.data import sources
from tensorar_jax.data.codes import TokenSource
from tensorar_jax.evaluation import diagnostics, yardsticks
from tensorar_jax.evaluation.metrics import METRICS
from tensorar_jax.evaluation.yardsticks import YARDSTICKS, Yardstick
from tensorar_jax.experiment import build, saved
from tensorar_jax.experiment.schema import EvaluationConfig, Stage
from tensorar_jax.generation import batches, guesses
from tensorar_jax.interfaces import Conditioning
from tensorar_jax.method.drawing import Guidance
from tensorar_jax.training import logs

LOCK = "evaluate.lock"  # of a work directory, beside those of its stages
SCAN_SEED = 2**20  # of the guidance scan, apart from every measured seed
RECORD = {  # what is read again of evaluation.json
  "fingerprint": str,
  "metrics": dict,
  "diagnostics": dict,
  "guidance_scan": dict,
  "seconds": float,
}
COUNTED = 2000  # training images whose tokens are counted for first guesses
SHOWN = 10  # images of a label and a seed that are kept for the pictures


@dataclasses.dataclass(frozen=True)
class Subject:
  """A checkpoint of a trained stage; `step` None is the newest."""

  name: str
  stage: Stage
  folder: pathlib.Path
  step: int | None = None

  @property
  def checkpoint(self) -> pathlib.Path:
    return saved.trained(self.folder, self.step)

  def fingerprint(self, settings: EvaluationConfig, yardstick: str) -> str:
    """A digest of all that a measurement depends on.

    `yardstick` is the identity of the yardstick that measures.
    """
    meta = orbax_io.read_meta(self.checkpoint)
    parts = [
      {**dataclasses.asdict(settings), "models": None},
      dataclasses.asdict(self.stage.sampling),
      dataclasses.asdict(self.stage.noise),
      yardstick,
      sorted(METRICS),  # a new one is measured where others were before
      meta["id"],
      meta.get("lineage"),
      meta["config"],
    ]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class LoadedSubject:
  """A subject's model with its tokenizer, ready to draw labelled images.

  `conditions` encodes the labels: by default the stage's own, of classes.
  """

  def __init__(
    self,
    subject: Subject,
    batch_size: int,
    conditions: Conditioning | None = None,
  ):
    stage, folder = subject.stage, subject.folder
    self.model = build.load_tensorar(stage, subject.checkpoint)
    self.tokenizer = build.frozen_tokenizer(stage, folder.parent)
    self.conditioning = conditions or build.conditioning(stage.conditioning)
    self.config, self.noise = stage.sampling, stage.noise
    self.batch_size, self.folder = batch_size, folder
    self.data = stage.data

  def count_tokens(self) -> None:
    """Writes how often each token occurs, for the parallel decoder.

    It counts COUNTED images of those that the stage was trained on, evenly
    spaced. Where they are gone, only guesses from marginals are not to be had.
    """
    try:
      source = sources.load(
        self.data.name, self.data.train_split, data_dir=self.data.data_dir
      )
    except (ValueError, OSError) as error:
      if self.config.first_guess == "marginals":
        raise
      logging.info("no %s is written: %s", guesses.NAME, error)
      return
    count = min(COUNTED, len(source))
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    if isinstance(source, TokenSource):
      rows = source.fetch(chosen, np.zeros(count, int))
      tokens = rows["tokens"]
    else:
      examples = [source[i] for i in chosen]
      rows = {"label": np.array([one.get("label", 0) for one in examples])}
      images = np.stack([one["image"] for one in examples])
      tokens = batches.encode(self.tokenizer, images)
    vocab_sizes, labels, classes = self.model.vocab_sizes, None, 1
    if isinstance(self.conditioning, ClassConditioning):
      labels, classes = rows["label"], self.conditioning.num_classes
    guesses.save(self.folder, tokens, vocab_sizes, labels, classes)

  def draw(
    self, scale: Guidance, seed: int, labels: Int[np.ndarray, "n"]
  ) -> dict:
    """Draws an image of each label: {"images", "labels", "drafts"}."""
    config = dataclasses.replace(self.config, guidance=scale)
    images, drafts = [], []
    for batch in batches.generate(
      self.model,
      self.conditioning,
      labels,
      seed,
      config,
      self.batch_size,
      guesses.load(self.folder, config),
    ):
      images.append(batches.decode(self.tokenizer, batch.tokens))
      drafts.append(np.asarray(batch.drafts))
    drafts = np.concatenate(drafts)
    return dict(images=np.concatenate(images), labels=labels, drafts=drafts)

  def diagnose(self, scale: Guidance, held_out: dict[str, np.ndarray]) -> dict:
    """Measures the refinement at a guidance scale, on "image" and "label"."""
    tokens = batches.encode(self.tokenizer, held_out["image"])
    return diagnostics.measure(
      self.model,
      self.conditioning,
      {"tokens": tokens, "label": held_out["label"]},
      dataclasses.replace(self.config, guidance=scale),
      self.noise,
      self.batch_size,
    )


def measure_model(
  subject: Subject, yardstick: Yardstick, settings: EvaluationConfig
) -> dict:
  """Measures one model, or reads `evaluation.json` if that is up to date."""
  path = subject.folder / "evaluation.json"
  pictures = subject.folder / "samples.npz"
  fingerprint = subject.fingerprint(settings, yardstick.identity)
  has_guesses = (
    subject.stage.sampling.first_guess != "marginals"
    or (subject.folder / guesses.NAME).exists()
  )
  if path.exists() and pictures.exists() and has_guesses:
    before = files.read_json(path, RECORD)
    if before["fingerprint"] == fingerprint:
      logging.info("%s: evaluated before, %s", subject.name, path)
      return before
  started = time.monotonic()
  conditions = yardstick.conditions(subject.stage)
  model = LoadedSubject(subject, settings.batch_size, conditions)
  model.count_tokens()
  labels = yardstick.labels(settings.num_images, settings.scan_images)
  scan = {}
  for scale in settings.guidance if len(settings.guidance) > 1 else ():
    drawn = model.draw(scale, SCAN_SEED, labels)
    scan[str(scale)] = yardstick.cost(drawn["images"], labels)
    logging.info("%s: guidance %s: %.3f", subject.name, scale, scan[str(scale)])
  best = min(settings.guidance, key=lambda scale: scan.get(str(scale), 0.0))
  labels = yardstick.labels(0, settings.num_images)
  sets, shown, num_names = [], [], len(yardstick.names)
  for seed in range(settings.seeds):
    drawn = model.draw(best, seed, labels)
    sets.append(drawn["images"])
    rows = np.flatnonzero(labels < num_names)[: SHOWN * num_names]
    shown.append({k: v[rows] for k, v in drawn.items()})
  result = yardstick.measure(sets, labels)
  means = {metric: round(row["mean"], 4) for metric, row in result.items()}
  logging.info("%s: %s", subject.name, means)
  files.write_arrays(
    pictures,
    **{k: np.concatenate([part[k] for part in shown]) for k in shown[0]},
    names=np.array(yardstick.names),
  )
  held_out = yardstick.held_out(settings.held_out_images)
  refinement = model.diagnose(best, held_out)
  result["entropy"] = refinement["entropy"]
  result["cross_entropy"] = refinement["cross_entropy"]["training_noise"][0]
  record = {
    "fingerprint": fingerprint,
    "metrics": {**result, "guidance": best},
    "diagnostics": refinement,
    "guidance_scan": scan,
    "seconds": time.monotonic() - started,
  }
  files.write_json(path, record)
  return record


def one_set(metrics: Mapping[str, Any]) -> dict[str, float]:
  """{name: value} of a model that was measured with one sampling seed."""
  return {
    name: value["values"][0] if isinstance(value, dict) else value
    for name, value in metrics.items()
  }


def evaluate(
  stages: Mapping[str, Stage],
  settings: EvaluationConfig,
  workdir: pathlib.Path,
) -> dict:
  """Measures every model of `settings`; writes and returns metrics.json.

  ValueError if another run evaluates in this work directory.
  """
  with resumable.holding(workdir, name=LOCK):
    files.remove_leftovers(workdir.iterdir())
    return _evaluate(stages, settings, workdir)


def _evaluate(
  stages: Mapping[str, Stage],
  settings: EvaluationConfig,
  workdir: pathlib.Path,
) -> dict:
  """Does so in a work directory that this run holds."""
  yardsticks.check(settings, stages)
  for name in settings.models:
    saved.resolve(name, workdir)  # refuses a stage that is not finished
  yardstick = YARDSTICKS[settings.yardstick](stages, settings, workdir)
  measured = {}
  for name in settings.models:
    subject = Subject(name, stages[name], workdir / name)
    measured[name] = measure_model(subject, yardstick, settings)
  result = {
    "models": {name: record["metrics"] for name, record in measured.items()},
    "reference": yardstick.reference(),
    "diagnostics": _refinement(stages, measured),
    "guidance_scan": {
      name: record["guidance_scan"] for name, record in measured.items()
    },
    "seconds": _wall_times(stages, workdir, measured),
    "settings": dataclasses.asdict(settings),
    "notes": [
      *yardstick.notes,
      "entropy is that of what a committed token is drawn from, in nats, at"
      " the chosen guidance.",
      "cross entropy is that of the committed slot on held-out images with the"
      " noise of training. A window that still shows the token lowers it"
      " without making samples better.",
    ],
  }
  files.write_json(workdir / "metrics.json", result)
  return result


def _refinement(stages, measured) -> dict[str, dict]:
  """The diagnostics of the models with drafts, and their parent's entropy."""
  refinement = {}
  for name, record in measured.items():
    parent = measured.get(stages[name].init)
    entropy = parent["diagnostics"]["entropy"] if parent else None
    if record["diagnostics"]["window"] > 1:
      refinement[name] = {**record["diagnostics"], "base_entropy": entropy}
  return refinement


def _wall_times(stages, workdir, measured) -> dict[str, float]:
  times = {}
  for name in stages:
    if not (workdir / name / "checkpoints").exists():
      continue
    meta = orbax_io.read_meta(orbax_io.find(workdir / name))
    times[f"train {name}"] = meta["seconds"]
  for name, record in measured.items():
    times[f"evaluate {name}"] = record["seconds"]
  total = logs.duration(sum(times.values()))
  logging.info("training and evaluation took %s", total)
  return times
