"""Features of two sets of images -> every metric, and how sure it is.

Any network will do: Inception for photographs, a small classifier where that
means nothing. The spread is a bootstrap over images, of the sample set for what
is an average over samples and of the reference for recall, with the network,
the reference statistics and the manifolds as they are. The bootstrap's own
distances are too large, as every distance between few images is, so its
standard deviation is taken and not its quantiles.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from tensorar_jax.evaluation import adm

SPLIT = 5000  # images of a split of the Inception Score
Z95 = 1.96  # standard deviations to each side that hold 95 %
RESAMPLES = 1000  # of the prompts, behind a standard error


@dataclasses.dataclass(frozen=True)
class FeatureSet:
  """What a network says of n images; None for what it does not.

  Attributes:
    pool: [n, D], of the Frechet distance, precision and recall.
    spatial: [n, S], of the spatial Frechet distance.
    logits: [n, classes], of the Inception Score.
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
    found = {}
    for kind in ("pool", "spatial"):
      features = getattr(self, kind)
      if not self.stored and features is not None:
        found[kind] = adm.Gaussian.fit(features)
    return {**found, **self.stored}

  @functools.cached_property
  def radii(self) -> np.ndarray:
    """The squared radii of the manifold; at least 4 images are needed."""
    if self.pool is None:
      raise ValueError("precision and recall need the features `pool`.")
    return adm.squared_radii(self.pool)


class Comparison:
  """A set of samples against a reference: what can be measured of them.

  | metric            | needs                            |
  | ----------------- | -------------------------------- |
  | `frechet`         | `pool` or its statistics of both |
  | `spatial_frechet` | the same of `spatial`            |
  | `inception_score` | the samples' `logits`            |
  | `precision`       | `pool` of both                   |
  | `recall`          | `pool` of both                   |

  ValueError, from any of its methods, for features that are not finite, too
  few, or of two networks.
  """

  def __init__(self, real: FeatureSet, fake: FeatureSet):
    self.real, self.fake = real, fake

  def values(self) -> dict[str, float]:
    """Every metric, in the order of the table above."""
    found = {}
    for name, kind in _DISTANCES.items():
      if kind in self.real.gaussians and kind in self.fake.gaussians:
        own = self.fake.gaussians[kind]
        found[name] = own.distance(self.real.gaussians[kind])
    if self.fake.logits is not None:
      found["inception_score"] = adm.inception_score(self.fake.logits, SPLIT)
    if self._has_manifolds:
      inside, covered = self._members
      found["precision"] = float(np.mean(inside))
      found["recall"] = float(np.mean(covered))
    return found

  def errors(self, resamples: int, seed: int = 0) -> dict[str, float]:
    """The standard deviation of each metric over `resamples` >= 2 resamples.

    A distance to statistics that came with the samples has none.
    """
    if resamples < 2:
      raise ValueError(f"resamples={resamples}: expected at least 2.")
    found = {}
    for name, measure, count in self._resampled():
      rng = np.random.default_rng(seed)  # the same resamples for each metric
      values = [measure(_resample(rng, count)) for _ in range(resamples)]
      found[name] = float(np.std(values, ddof=1))
    return found

  def _resampled(
    self,
  ) -> Iterator[tuple[str, Callable[[np.ndarray], float], int]]:
    """(metric, what makes it of the rows of a resample, number of rows)."""
    for name, kind in _DISTANCES.items():
      features = getattr(self.fake, kind)
      target = self.real.gaussians.get(kind)
      if features is None or target is None or self.fake.stored:
        continue
      measure = functools.partial(_distance, features, target)
      yield name, measure, len(features)
    logits = self.fake.logits
    if logits is not None:
      score = lambda rows: adm.inception_score(logits[rows], SPLIT)
      yield "inception_score", score, len(logits)
    if self._has_manifolds:
      inside, covered = self._members
      yield "precision", lambda rows: inside[rows].mean(), len(inside)
      yield "recall", lambda rows: covered[rows].mean(), len(covered)

  @property
  def _has_manifolds(self) -> bool:
    return self.real.pool is not None and self.fake.pool is not None

  @functools.cached_property
  def _members(self) -> tuple[np.ndarray, np.ndarray]:
    real, fake = self.real.pool, self.fake.pool
    if real is None or fake is None:
      raise ValueError("precision and recall need the features `pool` of both.")
    return adm.manifold_members(real, fake, reach_real=self.real.radii)


_DISTANCES = {"frechet": "pool", "spatial_frechet": "spatial"}


def _distance(features, target: adm.Gaussian, rows: np.ndarray) -> float:
  # Its spread over resamples is what counts: far above the rounding.
  return target.rough_distance(adm.Gaussian.fit(features, rows))


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


def resample_prompts(
  sums: np.ndarray, counts: np.ndarray, rng: np.random.RandomState
) -> np.ndarray:
  """[RESAMPLES] means over resampled prompts, of [n] sums and [n] counts."""
  drawn = rng.randint(len(sums), size=(RESAMPLES, len(sums)))
  return sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
