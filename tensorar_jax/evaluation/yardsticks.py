"""Yardsticks: how the models of a run are measured, a class per kind of data.

A yardstick numbers the images that can be asked for (classes or prompts), and
measures how well a set of images is what was asked for.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Int, UInt8

from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.conditioning import conditions
from tensorar_jax.data import codes, pipeline, shapes, sources
from tensorar_jax.data.sources.shapes import open_shapes
from tensorar_jax.evaluation import metrics, prompt_scores
from tensorar_jax.evaluation import shapes as shapes_scorer
from tensorar_jax.experiment import build, saved
from tensorar_jax.experiment.schema import EvaluationConfig, Stage, choose
from tensorar_jax.generation import batches, requests
from tensorar_jax.interfaces import Conditioning
from tensorar_jax.nn import classifier

Images = UInt8[np.ndarray, "n h w C"]
Labels = Int[np.ndarray, "n"]


def check(settings: EvaluationConfig, stages: Mapping[str, Stage]) -> None:
  """Raises ValueError unless these stages are there and can be measured."""
  kind = choose("evaluation.yardstick", settings.yardstick, YARDSTICKS)
  for name in settings.models:
    check_objective(stages, name, "tensorar")
  kind.check(stages, settings)


def check_objective(stages: Mapping[str, Stage], name: str, want: str) -> None:
  """Raises ValueError unless there is a stage of that name and objective."""
  choose("evaluation: stage", name, stages)
  if stages[name].objective != want:
    raise ValueError(
      f"evaluation: stage {name!r} trains a {stages[name].objective};"
      f" expected one whose objective is {want!r}."
    )


@runtime_checkable
class Yardstick(Protocol):
  """A kind of measurement; it is made of (stages, settings, workdir).

  Attributes:
    identity: changes whenever the same image would get other numbers.
    names: of the first labels; pictures show a row of images for each.
    notes: what the numbers mean, for readers.
  """

  identity: str

  def __init__(
    self,
    stages: Mapping[str, Stage],
    settings: EvaluationConfig,
    workdir: pathlib.Path,
  ): ...

  @property
  def names(self) -> Sequence[str]:
    """Of the first labels, which the pictures show a row of each."""
    ...

  @property
  def notes(self) -> Sequence[str]:
    """What the numbers mean, for readers."""
    ...

  @staticmethod
  def check(stages: Mapping[str, Stage], settings: EvaluationConfig) -> None:
    """Raises ValueError unless this yardstick can measure the models."""
    ...

  def conditions(self, stage: Stage) -> Conditioning:
    """The conditioning by which a stage's model draws a label."""
    ...

  def labels(self, first: int, count: int) -> Labels:
    """The labels of images first, first + 1, ..."""
    ...

  def cost(self, images: Images, labels: Labels) -> float:
    """A number that the guidance scan minimises."""
    ...

  def measure(self, sets: Sequence[Images], labels: Labels) -> dict:
    """Metrics of one set of images per seed: {name: mean, std, values}."""
    ...

  def held_out(self, limit: int) -> dict[str, np.ndarray]:
    """At most `limit` test images: {"image", "label"}."""
    ...

  def reference(self) -> dict[str, dict]:
    """{name: metrics} of images that no model made."""
    ...


def over_seeds(values: Sequence[float]) -> dict:
  """Mean, sample standard deviation (None for a single value), values."""
  std = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return {"mean": float(np.mean(values)), "std": std, "values": list(values)}


# --- a small classifier ------------------------------------------------------


class ByClassifier:
  """Distances in the features of a classifier, and the classes it predicts."""

  def __init__(self, stages, settings: EvaluationConfig, workdir: pathlib.Path):
    name, folder = settings.classifier, workdir / settings.classifier
    saved.resolve(name, workdir)  # refuses a stage that is not finished
    data = stages[name].data

    def images(split):
      source = sources.load(data.name, split, data_dir=data.data_dir)
      if isinstance(source, codes.TokenSource):
        raise ValueError(
          f"data.name={data.name!r} holds tokens: the classifier {name!r}"
          " compares images. Name a data set of images."
        )
      return pipeline.as_arrays(source)

    model = build.load_stage(stages[name], folder)
    assert isinstance(model, classifier.Model)  # `check` has seen to it
    self.classifier = model
    self.identity = orbax_io.read_meta(orbax_io.find(folder))["id"]
    self.test_images, self.test_labels = images(data.test_split)
    train_images = images(data.train_split)[0]
    self.real = self.features(train_images[: settings.real_images])
    first = settings.models[0]
    self.num_classes = requests.check_classes(first, stages[first]).num_classes
    self.names = [str(label) for label in range(self.num_classes)]
    self.notes = [
      "frechet, precision and recall are against the real training images, in"
      f" the features of the stage {name!r}; accuracy is the share of samples"
      " that it takes for the class they were asked for.",
      "The guidance scan shows Frechet distances.",
    ]

  @staticmethod
  def check(stages: Mapping[str, Stage], settings: EvaluationConfig) -> None:
    check_objective(stages, settings.classifier, "classifier")
    for name in settings.models:
      requests.check_classes(name, stages[name])

  def features(self, images: Images) -> metrics.FeatureSet:
    """`pool` [n, num_features], in batches of one compiled shape."""
    graphdef, state = nnx.split(self.classifier)
    size = min(500, len(images))
    out = []
    for start in range(0, len(images), size):
      part = images[start : start + size]
      pad = [(0, size - len(part))] + [(0, 0)] * 3
      pool = _features(graphdef, state, np.pad(part, pad))
      out.append(np.asarray(pool)[: len(part)])
    return metrics.FeatureSet(pool=np.concatenate(out))

  def conditions(self, stage: Stage) -> Conditioning:
    return build.conditioning(stage.conditioning)

  def labels(self, first: int, count: int) -> Labels:
    return (first + np.arange(count)) % self.num_classes

  def cost(self, images: Images, labels: Labels) -> float:
    fake = self.features(images).gaussians["pool"]
    return fake.distance(self.real.gaussians["pool"])

  def measure(self, sets: Sequence[Images], labels: Labels) -> dict:
    rows = [self.measure_set(images, labels) for images in sets]
    return {name: over_seeds([row[name] for row in rows]) for name in rows[0]}

  def measure_set(self, images: Images, labels: Labels) -> dict[str, float]:
    """Every metric of a set of images against the real training images."""
    fake = self.features(images)
    assert fake.pool is not None
    right = np.argmax(self.classifier.classify(fake.pool), -1) == labels
    compared = metrics.Comparison(self.real, fake).values()
    return {**compared, "accuracy": float(np.mean(right))}

  def held_out(self, limit: int) -> dict[str, np.ndarray]:
    return {
      "image": self.test_images[:limit],
      "label": self.test_labels[:limit],
    }

  def reference(self) -> dict[str, dict]:
    real = self.measure_set(self.test_images, self.test_labels)
    return {"held-out real images": real}


_features = jax.jit(
  lambda graphdef, state, images: nnx.merge(graphdef, state).features(images),
  static_argnums=0,
)


# --- drawings that can be read back ------------------------------------------


class ByReading:
  """The share of images that show what their captions say, by category.

  It reads drawings, so it needs no classifier. A label is the position of a
  prompt in the test split.
  """

  SHOWN = 2 * len(shapes.CATEGORIES)  # prompts in the pictures

  def __init__(self, stages, settings: EvaluationConfig, workdir: pathlib.Path):
    self.settings = settings
    stage = stages[settings.models[0]]
    self.tokenizer = build.frozen_tokenizer(stage, workdir)
    num_labels = settings.num_images + settings.scan_images
    source = open_shapes(stage.data.test_split)
    count = min(len(source), max(num_labels, settings.held_out_images))
    self.scenes = [source.scene(position) for position in range(count)]
    limits = shapes_scorer.MIN_AREA, shapes_scorer.MIN_OVERLAP
    self.identity = f"shapes read by {limits}"
    captions = [scene.prompt.caption for scene in self.scenes]
    self.captions, self.names = captions, captions[: self.SHOWN]
    self.notes = [
      "The categories are GenEval's: the share of images on which every object"
      " that the caption names is read, as often and in the colour and place"
      " that it says. Overall is their mean.",
      "\u00b1 is the standard error and metrics.json has the 95 % interval, by"
      f" resampling prompts {prompt_scores.RESAMPLES} times.",
      "The guidance scan is on other prompts and shows how many are wrong.",
    ]

  @staticmethod
  def check(stages: Mapping[str, Stage], settings: EvaluationConfig) -> None:
    for name in settings.models:
      section = stages[name].conditioning
      if not section.encoder:
        raise ValueError(
          f"stage {name!r} has the conditioning {section}: yardstick="
          "'shapes' needs one that encodes captions, such as dict(name='text',"
          " encoder='words')."
        )
      if (data := stages[name].data.name) != "shapes":
        raise ValueError(
          f"stage {name!r} is of the data set {data!r}: expected 'shapes', the"
          " drawings that yardstick='shapes' can read."
        )

  def conditions(self, stage: Stage) -> Conditioning:
    texts = build.text_conditioning(stage.conditioning)
    encode = build.text_encoder(stage.conditioning)
    rows = conditions.real_rows(*encode(self.captions))
    return requests.Prompts(texts, rows)

  def labels(self, first: int, count: int) -> Labels:
    return (first + np.arange(count)) % len(self.scenes)

  def right(self, images: Images, labels: Labels) -> Bool[np.ndarray, "n"]:
    """Whether each image is what its label asks for."""
    prompts = [self.scenes[label].prompt for label in labels]
    return shapes_scorer.score(images, prompts)

  def cost(self, images: Images, labels: Labels) -> float:
    return 1.0 - self.measure([images], labels)["overall"]["mean"]

  def measure(self, sets: Sequence[Images], labels: Labels) -> dict:
    right = np.stack([self.right(images, labels) for images in sets])
    kinds = np.array([self.scenes[label].prompt.category for label in labels])
    rng, by_seed, resampled = np.random.RandomState(0), {}, {}
    for category in shapes.CATEGORIES:
      is_right = right[:, kinds == category]  # [seeds, prompts]
      by_seed[category] = is_right.mean(axis=1)
      num_seeds = np.full(is_right.shape[1], len(is_right))
      resampled[category] = prompt_scores.resample_prompts(
        is_right.sum(axis=0), num_seeds, rng
      )
    for categories in (by_seed, resampled):
      categories["overall"] = np.mean(list(categories.values()), axis=0)
    return {
      name: {
        "mean": float(np.mean(values)),
        "std": float(resampled[name].std()),
        "interval": np.percentile(resampled[name], (2.5, 97.5)).tolist(),
        "values": values.tolist(),
      }
      for name, values in by_seed.items()
    }

  def held_out(self, limit: int) -> dict[str, np.ndarray]:
    labels = self.labels(0, min(limit, len(self.scenes)))
    drawings = [shapes.draw(self.scenes[label].objects) for label in labels]
    return {"image": np.stack(drawings), "label": labels}

  def reference(self) -> dict[str, dict]:
    test = self.held_out(self.settings.num_images)
    tokens = batches.encode(self.tokenizer, test["image"])
    decoded = batches.decode(self.tokenizer, tokens)
    return {
      "held-out drawings, through the tokenizer": self.measure(
        [decoded], test["label"]
      ),
      "held-out drawings": self.measure([test["image"]], test["label"]),
    }


YARDSTICKS: dict[str, type[Yardstick]] = {
  "classifier": ByClassifier,
  "shapes": ByReading,
}
