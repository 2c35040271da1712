import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensorar_jax.method import noising, windows
from tensorar_jax.method.noising import NoiseConfig
from tests import tiny


@pytest.mark.parametrize(
  "name, want",
  [
    ("linear", [0, 0.25, 0.5, 0.75]),
    ("sine", [0, 0.383, 0.707, 0.924]),
    ("sqrt", [0, 0.5, 0.707, 0.866]),
    ("exponential", [0, 0.5, 0.595, 0.658]),
    ("root", [0, 0.841, 0.917, 0.965]),
  ],
)
def test_schedules_are_the_table_of_the_spec(name, want):
  got = noising.beta(name, 4)
  np.testing.assert_allclose(got, [*want, 1], atol=5e-4)


def test_schedule_start_one_shifts_and_ends_at_one():
  np.testing.assert_allclose(
    noising.beta("linear", 4, start=1), [0, 0.5, 0.75, 1, 1]
  )


def test_a_list_is_taken_as_it_is():
  np.testing.assert_allclose(noising.beta([0, 0.3, 1], 3), [0, 0.3, 1, 1])


@pytest.mark.parametrize("bad", [[0, 0.5], [0.1, 0.5, 0.5], [0, 0.5, 1.5]])
def test_a_bad_list_is_refused(bad):
  with pytest.raises(ValueError, match="schedule"):
    noising.beta(bad, 3)


@pytest.mark.parametrize(
  "options",
  [
    {"kind": "salt"},
    {"schedule": "steep"},
    {"schedule_start": 2},
    {"draft_fraction": 1.5},
  ],
)
def test_a_bad_noise_config_names_the_value(options):
  with pytest.raises(ValueError, match=str(next(iter(options.values())))):
    NoiseConfig(**options)


def test_categorical_keeps_what_the_schedule_says():
  vocab, window = 11, 4
  beta = noising.beta("exponential", window)[:-1]
  clean = jnp.zeros((64, 128, window, 1), jnp.int32) + 7
  noised = noising.categorical(
    jax.random.key(0), clean, jnp.asarray(beta, jnp.float32), (vocab,)
  )
  kept = np.asarray((noised == clean).mean(axis=(0, 1, 3)))
  want = 1 - beta + beta / vocab
  sigma = np.sqrt(want * (1 - want) / (64 * 128))
  assert kept[0] == 1
  assert (np.abs(kept - want) <= 4 * sigma + 1e-9).all()
  # What replaces a token is uniform over the vocabulary.
  counts = np.bincount(np.asarray(noised[:, :, 3]).ravel(), minlength=vocab)
  others = np.delete(counts, 7)
  assert others.min() > 0.8 * others.mean()


def test_sub_tokens_of_a_position_are_resampled_together():
  clean = jnp.zeros((32, 64, 2, 2), jnp.int32)
  noised = noising.categorical(
    jax.random.key(0), clean, jnp.asarray([0.0, 0.5]), (1009, 997)
  )
  changed = np.asarray(noised != 0)[:, :, 1]
  # A resampled token keeps a sub-token with probability 1/1000 only.
  assert (changed[..., 0] != changed[..., 1]).mean() < 0.01
  assert 0.45 < changed[..., 0].mean() < 0.55
  assert np.asarray(noised)[..., 1].max() < 997


@pytest.mark.parametrize("kind", noising.KINDS)
def test_every_kind_leaves_slot_zero_alone(kind):
  model = tiny.wrapped(3)
  clean, valid = windows.unfold(tiny.tokens(), 3)
  config = NoiseConfig(kind=kind, schedule=[0, 1.0, 1.0], draft_fraction=0.5)
  noised, extra = noising.corrupt(
    model, tiny.cond(), clean[:, :-1], valid[:-1], jax.random.key(1), config
  )
  np.testing.assert_array_equal(noised[:, :, 0], clean[:, :-1, 0])
  if extra is not None:
    np.testing.assert_array_equal(extra[:, :, 0], 0)
  if kind == "gaussian":
    assert extra is not None
    assert 0.05 < float(jnp.var(extra[:, :, 1:])) < 0.15
  elif kind == "none":
    np.testing.assert_array_equal(noised, clean[:, :-1])
  else:
    assert (noised[:, :, 1:] != clean[:, :-1, 1:]).any()


def test_codebook_takes_the_code_nearest_in_angle():
  rng, rates = jax.random.key(3), jnp.asarray([0.0, 0.4, 0.9])
  codes = jax.random.normal(jax.random.key(0), (11, 5))
  clean, _ = windows.unfold(tiny.tokens(), 3)
  got = np.asarray(noising.codebook(rng, clean, rates, codes))
  other = np.asarray(noising.uniform_tokens(rng, clean.shape, (11,)))
  table = np.asarray(codes)
  for index in np.ndindex(clean.shape):
    rate = float(rates[index[2]])
    mixed = (1 - rate) * table[clean[index]] + rate * table[other[index]]
    cosine = table @ mixed / np.linalg.norm(table, axis=1)
    want = np.argmax(cosine) if rate else clean[index]
    assert got[index] == want


def test_codebook_searches_in_chunks(monkeypatch):
  codes = jax.random.normal(jax.random.key(0), (11, 5))
  clean, _ = windows.unfold(tiny.tokens(), 3)
  rates = jnp.asarray([0.0, 0.4, 0.9])
  whole = noising.codebook(jax.random.key(3), clean, rates, codes)
  monkeypatch.setattr(noising, "_CHUNK", 7)
  parts = noising.codebook.__wrapped__(jax.random.key(3), clean, rates, codes)
  np.testing.assert_array_equal(whole, parts)


def test_drafts_come_from_the_models_own_predictions():
  """With draft_fraction 1 and beta 1, slot j is a sample of logits[t, j]."""
  model = tiny.wrapped(3)
  clean, valid = windows.unfold(tiny.tokens(batch=2), 3)
  cond = tiny.cond()
  want = np.zeros((8, 3, 11))
  got = np.zeros((8, 3, 11))
  config = NoiseConfig(
    kind="drafts", schedule=[0, 1.0, 1.0], draft_fraction=1.0
  )
  # The drafts of this model do not depend on its noised inputs if slot 0 is
  # all it reads: without gain, Q_in is silent.
  model.encoder.query.gain[...] = jnp.zeros_like(model.encoder.query.gain[...])
  hidden = model(cond, clean[:, :-1], valid[:-1])
  probs = jax.nn.softmax(model.logits(hidden, clean)[0])[0, :8]
  want = np.asarray(probs)
  draw = jax.jit(
    lambda rng: noising.corrupt(
      model, cond, clean[:, :-1], valid[:-1], rng, config
    )[0]
  )
  count = 400
  for seed in range(count):
    noised = np.asarray(draw(jax.random.key(seed)))[0, :, :, 0]
    for t in range(8):
      for j in range(3):
        got[t, j, noised[t, j]] += 1 / count
  error = np.abs(got[:, 1:] - want[:, 1:]).max()
  assert error < 5 * np.sqrt(0.25 / count)
