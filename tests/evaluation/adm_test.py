"""The ADM metrics against recorded values of the public evaluators."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tensorar_jax.evaluation import adm

CASES = ("full", "rank_deficient", "dead_and_duplicate", "identical")


@pytest.fixture(scope="module")
def fixtures(parity):
  """(folder, recorded inputs, recorded results)."""
  root = parity / "evaluation"
  with np.load(root / "distances.npz") as arrays:
    arrays = dict(arrays)
  return root, arrays, json.loads((root / "expected.json").read_text())


def _moments(features, batch=None):
  moments = adm.Moments()
  for start in range(0, len(features), batch or len(features)):
    moments.update(features[start : start + (batch or len(features))])
  return moments


def _frechet(a, b):
  return a.gaussian.distance(b.gaussian)


def _gaussian_distance(mean_a, covariance_a, mean_b, covariance_b):
  a = adm.Gaussian(mean_a, covariance_a)
  return a.distance(adm.Gaussian(mean_b, covariance_b))


def _precision_recall(real, fake, k=3):
  inside, covered = adm.manifold_members(real, fake, k)
  return inside.mean(), covered.mean()


def _features(seed, n, width=7):
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(width, width))
  return (rng.normal(size=(n, width)) @ mixing + 3).astype(np.float32)


# Parity. Tolerances are those that the fixtures state.


@pytest.mark.parametrize("case", [*(f"fid.{c}" for c in CASES), "sfid"])
def test_moments_and_frechet_parity(fixtures, case):
  _, arrays, expected = fixtures
  names = ("real", "fake")
  suffix = "_features" if case == "sfid" else ""
  sets = {n: _moments(arrays[f"{case}.{n}{suffix}"], batch=37) for n in names}
  for name in names:
    mu, sigma = arrays[f"{case}.{name}_mu"], arrays[f"{case}.{name}_sigma"]
    np.testing.assert_allclose(sets[name].mean, mu, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sets[name].covariance, sigma, atol=1e-6)
  # The suite calls sample.distance(reference).
  distance = _frechet(sets["fake"], sets["real"])
  rtol = 1e-5 if case == "fid.rank_deficient" else 1e-6
  for source, value in expected[case].items():
    atol = 1e-6 if case == "fid.identical" or source != "exact" else 0
    np.testing.assert_allclose(
      distance, value, rtol=rtol, atol=atol, err_msg=source
    )


def test_spatial_features_are_the_first_seven_channels(fixtures):
  _, arrays, expected = fixtures
  sets = []
  for name in ("real", "fake"):
    maps = arrays[f"sfid.{name}_maps_nhwc"][..., :7]
    features = maps.reshape(len(maps), -1)
    np.testing.assert_array_equal(features, arrays[f"sfid.{name}_features"])
    sets.append(_moments(features))
  np.testing.assert_allclose(
    _frechet(*sets), expected["sfid"]["exact"], rtol=1e-6
  )


def test_stored_statistics_parity(fixtures):
  root, _, expected = fixtures
  real, fake = (
    np.load(root / f"layout_{name}_stats.npz")
    for name in ("reference", "sample")
  )
  for key, end in (("fid", ""), ("sfid", "_s")):
    mu, sigma = f"mu{end}", f"sigma{end}"
    distance = _gaussian_distance(fake[mu], fake[sigma], real[mu], real[sigma])
    np.testing.assert_allclose(
      distance, expected["layout_stats"][key], rtol=1e-6
    )


def test_protocol_activations_parity(fixtures):
  root, _, expected = fixtures
  expected = expected["protocol_end_to_end"]
  with np.load(root / "protocol_activations.npz") as arrays:
    real, fake = arrays["ref_pool3"], arrays["sample_pool3"]
  distance = _frechet(_moments(fake), _moments(real))
  np.testing.assert_allclose(distance, expected["fid_exact"], rtol=1e-6)
  np.testing.assert_allclose(distance, expected["fid"], rtol=1e-6)
  assert _precision_recall(real, fake) == (
    expected["precision_fp32"],
    expected["recall_fp32"],
  )


def test_inception_score_parity(fixtures):
  _, arrays, expected = fixtures
  expected = expected["inception_score"]
  acts, weight = arrays["is.acts"], arrays["is.weight"]
  logits = acts.astype(np.float64) @ weight.astype(np.float64)
  cases = [
    (logits, 5000, expected["float64"]["adm_mean"], 1e-7),
    (logits, len(logits), expected["float64"]["whole_set"], 1e-7),
    (acts @ weight, 5000, expected["adm"]["mean"], 1e-5),
    (acts[:5000] @ weight, 5000, expected["adm"]["first_5000"], 1e-5),
    (acts[:3000] @ weight, 5000, expected["adm"]["first_3000"], 1e-5),
    (acts @ weight, 1000, expected["adm"]["split_size_1000"], 1e-5),
  ]
  whole = expected["torch_fidelity"]["splits1_no_shuffle"]["mean"]
  cases.append((logits, len(logits), whole, 1e-7))
  for i in range(3):
    rows = slice(5000 * i, 5000 * (i + 1))
    one = expected["float64"]["adm_splits_5000"][i]
    cases.append((logits[rows], 5000, one, 1e-7))
    one = expected["adm"]["per_split"][i]
    cases.append(((acts @ weight)[rows], 5000, one, 1e-5))
  borders = [i * len(logits) // 10 for i in range(11)]
  order = np.random.RandomState(2020).permutation(len(logits))
  fidelity = expected["torch_fidelity"]
  np.testing.assert_array_equal(order[:16], fidelity["permutation_first16"])
  for i in range(10):
    rows = slice(borders[i], borders[i + 1])
    one = fidelity["per_split_no_shuffle"][i]
    cases.append((logits[rows], 5000, one, 1e-7))
    one = fidelity["per_split_shuffled"][i]
    cases.append((logits[order][rows], 5000, one, 1e-7))
  for rows, split_size, value, rtol in cases:
    score = adm.inception_score(rows, split_size)
    np.testing.assert_allclose(score, value, rtol=rtol)


def test_rfid_evaluator_parity(fixtures):
  _, arrays, expected = fixtures
  expected = expected["titok_evaluator"]
  real = arrays["fid.full.real"][: expected["n"]]
  fake = arrays["fid.full.fake"][: expected["n"]]
  distance = _frechet(_moments(real, 37), _moments(fake, 37))
  np.testing.assert_allclose(distance, expected["rFID_exact"], rtol=1e-6)
  np.testing.assert_allclose(distance, expected["rFID"], rtol=1e-6)
  logits = fake.astype(np.float64) @ arrays["titok.logit_weight"]
  score = adm.inception_score(logits, len(logits))
  np.testing.assert_allclose(score, expected["InceptionScore"], rtol=1e-7)


@pytest.mark.parametrize("case", ["pr.a", "pr.b"])
@pytest.mark.parametrize("block", [2048, 64])
def test_precision_recall_parity(fixtures, monkeypatch, case, block):
  _, arrays, expected = fixtures
  monkeypatch.setattr(adm, "_BLOCK", block)
  real, fake = arrays[f"{case}.ref"], arrays[f"{case}.sample"]
  for name, features in (("ref", real), ("sample", fake)):
    radii = adm.squared_radii(features)
    exact = arrays[f"{case}.exact_radii_{name}"]
    np.testing.assert_allclose(radii, exact, rtol=1e-12)
    for kind, rtol in (("fp32", 1e-5), ("fp16", 2e-2)):
      recorded = arrays[f"{case}.{kind}.radii_{name}"][:, 0]
      np.testing.assert_allclose(radii, recorded, rtol=rtol)
  in_real, in_fake = adm.manifold_members(real, fake)
  for kind in ("exact_", "fp32."):
    member = arrays[f"{case}.{kind}sample_in_ref"]
    np.testing.assert_array_equal(in_real, member)
    member = arrays[f"{case}.{kind}ref_in_sample"]
    np.testing.assert_array_equal(in_fake, member)

  expected, both = expected[case], _precision_recall(real, fake)
  for key in ("adm_fp32_forced", "adm_overflow_x400"):
    for end in ("", "_row64_col50"):
      pair = expected[key]["precision" + end], expected[key]["recall" + end]
      assert both == pair
  scaled = _precision_recall(real * 400, fake * 400)
  assert scaled == both
  assert both[0] == expected["evaluate_fp32"]["fraction"]
  for kind, atol in (("adm_fp16", 0.015), ("torch_fidelity", 1e-6)):
    pair = expected[kind]["precision"], expected[kind]["recall"]
    np.testing.assert_allclose(both, pair, atol=atol)
  for i, k in enumerate((1, 5)):
    pair = expected["fp32_nhood_1_5"]
    pair = pair["precision"][i], pair["recall"][i]
    assert _precision_recall(real, fake, k) == pair


# Properties.


def test_moments_equal_the_textbook_for_any_split():
  features = _features(0, 101) + 1e4  # a sum of squares would lose 8 digits
  whole = features.astype(np.float64)
  for batch in (1, 13, 101):
    moments = _moments(features, batch)
    assert moments.count == 101
    np.testing.assert_allclose(moments.mean, whole.mean(0), rtol=1e-13)
    np.testing.assert_allclose(
      moments.covariance, np.cov(whole, rowvar=False), rtol=1e-9, atol=1e-9
    )


def test_moments_do_not_depend_on_the_block(monkeypatch):
  whole = _moments(_features(0, 101))
  monkeypatch.setattr(adm, "_BLOCK", 17)
  split = _moments(_features(0, 101))
  np.testing.assert_allclose(split.covariance, whole.covariance, rtol=1e-11)


def test_merge_equals_one_pass():
  features = _features(0, 101)
  merged, rest = _moments(features[:29]), _moments(features[29:])
  merged.merge(adm.Moments())
  merged.merge(rest)
  assert (merged.count, rest.count) == (101, 72)
  whole = _moments(features)
  np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
  np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-11)
  empty = adm.Moments()
  empty.merge(rest)
  empty.update(features[:29])
  np.testing.assert_allclose(empty.covariance, whole.covariance, rtol=1e-11)
  assert rest.count == 72  # what was merged in is left alone


def test_a_failed_update_changes_nothing():
  moments = _moments(_features(0, 11))
  before = moments.covariance
  bad = _features(1, 11)
  bad[10, 3] = np.nan
  with pytest.raises(ValueError, match="NaN or infinity in 1 of 11"):
    moments.update(bad)
  assert moments.count == 11
  np.testing.assert_array_equal(moments.covariance, before)


def test_moments_errors():
  moments = adm.Moments()
  with pytest.raises(ValueError, match="hold 0 row"):
    _ = moments.mean
  moments.update(_features(0, 1))
  with pytest.raises(ValueError, match="hold 1 row"):
    _ = moments.covariance
  with pytest.raises(ValueError, match="5 wide; expected 7"):
    moments.update(_features(0, 3, width=5))
  with pytest.raises(ValueError, match="5 wide; expected 7"):
    moments.merge(_moments(_features(0, 3, width=5)))
  with pytest.raises(ValueError, match=r"expected \[n, D\]"):
    moments.update(np.zeros((2, 3, 3)))


def test_frechet_distance_of_known_gaussians():
  mean, covariance = np.zeros(3), np.diag([1.0, 4.0, 0.0])
  other = np.diag([4.0, 9.0, 0.0])  # tr: 5 + 13 - 2 (2 + 6) = 2
  distance = _gaussian_distance(mean, covariance, mean + 2, other)
  assert distance == pytest.approx(12 + 2, abs=1e-12)
  with pytest.raises(ValueError, match="of 3 and of 2 features"):
    _gaussian_distance(mean, covariance, np.zeros(2), np.eye(2))
  with pytest.raises(ValueError, match=r"expected \[D\] and \[D, D\]"):
    adm.Gaussian(mean, covariance[:2])
  with pytest.raises(ValueError, match="eigenvalue -1"):
    _gaussian_distance(mean, covariance, mean, -np.eye(3))


@pytest.mark.parametrize("n", [5, 101])  # 5 rows: a singular covariance
def test_a_set_against_itself(n):
  features = _features(0, n)
  moments = _moments(features)
  shuffled = _moments(np.random.default_rng(0).permutation(features), 3)
  assert abs(_frechet(moments, moments)) < 1e-10
  assert abs(_frechet(moments, shuffled)) < 1e-10
  assert _precision_recall(features, features) == (1.0, 1.0)
  assert _precision_recall(features, features + 1e3) == (0.0, 0.0)


def test_frechet_distance_is_symmetric_and_shift_is_squared():
  a, b = _moments(_features(0, 101)), _moments(_features(1, 59))
  forth, back = _frechet(a, b), _frechet(b, a)
  assert forth == pytest.approx(back, rel=1e-10)
  shifted = _moments(_features(0, 101) + 2)
  assert _frechet(a, shifted) == pytest.approx(7 * 4, rel=1e-5)


def test_inception_score_range():
  one_hot = np.eye(7, dtype=np.float32)[np.arange(70) % 7] * 1e4
  # The suite's float32 softmax underflows here and gives NaN.
  assert adm.inception_score(one_hot) == pytest.approx(7)
  assert adm.inception_score(np.zeros((11, 7))) == pytest.approx(1)
  by_class = one_hot[np.argsort(np.arange(70) % 7)]
  assert adm.inception_score(by_class, 10) == pytest.approx(1)
  # 70 = 60 + 10: the short split counts as much as the full one.
  full, short = adm.inception_score(by_class[:60], 60), 1.0
  score = adm.inception_score(by_class, 60)
  assert score == pytest.approx((full + short) / 2)
  for split_size, logits in ((0, one_hot), (5, one_hot[:0])):
    with pytest.raises(ValueError, match="split_size"):
      adm.inception_score(logits, split_size)
  with pytest.raises(ValueError, match="NaN"):
    adm.inception_score(one_hot * np.nan)


def test_precision_recall_on_a_line():
  real = np.arange(5.0)[:, None]  # k = 1: every ball has radius 1
  fake = np.array([[-1.0], [0.5], [9.0], [9.5]])  # radii 1.5, 1.5, 0.5, 0.5
  np.testing.assert_array_equal(adm.squared_radii(real, 1), np.ones(5))
  in_real, in_fake = adm.manifold_members(real, fake, 1)
  np.testing.assert_array_equal(in_real, [True, True, False, False])
  np.testing.assert_array_equal(in_fake, [True, True, True, False, False])
  assert _precision_recall(real, fake, 1) == (0.5, 0.6)


def test_precision_recall_takes_jax_arrays():
  real, fake = _features(0, 31), _features(1, 29)
  pair = _precision_recall(jnp.asarray(real), jnp.asarray(fake))
  assert pair == _precision_recall(real, fake)


def test_precision_recall_errors():
  real = _features(0, 11)
  with pytest.raises(ValueError, match="k is 3 for 3 rows"):
    _precision_recall(real, real[:3])
  with pytest.raises(ValueError, match="k is 0"):
    _precision_recall(real, real, 0)
  with pytest.raises(ValueError, match="7 wide and fake ones 5"):
    _precision_recall(real, _features(0, 11, width=5))
  with pytest.raises(ValueError, match="NaN or infinity"):
    _precision_recall(real, real * np.inf)
