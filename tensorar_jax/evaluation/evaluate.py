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

from tensorar_jax import build, metrics, resumable, train
from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.data import pipeline, sources
from tensorar_jax.drawing import Guidance, SamplingConfig
from tensorar_jax.evaluation import diagnostics, samples, scores
from tensorar_jax.noising import NoiseConfig

SCAN_SEED = 2**20  # of the guidance scan, apart from every measured seed


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """What is measured.

  Attributes:
    classifier: the stage whose features and classes are the yardstick.
    models: the stages to compare.
    guidance: the scales of the scan; one may be a tuple, by sub-token.
    scan_images, num_images: images per scan point and per seed.
    seeds: how many sampling seeds.
    batch_size: images per call of the sampler.
    real_images: at most so many training images are the reference.
    held_out_images: at most so many test images for cross-entropies and the
      refinement diagnostics.
  """

  classifier: str = "classifier"
  models: tuple[str, ...] = ()
  guidance: tuple[Guidance, ...] = (1.0, 1.5, 2.0)
  scan_images: int = 500
  num_images: int = 1000
  seeds: int = 3
  batch_size: int = 250
  real_images: int = 10_000
  held_out_images: int = 1000

  def __post_init__(self):
    images = ("scan_images", "num_images", "held_out_images")
    for name in (*images, "seeds", "batch_size"):
      least = 10 if name in images else 1
      if getattr(self, name) < least:
        raise ValueError(
          f"evaluation.{name}={getattr(self, name)}: expected at least {least}."
        )
    if not self.models or not self.guidance:
      raise ValueError(
        f"evaluation.models={self.models}, guidance={self.guidance}: name at"
        " least one stage and one scale."
      )

  def check(self, stages: Mapping[str, Mapping]) -> None:
    """Raises ValueError unless these stages are there and can be measured."""
    for name in (self.classifier, *self.models):
      build.choose("evaluation: stage", name, stages)
      want = "classifier" if name == self.classifier else "tensorar"
      if stages[name]["objective"] != want:
        raise ValueError(
          f"evaluation: stage {name!r} trains a {stages[name]['objective']};"
          f" expected one whose objective is {want!r}."
        )
      if want == "tensorar":
        build.check_drawable(name, stages[name])


class Yardstick:
  """The classifier, and what it makes of the real images, computed once."""

  def __init__(self, classifier: nnx.Module, stage: Mapping, limit: int):
    data = stage["data"]

    def images(split):
      source = sources.load(data["name"], split, data_dir=data.get("data_dir"))
      return pipeline.as_arrays(source)

    self.classifier = classifier
    self.test_images, self.test_labels = images(data["test_split"])
    self.real = self.features(images(data["train_split"])[0][:limit])

  def features(self, images: np.ndarray) -> scores.FeatureSet:
    """`pool` [n, num_features], in batches of one compiled shape."""
    graphdef, state = nnx.split(self.classifier)
    size = min(500, len(images))
    out = []
    for start in range(0, len(images), size):
      part = images[start : start + size]
      pad = [(0, size - len(part))] + [(0, 0)] * 3
      out.append(_features(graphdef, state, np.pad(part, pad))[: len(part)])
    return scores.FeatureSet(pool=np.concatenate(out))

  def held_out(self, limit: int) -> dict[str, np.ndarray]:
    """The first test images, "image" and "label"."""
    return {
      "image": self.test_images[:limit],
      "label": self.test_labels[:limit],
    }

  def frechet(self, images: np.ndarray) -> float:
    """The Frechet distance of images to the real training images."""
    fake = self.features(images).gaussians["pool"]
    return fake.distance(self.real.gaussians["pool"])

  def measure(self, images: np.ndarray, labels: np.ndarray) -> dict:
    """Every metric of a set of images against the real training images."""
    fake = self.features(images)
    right = np.argmax(self.classifier.classify(fake.pool), -1) == labels
    found = scores.Comparison(self.real, fake).values()
    return {**found, "accuracy": float(np.mean(right))}


def _features(graphdef, state, images):
  return np.asarray(_features_jit(graphdef, state, images))


_features_jit = jax.jit(
  lambda graphdef, state, images: nnx.merge(graphdef, state).features(images),
  static_argnums=0,
)


@dataclasses.dataclass(frozen=True)
class Subject:
  """One trained stage with what sampling it needs."""

  name: str
  stage: Mapping
  folder: pathlib.Path

  def fingerprint(self, settings: EvaluationConfig, classifier: str) -> str:
    """What a measurement depends on: settings, sampling, and the weights."""
    meta = orbax_io.read_meta(orbax_io.find(self.folder))
    known = [
      {**dataclasses.asdict(settings), "models": None},
      *(self.stage.get("sampling", {}), self.stage["noise"]),
      *(classifier, meta["id"], meta.get("lineage"), meta["config"]),
    ]
    text = json.dumps(known, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Sampler:
  """A subject's model, ready to draw labelled images."""

  def __init__(self, subject: Subject, batch_size: int):
    stage, folder = subject.stage, subject.folder
    self.model = build.load_stage(stage, folder)
    self.tokenizer = build.frozen_tokenizer(stage, folder.parent)
    self.conditioning = build.conditioning(stage["conditioning"])
    section = stage.get("sampling", {})
    self.config = build.call(SamplingConfig, section, "sampling")
    self.noise = build.call(NoiseConfig, stage["noise"], "noise")
    self.batch_size = batch_size

  def draw(self, scale: Guidance, seed: int, count: int) -> dict:
    """{"images", "labels", "drafts"} of `count` samples, classes in turn."""
    config = dataclasses.replace(self.config, guidance=scale)
    labels = np.arange(count) % self.conditioning.num_classes
    images, drafts = [], []
    for batch in samples.generate(
      self.model, self.conditioning, labels, seed, config, self.batch_size
    ):
      images.append(samples.decode(self.tokenizer, batch.tokens))
      drafts.append(np.asarray(batch.drafts))
    drafts = np.concatenate(drafts)
    return dict(images=np.concatenate(images), labels=labels, drafts=drafts)

  def diagnose(self, scale: Guidance, held_out: dict[str, np.ndarray]) -> dict:
    """The refinement diagnostics at a guidance scale, on "image", "label"."""
    encode = jax.jit(lambda tok, images: tok.encode(train.to_float(images)))
    tokens = [
      encode(self.tokenizer, held_out["image"][start : start + 256])
      for start in range(0, len(held_out["image"]), 256)
    ]
    return diagnostics.measure(
      self.model,
      self.conditioning,
      {"tokens": np.concatenate(tokens), "label": held_out["label"]},
      dataclasses.replace(self.config, guidance=scale),
      self.noise,
      self.batch_size,
    )


def measure_model(
  subject: Subject,
  yardstick: Yardstick,
  settings: EvaluationConfig,
  classifier: str,
) -> dict:
  """The metrics of one model, from `evaluation.json` if they are there.

  `classifier` is the id of the yardstick's weights.
  """
  path = subject.folder / "evaluation.json"
  pictures = subject.folder / "samples.npz"
  fingerprint = subject.fingerprint(settings, classifier)
  if path.exists() and pictures.exists():
    found = json.loads(path.read_text())
    if found["fingerprint"] == fingerprint:
      logging.info("%s: evaluated before, %s", subject.name, path)
      return found
  started = time.monotonic()
  sampler = Sampler(subject, settings.batch_size)
  scan = {}
  for scale in settings.guidance:
    drawn = sampler.draw(scale, SCAN_SEED, settings.scan_images)
    scan[str(scale)] = yardstick.frechet(drawn["images"])
    logging.info("%s: guidance %s: %.3f", subject.name, scale, scan[str(scale)])
  best = min(settings.guidance, key=lambda scale: scan[str(scale)])
  rows = []
  for seed in range(settings.seeds):
    drawn = sampler.draw(best, seed, settings.num_images)
    rows.append(yardstick.measure(drawn["images"], drawn["labels"]))
    logging.info("%s: seed %d: %s", subject.name, seed, rows[-1])
    if seed == 0:
      first = 10 * sampler.conditioning.num_classes
      resumable.write_arrays(
        pictures, **{k: v[:first] for k, v in drawn.items()}
      )
  result = {name: _spread([row[name] for row in rows]) for name in rows[0]}
  held_out = yardstick.held_out(settings.held_out_images)
  refinement = sampler.diagnose(best, held_out)
  result["entropy"] = refinement["entropy"]
  result["cross_entropy"] = refinement["cross_entropy"]["training_noise"][0]
  found = {
    "fingerprint": fingerprint,
    "metrics": {**result, "guidance": best},
    "diagnostics": refinement,
    "guidance_scan": scan,
    "seconds": time.monotonic() - started,
  }
  resumable.write_json(path, found)
  return found


def _spread(values: list[float]) -> dict:
  """Mean, sample standard deviation (None for a single value), values."""
  std = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return {"mean": float(np.mean(values)), "std": std, "values": values}


def evaluate(
  stages: Mapping[str, Mapping], settings: EvaluationConfig, workdir
) -> dict:
  """Measures every model of `settings`; writes and returns metrics.json."""
  settings.check(stages)
  for name in (settings.classifier, *settings.models):
    # Also refuses a stage that is not finished.
    build.resolve(name, workdir)
  name = settings.classifier
  classifier = orbax_io.read_meta(orbax_io.find(workdir / name))["id"]
  yardstick = Yardstick(
    build.load_stage(stages[name], workdir / name),
    stages[name],
    settings.real_images,
  )
  measured = {}
  for name in settings.models:
    subject = Subject(name, stages[name], workdir / name)
    measured[name] = measure_model(subject, yardstick, settings, classifier)
  real = yardstick.measure(yardstick.test_images, yardstick.test_labels)
  result = {
    "models": {name: found["metrics"] for name, found in measured.items()},
    "reference": {"held-out real images": real},
    "diagnostics": _refinement(stages, measured),
    "guidance_scan": {
      n: found["guidance_scan"] for n, found in measured.items()
    },
    "seconds": _wall_times(stages, workdir, measured),
    "settings": dataclasses.asdict(settings),
    "notes": [
      "frechet, precision and recall are against the real training images, in"
      f" the features of the stage {settings.classifier!r}; accuracy is the"
      " share of samples that it takes for the class they were asked for.",
      "entropy is that of what a committed token is drawn from, in nats, at"
      " the chosen guidance.",
      "cross entropy is that of the committed slot on held-out images with the"
      " noise of training. A window that still shows the token lowers it"
      " without making samples better.",
    ],
  }
  resumable.write_json(workdir / "metrics.json", result)
  return result


def _refinement(stages, measured) -> dict[str, dict]:
  """The diagnostics of the models with drafts, and their parent's entropy."""
  found = {}
  for name, own in measured.items():
    parent = measured.get(stages[name]["init"])
    entropy = parent["diagnostics"]["entropy"] if parent else None
    if own["diagnostics"]["window"] > 1:
      found[name] = {**own["diagnostics"], "base_entropy": entropy}
  return found


def _wall_times(stages, workdir, measured) -> dict[str, float]:
  times = {}
  for name in stages:
    if not (workdir / name / "checkpoints").exists():
      continue
    meta = orbax_io.read_meta(orbax_io.find(workdir / name))
    times[f"train {name}"] = meta["seconds"]
  for name, found in measured.items():
    times[f"evaluate {name}"] = found["seconds"]
  total = metrics.duration(sum(times.values()))
  logging.info("training and evaluation took %s", total)
  return times
