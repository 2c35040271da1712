"""The metrics of the ADM evaluation suite, on features of any network.

| metric          | definition                                                 |
| --------------- | ---------------------------------------------------------- |
| Frechet         | |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)     |
| Inception Score | mean over splits of exp(mean KL(p(y|x) || p(y)))           |
| precision       | share of fake points inside the manifold of the real ones  |
| recall          | share of real points inside the manifold of the fake ones  |

The manifold of a set is the union of balls around its points; a ball reaches
the k-th nearest other point of its set (Kynkaanniemi et al., arXiv 1904.06991).
Everything is float64 numpy. The suite itself keeps means in float32 and
distances in float16, so its published precision and recall differ from these in
the third decimal; most are a little too high.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Bool, Float64

Matrix = np.ndarray | jax.Array  # [n, D]; shape and values are checked here

_BLOCK = 2048  # rows and columns of one block of distances: 32 MiB
NEIGHBOUR = 3  # the k-th nearest other row reaches as far as a manifold


def _matrix(features: Matrix, name: str) -> np.ndarray:
  features = np.asarray(features)
  if features.ndim != 2 or features.shape[1] == 0:
    raise ValueError(
      f"{name} has shape {features.shape}; expected [n, D] with one row per "
      "image: flatten or pool the features first."
    )
  return features


def _float64(rows: np.ndarray, name: str) -> np.ndarray:
  rows = rows.astype(np.float64)
  bad = int(np.count_nonzero(~np.isfinite(rows).all(axis=1)))
  if bad:
    raise ValueError(
      f"{name} holds NaN or infinity in {bad} of {len(rows)} rows; expected "
      "finite values: look for the image or the weights that made them."
    )
  return rows


def _blocks(n: int) -> Iterator[slice]:
  for start in range(0, n, _BLOCK):
    yield slice(start, min(start + _BLOCK, n))


class Moments:
  """The mean and covariance of a stream of feature rows.

  Batches are merged by the pairwise update of Chan, Golub and LeVeque, which
  avoids the cancellation of a sum of squares. Up to rounding, the result does
  not depend on how the rows were split.
  """

  def __init__(self) -> None:
    self.count = 0
    self._mean = np.zeros(0)  # [D]
    self._scatter = np.zeros((0, 0))  # [D, D], sum of centred outer products

  def update(self, features: Matrix) -> None:
    """Adds rows `[n, D]`; NaN, or another width than before, is an error."""
    features = _matrix(features, "features")
    self._check_width(features.shape[1])
    # All rows are checked before any is added, so a failure changes nothing.
    for rows in _blocks(len(features)):
      _float64(features[rows], "features")
    for rows in _blocks(len(features)):
      block = features[rows].astype(np.float64)
      mean = block.mean(axis=0)
      block -= mean
      self._add(len(block), mean, block.T @ block)

  def merge(self, other: Moments) -> None:
    """Adds all rows that `other` has seen."""
    if other.count:
      self._check_width(len(other._mean))
      self._add(other.count, other._mean, other._scatter)

  @property
  def mean(self) -> Float64[np.ndarray, " D"]:
    """The mean of the rows; at least 2 are needed."""
    self._check_count()
    return self._mean.copy()

  @property
  def covariance(self) -> Float64[np.ndarray, "D D"]:
    """The unbiased covariance (divisor n - 1); at least 2 rows are needed."""
    self._check_count()
    return self._scatter / (self.count - 1)

  @property
  def gaussian(self) -> Gaussian:
    """Mean and covariance together."""
    return Gaussian(self.mean, self.covariance)

  def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
    if not self.count:
      self._mean, self._scatter = np.zeros_like(mean), np.zeros_like(scatter)
    total = self.count + count
    shift = mean - self._mean
    outer = np.outer(shift, shift) * (self.count * count / total)
    self._mean = self._mean + shift * (count / total)
    self._scatter = self._scatter + scatter + outer
    self.count = total

  def _check_width(self, width: int) -> None:
    if self.count and width != len(self._mean):
      raise ValueError(
        f"features are {width} wide; expected {len(self._mean)} as before: "
        "take all features from one network and one layer."
      )

  def _check_count(self) -> None:
    if self.count < 2:
      raise ValueError(
        f"the moments hold {self.count} row(s); expected at least 2, the "
        "least that has a covariance: add more images."
      )


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """A mean `[D]` and a covariance S `[D, D]`, as sample files store them.

  ValueError if the shapes do not match or a value is not finite. `factor` is
  any F with S = F F', if one is known; it saves an eigendecomposition.
  """

  mean: np.ndarray
  covariance: np.ndarray
  factor: np.ndarray | None = dataclasses.field(default=None, repr=False)

  @classmethod
  def fit(cls, features: Matrix, rows: np.ndarray | None = None) -> Gaussian:
    """Fits feature rows `[n, D]`, n >= 2: all, or the chosen `rows`."""
    rows = np.arange(len(features)) if rows is None else rows
    moments = Moments()
    for block in _blocks(len(rows)):
      moments.update(features[rows[block]])
    mean, covariance = moments.mean, moments.covariance
    if len(rows) > len(mean):
      return cls(mean, covariance)
    centred = np.asarray(features)[rows].astype(np.float64) - mean
    return cls(mean, covariance, centred.T / np.sqrt(len(rows) - 1))

  def __post_init__(self):
    shapes = np.shape(self.mean), np.shape(self.covariance)
    if shapes != (shapes[0][:1], shapes[0][:1] * 2) or shapes[0] in ((), (0,)):
      raise ValueError(
        f"mean and covariance have shapes {shapes}; expected [D] and [D, D]:"
        " take both from one network and one layer."
      )
    for name, shape in zip(("mean", "covariance"), shapes):
      rows = np.atleast_2d(np.asarray(getattr(self, name)))
      checked = _float64(rows, f"the {name}").reshape(shape)
      object.__setattr__(self, name, checked)

  def distance(self, other: Gaussian) -> float:
    """The Frechet distance; ValueError for a Gaussian of another width.

    With S = F F', tr (S_a S_b)^(1/2) is the sum of the singular values of
    F_a' F_b. This is stable for singular covariances, unlike a matrix square
    root of the product: it needs no offset and gives no complex result.
    """
    self._check_width(other)
    cross = np.linalg.svd(
      self._factor.T @ other._factor, compute_uv=False
    ).sum()
    return self._from_trace(other, cross)

  def rough_distance(self, other: Gaussian) -> float:
    """The distance to about six digits, a few times faster for many others.

    tr (S_a S_b)^(1/2) comes from the eigenvalues of F_a' S_b F_a; the square
    root magnifies their rounding.
    """
    self._check_width(other)
    product = self._factor.T @ other.covariance @ self._factor
    values = np.linalg.eigvalsh(product)
    return self._from_trace(other, np.sqrt(np.maximum(values, 0)).sum())

  def _from_trace(self, other: Gaussian, cross: float) -> float:
    shift = self.mean - other.mean
    traces = np.trace(self.covariance) + np.trace(other.covariance)
    return float(shift @ shift + traces - 2 * cross)

  def _check_width(self, other: Gaussian) -> None:
    widths = len(self.mean), len(other.mean)
    if widths[0] != widths[1]:
      raise ValueError(
        f"statistics of {widths[0]} and of {widths[1]} features; expected one"
        " width: take both sets from one network and one layer."
      )

  @functools.cached_property
  def _factor(self) -> np.ndarray:
    """[D, rank] with F F' the covariance."""
    if self.factor is not None:
      return self.factor
    values, vectors = np.linalg.eigh(self.covariance)
    largest = np.abs(values).max()
    if values[0] < -1e-6 * largest:
      raise ValueError(
        f"a covariance has the eigenvalue {values[0]:.3g}; expected none below "
        "0: check that the array is a covariance."
      )
    # Eigenvalues under the rounding level of the largest one are noise around
    # 0; their square roots would not be small (1e-16 would count as 1e-8).
    kept = values > largest * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(logits: Matrix, split_size: int = 5000) -> float:
  """The Inception Score of classifier logits `[n, classes]`.

  It is the mean over consecutive splits, in which a short last one counts as
  much as a full one: shuffle class-sorted images first. Published Inception
  Scores use logits without the bias of the last layer. The suite's float32
  softmax can underflow and make the score NaN; this one cannot.
  """
  logits = _matrix(logits, "logits")
  if split_size < 1 or not len(logits):
    raise ValueError(
      f"split_size is {split_size} for {len(logits)} rows of logits; expected "
      "at least 1 of each."
    )
  scores = []
  for start in range(0, len(logits), split_size):
    rows = _float64(logits[start : start + split_size], "logits")
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))  # log p(y|x)
    p = np.exp(rows)
    marginal = p.mean(axis=0)
    entropy = marginal @ np.log(np.where(marginal > 0, marginal, 1.0))
    scores.append(np.exp((p * rows).sum(axis=1).mean() - entropy))
  return float(np.mean(scores))


def manifold_members(
  real: Matrix,
  fake: Matrix,
  k: int = NEIGHBOUR,
  reach_real: Float64[np.ndarray, " n"] | None = None,
) -> tuple[Bool[np.ndarray, " m"], Bool[np.ndarray, " n"]]:
  """True at fake points in the real manifold, and at real points in the fake.

  Their shares are precision and recall, of `fake [n, D]` against `real [m, D]`,
  by exact k-nearest-neighbour manifolds. Beyond the inputs, memory grows with
  n + m only: distances are made in blocks of 2048 x 2048.

  Args:
    real: features of the reference.
    fake: features of the samples.
    k: a ball reaches the k-th nearest other point.
    reach_real: the squared radii of the real points, where they are known.
  """
  real, fake = _matrix(real, "real"), _matrix(fake, "fake")
  if real.shape[1] != fake.shape[1]:
    raise ValueError(
      f"real features are {real.shape[1]} wide and fake ones {fake.shape[1]}; "
      "expected one width: take both from one network and one layer."
    )
  if reach_real is None:
    reach_real = squared_radii(real, k)
  reach_fake = squared_radii(fake, k)
  in_real, in_fake = np.zeros(len(fake), bool), np.zeros(len(real), bool)
  for rows, columns, distances in _distances(real, fake):
    in_real[columns] |= (distances <= reach_real[rows, None]).any(axis=0)
    in_fake[rows] |= (distances <= reach_fake[None, columns]).any(axis=1)
  return in_real, in_fake


def squared_radii(
  features: Matrix, k: int = NEIGHBOUR
) -> Float64[np.ndarray, " n"]:
  """The squared distance of each row to the k-th nearest other row."""
  features = _matrix(features, "features")
  if not 1 <= k < len(features):
    raise ValueError(
      f"k is {k} for {len(features)} rows; expected 1 <= k < rows: add images "
      "or lower k."
    )
  # Entry k of a row's sorted distances; entry 0 is the row itself.
  nearest = np.full((len(features), k + 1), np.inf)
  for rows, _, distances in _distances(features, features):
    both = np.concatenate([nearest[rows], distances], axis=1)
    nearest[rows] = np.partition(both, k, axis=1)[:, : k + 1]
  return nearest.max(axis=1)


def _distances(
  a: np.ndarray, b: np.ndarray
) -> Iterator[tuple[slice, slice, np.ndarray]]:
  """Yields (rows, columns, block of squared distances), row by row of blocks.

  |u - v|^2 = |u|^2 - 2 u v + |v|^2, clipped at 0.
  """
  for rows in _blocks(len(a)):
    u = _float64(a[rows], "features")
    for columns in _blocks(len(b)):
      v = _float64(b[columns], "features")
      block = u @ v.T
      block *= -2
      block += (u * u).sum(axis=1)[:, None]
      block += (v * v).sum(axis=1)
      yield rows, columns, np.maximum(block, 0, out=block)
