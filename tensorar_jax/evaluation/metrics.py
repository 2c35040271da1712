"""Every metric, one entry each: its name, how it is shown, what measures it.

`METRICS` is what tables, plots and verdicts read. An entry with a `measure`
compares the features of two sets of images. Any network will do: Inception for
photographs, a small classifier where Inception's features mean nothing.

The spread of such a metric is a bootstrap over images: over the samples for
what is an average over samples, over the reference for recall. The network, the
statistics of the reference and the manifolds are taken as exact. A distance
between few images is too large, and so are those of the bootstrap: its standard
deviation is taken, not its quantiles.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from tensorar_jax.data import shapes
from tensorar_jax.evaluation import adm

SPLIT = 5000  # images of a split of the Inception Score
Z95 = 1.96  # standard deviations to each side that hold 95 %


@dataclasses.dataclass(frozen=True)
class FeatureSet:
  """The features of n images; None where the network has none of a kind.

  Attributes:
    pool: [n, D], for the Fréchet distance, precision and recall.
    spatial: [n, S], for the spatial Fréchet distance.
    logits: [n, classes], for the Inception Score.
    stored: statistics that came with a file, by "pool" and "spatial"; they
      count instead of the arrays' own.
  """

  pool: np.ndarray | jax.Array | None = None
  spatial: np.ndarray | jax.Array | None = None
  logits: np.ndarray | jax.Array | None = None
  stored: Mapping[str, adm.Gaussian] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def gaussians(self) -> dict[str, adm.Gaussian]:
    """The statistics of "pool" and "spatial", as far as they are known."""
    fitted = {}
    for kind in ("pool", "spatial"):
      features = getattr(self, kind)
      if not self.stored and features is not None:
        fitted[kind] = adm.Gaussian.fit(features)
    return {**fitted, **self.stored}

  @functools.cached_property
  def radii(self) -> np.ndarray:
    """The squared radii of the manifold; at least 4 images are needed."""
    if self.pool is None:
      raise ValueError("precision and recall need the features `pool`.")
    return adm.squared_radii(self.pool)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A metric of a set of samples.

  Attributes:
    value: the metric of all samples.
    of_rows: the metric of a resample, given its rows; None: it has no spread.
    count: how many rows a resample draws from.
  """

  value: float
  of_rows: Callable[[np.ndarray], float] | None = None
  count: int = 0


class Comparison:
  """A set of samples against a reference, by every metric that applies.

  A metric applies where both sets have the features that it needs. ValueError,
  from any method, for features that are not finite, too few, or of two
  networks.
  """

  def __init__(self, real: FeatureSet, fake: FeatureSet):
    self.real, self.fake = real, fake

  def values(self) -> dict[str, float]:
    """Every metric that applies, in the order of METRICS."""
    return {name: one.value for name, one in self._estimates.items()}

  def errors(self, resamples: int, seed: int = 0) -> dict[str, float]:
    """The standard deviation of each metric over `resamples` >= 2 resamples.

    A distance to statistics that came with the samples has none.
    """
    if resamples < 2:
      raise ValueError(f"resamples={resamples}: expected at least 2.")
    errors = {}
    for name, estimate in self._estimates.items():
      if estimate.of_rows is None:
        continue
      rng = np.random.default_rng(seed)  # the same resamples for each metric
      values = [
        estimate.of_rows(_resample(rng, estimate.count))
        for _ in range(resamples)
      ]
      errors[name] = float(np.std(values, ddof=1))
    return errors

  @functools.cached_property
  def _estimates(self) -> dict[str, Estimate]:
    measured = {
      name: metric.measure(self)
      for name, metric in METRICS.items()
      if metric.measure
    }
    return {
      name: estimate
      for name, estimate in measured.items()
      if estimate is not None
    }

  @functools.cached_property
  def members(self) -> tuple[np.ndarray, np.ndarray] | None:
    """True at samples in the real manifold, and at real images in theirs.

    None unless both sets have the features `pool`.
    """
    real, fake = self.real, self.fake
    if real.pool is None or fake.pool is None:
      return None
    return adm.manifold_members(real.pool, fake.pool, reach_real=real.radii)


def _resample(rng: np.random.Generator, count: int) -> np.ndarray:
  """Rows drawn with replacement, each from its split of the Inception Score.

  Splits of a file that is sorted by class hold different classes; a score over
  mixed ones would be another quantity.
  """
  rows = []
  for start in range(0, count, SPLIT):
    size = min(SPLIT, count - start)
    rows.append(start + rng.integers(size, size=size))
  return np.concatenate(rows)


# --- what measures -----------------------------------------------------------


def _frechet(pair: Comparison, kind: str) -> Estimate | None:
  target = pair.real.gaussians.get(kind)
  if target is None or kind not in pair.fake.gaussians:
    return None
  value = pair.fake.gaussians[kind].distance(target)
  features = getattr(pair.fake, kind)
  if features is None or pair.fake.stored:
    return Estimate(value)

  def of_rows(rows):
    # Only its spread counts, which is far above the rounding.
    return target.rough_distance(adm.Gaussian.fit(features, rows))

  return Estimate(value, of_rows, len(features))


def _inception_score(pair: Comparison) -> Estimate | None:
  logits = pair.fake.logits
  if logits is None:
    return None
  of_rows = lambda rows: adm.inception_score(logits[rows], SPLIT)
  value = adm.inception_score(logits, SPLIT)
  return Estimate(value, of_rows, len(logits))


def _share(pair: Comparison, side: int) -> Estimate | None:
  """The share of samples (side 0) or real images (side 1) in the manifold."""
  if pair.members is None:
    return None
  inside = pair.members[side]
  value = float(np.mean(inside))
  return Estimate(value, lambda rows: inside[rows].mean(), len(inside))


# --- the table ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Metric:
  """A metric: its name, how it is shown and compared, and what measures it.

  Attributes:
    name: its key in metrics.json.
    label: what tables and plots call it.
    higher_is_better: None: it is shown without a verdict.
    decimals: in tables of measured files.
    is_detail: left out where there is room for a few metrics only.
    measure: makes it of a comparison, None where it does not apply; without
      one it comes from a yardstick or a benchmark's scorer.
  """

  name: str
  label: str
  higher_is_better: bool | None = None
  decimals: int = 3
  is_detail: bool = False
  measure: Callable[[Comparison], Estimate | None] | None = None

  @property
  def heading(self) -> str:
    """The label, with an arrow where more or less of it is better."""
    arrows = {True: " ↑", False: " ↓", None: ""}
    return self.label + arrows[self.higher_is_better]


def by_name(*entries: Metric) -> dict[str, Metric]:
  """{name: entry}, in the order given."""
  return {metric.name: metric for metric in entries}


METRICS = by_name(
  Metric(
    "frechet",
    "Fréchet distance",
    higher_is_better=False,
    decimals=2,
    measure=functools.partial(_frechet, kind="pool"),
  ),
  Metric(
    "spatial_frechet",
    "spatial Fréchet distance",
    higher_is_better=False,
    decimals=2,
    measure=functools.partial(_frechet, kind="spatial"),
  ),
  # The two above have names of their own in the features of Inception.
  Metric("fid", "FID", higher_is_better=False, decimals=2),
  Metric("sfid", "sFID", higher_is_better=False, decimals=2),
  Metric(
    "inception_score",
    "IS",
    higher_is_better=True,
    decimals=2,
    measure=_inception_score,
  ),
  Metric("overall", "overall", higher_is_better=True),
  Metric("accuracy", "class accuracy", higher_is_better=True),
  Metric(
    "precision",
    "precision",
    higher_is_better=True,
    decimals=4,
    measure=functools.partial(_share, side=0),
  ),
  Metric(
    "recall",
    "recall",
    higher_is_better=True,
    decimals=4,
    measure=functools.partial(_share, side=1),
  ),
  *(
    Metric(name, name.replace("_", " "), higher_is_better=True, is_detail=True)
    for name in shapes.CATEGORIES
  ),
  Metric("entropy", "entropy"),
  Metric("cross_entropy", "cross entropy", is_detail=True),
)


def find(name: str) -> Metric:
  """The entry of a metric; one without a verdict if there is none."""
  return METRICS.get(name) or Metric(name, name.replace("_", " "))


def in_order(names: Iterable[str]) -> list[Metric]:
  """The entries of these metrics in the order of METRICS, unknown ones last."""
  names = list(names)
  known = [metric for name, metric in METRICS.items() if name in names]
  return known + [find(name) for name in names if name not in METRICS]
