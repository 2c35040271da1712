"""Tests of the metrics of feature sets and of their bootstrap."""

import numpy as np
import pytest

from tensorar_jax.evaluation import adm, metrics


def draw(seed, n, width=6):
  return np.random.default_rng(seed).standard_normal((n, width), np.float32)


def full(seed, n):
  pool = draw(seed, n)
  return metrics.FeatureSet(pool, draw(seed + 50, n, 4), 3 * pool[:, :5])


def test_values_are_those_of_the_suite():
  real, fake = full(0, 400), full(1, 300)
  values = metrics.Comparison(real, fake).values()
  assert list(values) == [
    "frechet",
    "spatial_frechet",
    "inception_score",
    "precision",
    "recall",
  ]
  for name, kind in (("frechet", "pool"), ("spatial_frechet", "spatial")):
    moments = [adm.Moments(), adm.Moments()]
    for one, features in zip(moments, (fake, real)):
      one.update(getattr(features, kind))
    assert values[name] == pytest.approx(
      moments[0].gaussian.distance(moments[1].gaussian), rel=1e-9
    )
  assert values["inception_score"] == adm.inception_score(fake.logits)
  pair = values["precision"], values["recall"]
  members = adm.manifold_members(real.pool, fake.pool)
  assert pair == tuple(inside.mean() for inside in members)


def test_stored_statistics_count_instead_of_the_arrays():
  real, fake = full(0, 400), full(1, 300)
  other = full(2, 350)
  stored = metrics.FeatureSet(pool=real.pool, stored=other.gaussians)
  values = metrics.Comparison(stored, fake).values()
  want = metrics.Comparison(other, fake).values()
  for name in ("frechet", "spatial_frechet"):
    assert values[name] == want[name]
  assert values["recall"] == metrics.Comparison(real, fake).values()["recall"]
  # Statistics of the samples are taken too, and have no spread.
  compared = metrics.Comparison(
    real, metrics.FeatureSet(pool=fake.pool, stored=other.gaussians)
  )
  assert "frechet" in compared.values()
  assert compared.errors(2).keys() == {"precision", "recall"}


def test_statistics_alone_give_distances_alone():
  real, fake = full(0, 400), full(1, 300)
  alone = metrics.FeatureSet(stored=real.gaussians)
  compared = metrics.Comparison(alone, fake)
  names = {"frechet", "spatial_frechet", "inception_score"}
  assert compared.values().keys() == compared.errors(2).keys() == names


def test_the_bootstrap_knows_the_spread_of_fresh_samples():
  """The standard deviation over resamples is that over new samples."""
  real = full(0, 2000)

  def other(seed):  # Of equal distributions a distance has no linear part.
    drawn = full(seed, 300)
    moved = [1.3 * x + 0.4 for x in (drawn.pool, drawn.spatial)]
    return metrics.FeatureSet(*moved, drawn.logits)

  fresh = [
    metrics.Comparison(real, other(seed)).values() for seed in range(2, 42)
  ]
  errors = metrics.Comparison(real, other(1)).errors(200)
  for name in ("frechet", "spatial_frechet", "inception_score", "precision"):
    spread = np.std([row[name] for row in fresh], ddof=1)
    assert errors[name] == pytest.approx(spread, rel=0.5), name
  # Of a share of independent images the spread is known.
  recall = metrics.Comparison(real, other(1)).values()["recall"]
  binomial = np.sqrt(recall * (1 - recall) / 2000)
  assert errors["recall"] == pytest.approx(binomial, rel=0.2)


def test_resamples_stay_in_their_split(monkeypatch):
  monkeypatch.setattr(metrics, "SPLIT", 100)
  rows = metrics._resample(np.random.default_rng(0), 250)
  np.testing.assert_array_equal(rows // 100, np.arange(250) // 100)
  assert len(np.unique(rows)) < 200


def test_errors_need_two_resamples():
  with pytest.raises(ValueError, match="resamples=1: expected at least 2"):
    metrics.Comparison(full(0, 9), full(1, 9)).errors(1)


def test_sets_that_do_not_fit():
  compare = metrics.Comparison
  narrow = metrics.FeatureSet(pool=draw(0, 9, 3))
  with pytest.raises(ValueError, match="of 6 and of 3 features"):
    compare(narrow, full(1, 9)).values()
  broken = full(1, 9)
  broken.pool[3, 2] = np.nan
  with pytest.raises(ValueError, match="NaN or infinity in 1 of 9 rows"):
    compare(full(0, 9), broken).values()
  with pytest.raises(ValueError, match="k is 3 for 3 rows"):
    compare(full(0, 9), full(1, 3)).values()
  with pytest.raises(ValueError, match=r"hold 1 row.*at least 2"):
    compare(full(0, 9), full(1, 1)).values()


def test_a_rough_distance_is_nearly_the_distance():
  """Singular covariances included."""
  a, b = full(0, 400).gaussians["pool"], full(1, 4).gaussians["pool"]
  for one, other in ((a, b), (b, a)):
    assert one.rough_distance(other) == pytest.approx(
      one.distance(other), rel=1e-6
    )


def test_few_images_need_no_eigendecomposition(monkeypatch):
  """Fewer rows than columns: the centred rows are a factor as they are."""
  a, b = draw(0, 5, 9), draw(1, 7, 9) * 1.5
  moments = [adm.Moments(), adm.Moments()]
  for one, features in zip(moments, (a, b)):
    one.update(features)
  want = moments[0].gaussian.distance(moments[1].gaussian)
  monkeypatch.setattr(np.linalg, "eigh", None)
  few = adm.Gaussian.fit(a), adm.Gaussian.fit(b)
  assert few[0].distance(few[1]) == pytest.approx(want, rel=1e-10)
