"""Stages -> metrics.json: sample every model, measure, compare.

Every model is sampled at the guidance scale that suits it best on a scan with
a seed of its own; then several seeds at that scale give mean and spread. What
has been measured is kept and not measured again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging
from flax import nnx

from tensorar_jax import build, metrics, objective, train, weights
from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.data import pipeline, sources
from tensorar_jax.evaluation import adm, samples
from tensorar_jax.noising import NoiseConfig
from tensorar_jax.sampling import SamplingConfig

SCAN_SEED = 2**20  # of the guidance scan, apart from every measured seed


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """What is measured.

  Attributes:
    classifier: the stage whose features and classes are the yardstick.
    models: the stages to compare.
    guidance: the scales of the scan.
    scan_images, num_images: images per scan point and per seed.
    seeds: how many sampling seeds.
    batch_size: images per call of the sampler.
  """

  classifier: str = "classifier"
  models: tuple[str, ...] = ()
  guidance: tuple[float, ...] = (1.0, 1.5, 2.0)
  scan_images: int = 500
  num_images: int = 1000
  seeds: int = 3
  batch_size: int = 250


@dataclasses.dataclass(frozen=True)
class Yardstick:
  """The classifier and the features of the real images."""

  classifier: nnx.Module
  train_images: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray

  def features(self, images: np.ndarray) -> np.ndarray:
    """Features [n, num_features] in batches of one compiled shape."""
    graphdef, state = nnx.split(self.classifier)
    size = min(500, len(images))
    out = []
    for start in range(0, len(images), size):
      part = images[start : start + size]
      pad = [(0, size - len(part))] + [(0, 0)] * 3
      out.append(_features(graphdef, state, np.pad(part, pad))[: len(part)])
    return np.concatenate(out)

  def measure(self, images: np.ndarray, labels: np.ndarray) -> dict:
    """Every metric of a set of images against the real training images."""
    real = self.features(self.train_images)
    fake = self.features(images)
    precision, recall = adm.precision_recall(real, fake)
    logits = self.classifier.classify(fake)
    return {
      "frechet": _frechet(real, fake),
      "accuracy": float(np.mean(np.argmax(logits, -1) == labels)),
      "precision": float(precision),
      "recall": float(recall),
    }


def _features(graphdef, state, images):
  return np.asarray(_features_jit(graphdef, state, images))


_features_jit = jax.jit(
  lambda graphdef, state, images: nnx.merge(graphdef, state).features(images),
  static_argnums=0,
)


def _frechet(real: np.ndarray, fake: np.ndarray) -> float:
  moments = []
  for features in (real, fake):
    moments.append(adm.Moments())
    moments[-1].update(features)
  return float(adm.frechet_distance(*moments))


def make_yardstick(stage: Mapping, folder: pathlib.Path) -> Yardstick:
  """The trained classifier of `folder` with the real images of its stage."""
  data = stage["data"]

  def images(split):
    source = sources.load(data["name"], split, data_dir=data.get("data_dir"))
    return pipeline.as_arrays(source)

  train_images, _ = images(data["train_split"])
  test_images, test_labels = images(data["test_split"])
  return Yardstick(build.load(folder), train_images, test_images, test_labels)


@dataclasses.dataclass(frozen=True)
class Subject:
  """One trained stage with what sampling it needs."""

  name: str
  stage: Mapping
  folder: pathlib.Path

  def load(self):
    """(model, tokenizer, conditioning)."""
    ema = self.stage["optim"].get("ema_decay", 0) > 0
    return (
      build.load(self.folder, ema=ema),
      build.frozen_tokenizer(self.stage, self.folder.parent),
      build.conditioning(self.stage["conditioning"]),
    )

  def fingerprint(self, settings: EvaluationConfig) -> str:
    """What a measurement depends on: settings, sampling, and the weights."""
    found = orbax_io.read_meta(orbax_io.find(self.folder))
    known = [
      dataclasses.asdict(settings),
      self.stage.get("sampling", {}),
      found["config"],
    ]
    text = json.dumps(known, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure_model(
  subject: Subject, yardstick: Yardstick, settings: EvaluationConfig
) -> dict:
  """The metrics of one model, from `evaluation.json` if they are there."""
  path = subject.folder / "evaluation.json"
  fingerprint = subject.fingerprint(settings)
  if path.exists():
    found = json.loads(path.read_text())
    if found["fingerprint"] == fingerprint:
      logging.info("%s: evaluated before, %s", subject.name, path)
      return found
  started = time.monotonic()
  model, tokenizer, conditioning = subject.load()
  sampling = build.call(SamplingConfig, subject.stage["sampling"], "sampling")

  def draw(scale, seed, count):
    config = dataclasses.replace(sampling, guidance=float(scale))
    labels = np.arange(count) % conditioning.num_classes
    images, drafts = [], []
    for batch in samples.generate(
      model, conditioning, labels, seed, config, settings.batch_size
    ):
      images.append(samples.decode(tokenizer, batch.tokens))
      drafts.append(np.asarray(batch.drafts))
    return np.concatenate(images), labels, np.concatenate(drafts)

  scan = {}
  for scale in settings.guidance:
    images, labels, _ = draw(scale, SCAN_SEED, settings.scan_images)
    scan[str(scale)] = yardstick.measure(images, labels)["frechet"]
    logging.info("%s: guidance %s: %.3f", subject.name, scale, scan[str(scale)])
  best = float(min(scan, key=scan.get))
  rows = []
  for seed in range(settings.seeds):
    images, labels, drafts = draw(best, seed, settings.num_images)
    rows.append(yardstick.measure(images, labels))
    logging.info("%s: seed %d: %s", subject.name, seed, rows[-1])
    if seed == 0:
      shown = 10 * conditioning.num_classes
      np.savez_compressed(
        subject.folder / "samples.npz",
        images=images[:shown],
        labels=labels[:shown],
        drafts=drafts[:shown],
      )
  result = {name: _spread([row[name] for row in rows]) for name in rows[0]}
  result["cross_entropy"] = held_out(
    subject, model, tokenizer, conditioning, yardstick
  )
  found = {
    "fingerprint": fingerprint,
    "metrics": {**result, "guidance": best},
    "guidance_scan": scan,
    "seconds": time.monotonic() - started,
  }
  orbax_io.write_json(path, found)
  return found


def held_out(subject, model, tokenizer, conditioning, yardstick) -> float:
  """Cross-entropy of the committed slot on held-out images, training noise."""
  noise = build.call(NoiseConfig, subject.stage["noise"], "noise")
  loss = build.call(objective.LossConfig, subject.stage["loss"], "loss")
  skeleton, params, frozen = weights.split(model)

  @jax.jit
  def compute(params, tokenizer, images, cond):
    tokens = tokenizer.encode(train.to_float(images))
    _, scalars = objective.tensorar_loss(
      skeleton.merge(params, frozen), cond, tokens, None, noise, loss
    )
    return scalars["ce/0"]

  total, size = 0.0, min(256, len(yardstick.test_images))
  starts = range(0, len(yardstick.test_images) - size + 1, size)
  for start in starts:
    part = slice(start, start + size)
    cond = conditioning.encode(yardstick.test_labels[part])
    images = yardstick.test_images[part]
    total += float(compute(params, tokenizer, images, cond))
  return total / len(starts)


def _spread(values: list[float]) -> dict:
  std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
  return {"mean": float(np.mean(values)), "std": std, "values": values}


def evaluate(
  stages: Mapping[str, Mapping], settings: EvaluationConfig, workdir
) -> dict:
  """Measures every model of `settings`; writes and returns metrics.json."""
  yardstick = make_yardstick(
    stages[settings.classifier], workdir / settings.classifier
  )
  measured = {}
  for name in settings.models:
    subject = Subject(name, stages[name], workdir / name)
    measured[name] = measure_model(subject, yardstick, settings)
  real = yardstick.measure(yardstick.test_images, yardstick.test_labels)
  result = {
    "models": {name: found["metrics"] for name, found in measured.items()},
    "reference": {"held-out real images": real},
    "guidance_scan": {
      n: found["guidance_scan"] for n, found in measured.items()
    },
    "seconds": _wall_times(stages, workdir, measured),
    "settings": dataclasses.asdict(settings),
    "notes": [
      "frechet, precision and recall are against the real training images, in"
      f" the features of the stage {settings.classifier!r}; accuracy is the"
      " share of samples that it takes for the class they were asked for.",
      "cross entropy is that of the committed slot on held-out images with the"
      " noise of training. A window that still shows the token lowers it"
      " without making samples better.",
    ],
  }
  orbax_io.write_json(workdir / "metrics.json", result)
  return result


def _wall_times(stages, workdir, measured) -> dict[str, float]:
  times = {}
  for name in stages:
    meta = orbax_io.read_meta(orbax_io.find(workdir / name))
    times[f"train {name}"] = meta["seconds"]
  for name, found in measured.items():
    times[f"evaluate {name}"] = found["seconds"]
  total = metrics.duration(sum(times.values()))
  logging.info("training and evaluation took %s", total)
  return times
