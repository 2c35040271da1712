"""Refinement diagnostics against their definitions, on tiny models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tensorar_jax.evaluation import diagnostics
from tensorar_jax.method import sampling, windows
from tensorar_jax.method.noising import NoiseConfig
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import weights
from tests import programs, tiny
from tests.contract import families

SETTINGS = {
  "plain": SamplingConfig(),
  "guided, drafts colder": SamplingConfig(
    guidance=1.7, draft_temperature=0.6, top_k=5
  ),
}


def wrapped(family, window=3):
  base = families.backbone(family)
  make = lambda rngs: TensorAR(base, window=window, rngs=rngs)
  return tiny.redraw(weights.abstract(make), 1)


def held_out_batch(model, count=5, seed=0):
  tokens = families.tokens(model.vocab_sizes, count, model.num_tokens, seed)
  return {"tokens": np.asarray(tokens), "label": np.arange(count) % 5}


def conds(labels):
  cond = tiny.CLASSES.encode(labels)
  return cond, tiny.CLASSES.null(cond)


@pytest.mark.parametrize("family", ["llamagen", "open_magvit2"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_along_its_own_tokens_the_drafts_are_the_samplers(family, settings):
  """The same uniform numbers and committed tokens give the same windows."""
  model, config = wrapped(family), SETTINGS[settings]
  pair, rng = conds(np.arange(3)), jax.random.key(5)
  free = sampling.generate(model, *pair, rng, config)
  along = sampling.draft_along(model, free.tokens, *pair, rng, config)
  np.testing.assert_array_equal(along, free.drafts)


@pytest.mark.parametrize("family", ["llamagen", "open_magvit2"])
def test_along_other_tokens_each_draft_is_behind_windows_of_drafts(family):
  """Greedy drafts are the argmax behind the very windows returned."""
  model, cond = wrapped(family), tiny.cond()
  tokens = families.tokens(model.vocab_sizes, seed=3)
  greedy = SamplingConfig(draft_temperature=0.0)
  got = sampling.draft_along(
    model, tokens, cond, None, jax.random.key(0), greedy
  )
  np.testing.assert_array_equal(got[:, :, 0], tokens)
  valid = windows.valid_slots(jnp.arange(8), 3, 9)
  hidden = programs.forward(model, cond, got[:, :-1], valid)
  for f, logits in enumerate(programs.logits(model, hidden, got)):
    want = jnp.argmax(logits[:, :, 1:], axis=-1)
    np.testing.assert_array_equal(got[:, :, 1:, f], want)
  # They are drafts, not the tokens to come.
  clean, _ = windows.unfold(tokens, 3)
  assert (got[:, :-2, 1:] != clean[:, :-2, 1:]).any()


def test_a_path_of_another_shape_is_refused():
  model = tiny.wrapped(2)
  with pytest.raises(ValueError, match=r"shape \(2, 8, 1\).*\(2, 9, 1\)"):
    sampling.draft_along(
      model, tiny.tokens()[:, :8], tiny.cond(), None, jax.random.key(0)
    )


def by_hand(model, batch, read):
  """CE, accuracy [k] and window accuracy [k - 1], slot by slot in NumPy."""
  tokens, k = batch["tokens"], model.window
  valid = windows.valid_slots(jnp.arange(8), k, 9)
  cond = tiny.CLASSES.encode(batch["label"])
  hidden = programs.forward(model, cond, read, valid)
  ce, accuracy, shown = np.zeros(k), np.zeros(k), np.zeros(k - 1)
  for j in range(k):
    target, states = tokens[:, j:], hidden[:, : 9 - j, j]
    right = True
    logits_of = programs.logits(model, states, jnp.asarray(target))
    for f, logits in enumerate(logits_of):
      logp = np.asarray(jax.nn.log_softmax(logits))
      own = target[..., f]
      ce[j] -= np.take_along_axis(logp, own[..., None], -1).mean()
      right = right & (logp.argmax(-1) == own)
    accuracy[j] = right.mean()
    if j:
      slot = read[:, : 9 - j, j]
      shown[j - 1] = (slot == tokens[:, j : j + slot.shape[1]]).all(-1).mean()
  return ce, accuracy, shown


@pytest.mark.parametrize("family", ["llamagen", "open_magvit2"])
def test_held_out_numbers_are_those_behind_the_windows(family):
  model, config = wrapped(family), SETTINGS["guided, drafts colder"]
  batch = held_out_batch(model)
  found = diagnostics.held_out(
    model, tiny.CLASSES, batch, config, NoiseConfig("none"), 5
  )
  rng = jax.random.fold_in(jax.random.key(diagnostics.SEED), 0)
  own = sampling.draft_along(
    model,
    batch["tokens"],
    *conds(batch["label"]),
    jax.random.split(rng)[1],
    config,
  )
  clean, _ = windows.unfold(jnp.asarray(batch["tokens"]), 3)
  read = {"training_noise": clean[:, :-1], "own_drafts": own[:, :-1]}
  names = ("cross_entropy", "accuracy", "window_accuracy")
  for kind, tokens in read.items():
    want = by_hand(model, batch, tokens)
    for name, values in zip(names, want, strict=True):
      np.testing.assert_allclose(found[name][kind], values, rtol=1e-4)
  assert found["window_accuracy"]["training_noise"] == [1.0, 1.0]
  assert max(found["window_accuracy"]["own_drafts"]) < 0.9


def test_the_last_batch_counts_its_own_images_alone():
  model = tiny.wrapped(3)
  batch = held_out_batch(model)

  config = SETTINGS["guided, drafts colder"]

  def held_out(size):
    found = diagnostics.held_out(
      model, tiny.CLASSES, batch, config, NoiseConfig("none"), size
    )
    return [row["training_noise"] for row in found.values()]

  for one, other in zip(held_out(3), held_out(7), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_windows_with_full_noise_are_right_by_chance():
  model = tiny.wrapped(2)
  batch = held_out_batch(model, count=200)
  noise = NoiseConfig("categorical", schedule=(0, 1))
  found = diagnostics.held_out(
    model, tiny.CLASSES, batch, SamplingConfig(), noise, 200
  )
  (shown,) = found["window_accuracy"]["training_noise"]
  spread = (10 / 121 / (200 * 8)) ** 0.5
  np.testing.assert_allclose(shown, 1 / 11, atol=5 * spread)


def test_copy_rate_of_windows_made_by_hand():
  # The draft of position n + j at step n is n + j itself: always copied.
  position = np.arange(7)[:, None] + np.arange(3)
  drafts = np.broadcast_to(position[None, :, :, None], (2, 7, 3, 1)).copy()
  assert diagnostics.copy_rate(drafts) == [1.0, 1.0]
  drafts[0, 2, 1] = 99  # of position 3, one look before
  drafts[1, 0, 2] = 99  # of position 2, two looks before
  drafts[:, 6, 1:] = 99  # behind the end: no position, no matter
  drafts[:, 5, 2] = 99
  rates = diagnostics.copy_rate(drafts)
  np.testing.assert_allclose(rates, [1 - 1 / 12, 1 - 1 / 10])
  # A token is copied if all its sub-tokens are.
  pairs = np.concatenate([drafts, np.zeros_like(drafts)], axis=-1)
  assert diagnostics.copy_rate(pairs) == rates
  pairs[:, :, 0, 1] = 5
  assert diagnostics.copy_rate(pairs) == [0.0, 0.0]
  assert diagnostics.copy_rate(drafts[:, :, :1]) == []


def test_entropy_is_scipys():
  rng = np.random.RandomState(0)
  logits = rng.normal(size=(2, 3, 7)).astype(np.float32) * 2
  other = rng.normal(size=(2, 3, 5)).astype(np.float32)
  config = SamplingConfig(temperature=0.7)
  got = diagnostics.entropy((jnp.asarray(logits), jnp.asarray(other)), config)
  want = sum(
    scipy.stats.entropy(np.exp(x / np.float32(0.7)), axis=-1)
    for x in (logits, other)
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)
  one = (jnp.asarray(logits),)
  top = np.sort(logits)[..., -2:]
  np.testing.assert_allclose(
    diagnostics.entropy(one, SamplingConfig(top_k=2)),
    scipy.stats.entropy(np.exp(top), axis=-1),
    rtol=1e-5,
  )
  assert (diagnostics.entropy(one, SamplingConfig(temperature=0.0)) == 0).all()
  flat = diagnostics.entropy((jnp.zeros((4, 7)),), SamplingConfig())
  np.testing.assert_allclose(flat, np.log(7), rtol=1e-6)


def measure(model, config):
  batch = held_out_batch(model)
  return diagnostics.measure(
    model, tiny.CLASSES, batch, config, NoiseConfig(), 5
  )


@pytest.mark.parametrize("family", ["llamagen", "open_magvit2"])
def test_everything_is_there_and_is_json(family):
  model = wrapped(family)
  found = measure(model, SETTINGS["guided, drafts colder"])
  assert json.loads(json.dumps(found)) == found
  assert found["window"] == 3 and len(found["copy_rate"]) == 2
  assert 0 < found["entropy"] < sum(np.log(model.vocab_sizes))
  lengths = {"cross_entropy": 3, "accuracy": 3, "window_accuracy": 2}
  for name, length in lengths.items():
    assert list(found[name]) == ["training_noise", "own_drafts"]
    assert all(len(values) == length for values in found[name].values())
  steps = found["steps"]
  assert steps["rows"] == steps["tokens"] == model.num_tokens
  assert 1 < steps["min"] <= steps["mean"] <= steps["max"] <= 9


def test_the_base_model_has_no_refinement_to_measure():
  found = measure(TensorAR(tiny.backbone()), SamplingConfig())
  names = {"window", "entropy", "cross_entropy", "accuracy", "steps"}
  assert set(found) == names
  for name in ("cross_entropy", "accuracy"):
    assert list(found[name]) == ["training_noise"]
    assert len(found[name]["training_noise"]) == 1
