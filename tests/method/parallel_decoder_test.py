"""The parallel decoder draws what the window decoder draws, in fewer steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensorar_jax.conditioning import conditions
from tensorar_jax.method import (
  decoding,
  drawing,
  marginals,
  parallel_decoder,
  sampling,
  sampling_config,
)
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import weights
from tests import tiny
from tests.contract import families
from tests.method.drawing_test import AwayFromEarlier

GUMBEL = SamplingConfig(draw="gumbel")
KEY = jax.random.key(3)


def wrapped(name, window):
  base = families.backbone(name)
  if window == 1:
    return TensorAR(base)
  make = lambda rngs: TensorAR(base, window=window, rngs=rngs)
  return tiny.redraw(weights.abstract(make), 1)


def both(model, cond, config, rows=4, guess="last_row", table=None):
  """(samples of the window decoder, of the parallel one)."""
  null = conditions.null(cond)
  want = sampling.generate(model, cond, null, KEY, config)
  config = dataclasses.replace(
    config, decoder="parallel", rows=rows, first_guess=guess
  )
  got = sampling.generate(model, cond, null, KEY, config, marginals=table)
  return want, got


def assert_same(want, got):
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.drafts, want.drafts)


@pytest.mark.parametrize("name", families.BACKBONES)
def test_every_family_draws_the_same_tokens(name):
  config = dataclasses.replace(
    GUMBEL, guidance=2.0, guidance_power=1.0, temperature=0.8, top_k=7
  )
  window = 1 if name == "rar" else 3
  model, cond = wrapped(name, window), families.cond(name, [0, 1, 2])
  want, got = both(model, cond, config)
  assert_same(want, got)
  steps = np.array(got.steps)
  assert (np.diff(steps, axis=1) >= 0).all() and (steps[:, 0] == 0).all()
  # Several tokens of a step, at most as many as rows, and none for long.
  _, counts = np.unique(steps[0], return_counts=True)
  assert counts.max() <= 4 and steps.max() < model.num_tokens
  np.testing.assert_array_equal(want.steps[0], np.arange(model.num_tokens))


@pytest.mark.parametrize(
  "batch, options",
  [
    (1, dict(draw="inverse_cdf")),
    (1, dict(temperature=0.0)),
    (8, dict(top_p=0.8, draft_temperature=0.5)),
    (8, dict(draw=AwayFromEarlier(), guidance=1.5)),
    (1, dict(guidance=3.0, guidance_interval=(2, 6))),
  ],
)
def test_with_every_setting(batch, options):
  config = dataclasses.replace(GUMBEL, return_logits=True, **options)
  want, got = both(tiny.wrapped(3), tiny.cond(batch), config)
  assert_same(want, got)
  np.testing.assert_allclose(got.logits[0], want.logits[0], atol=1e-4)


@pytest.mark.parametrize("rows", [1, 9])
def test_with_any_number_of_rows(rows):
  want, got = both(tiny.wrapped(2), tiny.cond(3), GUMBEL, rows=rows)
  assert_same(want, got)
  if rows == 1:  # nothing is guessed
    np.testing.assert_array_equal(got.steps, want.steps)


def table(seed=0):
  tokens = np.random.RandomState(seed).randint(0, 11, (40, 9, 1))
  return marginals.measure(tokens, (11,), np.arange(40) % 5, num_classes=5)


def test_every_first_guess_has_a_name():
  assert tuple(parallel_decoder.GUESSES) == sampling_config.GUESSES


@pytest.mark.parametrize(
  "guess, window", [("left", 1), ("marginals", 1), ("above", 3)]
)
def test_whatever_is_guessed_first(guess, window):
  want, got = both(
    tiny.wrapped(window) if window > 1 else TensorAR(tiny.backbone()),
    tiny.cond(3),
    GUMBEL,
    guess=guess,
    table=table(),
  )
  assert_same(want, got)


def test_right_guesses_are_all_kept():
  """Of a model whose tokens are known beforehand: T / m steps."""
  base = tiny.backbone()
  model = TensorAR(base)
  cond, config = tiny.cond(2), dataclasses.replace(GUMBEL, temperature=0.01)
  want = sampling.generate(model, cond, None, KEY, config).tokens
  known = np.full((2, 9, 11), -1e4, np.float32)
  np.put_along_axis(known, np.array(want), 0.0, axis=-1)
  known = np.concatenate([known, np.zeros((3, 9, 11), np.float32)])
  config = dataclasses.replace(
    config, decoder="parallel", rows=4, first_guess="marginals"
  )
  got = sampling.generate(
    model, cond, None, KEY, config, marginals=marginals.Marginals((known,))
  )
  np.testing.assert_array_equal(got.tokens, want)
  steps = [0, 1, 1, 1, 1, 2, 2, 2, 2]
  np.testing.assert_array_equal(got.steps, [steps, steps])


def test_right_guesses_of_windows_are_kept_too(monkeypatch):
  """With a rule that sees two earlier looks, from the first steps on."""
  config = dataclasses.replace(GUMBEL, draw=AwayFromEarlier())
  model, cond = tiny.wrapped(3), tiny.cond(2)
  want = sampling.generate(model, cond, None, KEY, config)
  known = jnp.pad(want.drafts, ((0, 0), (0, 8), (0, 0), (0, 0)))

  def know(last):
    return jax.vmap(lambda row, index: row[index])(known, last.steps)

  monkeypatch.setitem(parallel_decoder.GUESSES, "left", know)
  config = dataclasses.replace(
    config, decoder="parallel", rows=5, first_guess="left"
  )
  got = sampling.generate(model, cond, None, KEY, config)
  assert_same(want, got)
  np.testing.assert_array_equal(got.steps[0], [0, *[1] * 5, *[2] * 3])


def test_above_is_the_grids_row_above():
  scales = np.ones((9, 1), np.float32)
  drawer = decoding.WindowDrawer(
    model=TensorAR(tiny.backbone()),  # of 3 x 3 tokens
    config=GUMBEL,
    rule=drawing.GumbelMax(),
    scales=scales,
    guided=False,
  )
  last = parallel_decoder.LastRow(
    drawer=drawer,
    inputs=decoding.SamplingInputs({}, None, KEY, None, scales),
    keys=jax.random.split(KEY, 1),
    step=jnp.asarray([4]),
    vectors=jnp.zeros((1, 1, 16)),
    logits=jnp.zeros((1, 1, 11)),
    windows=jnp.arange(15)[None, :, None, None],
    count=4,
  )
  above = parallel_decoder.GUESSES["above"](last)
  # Positions 5 to 8; 8 is below 5, which is a guess itself: that is below 2.
  np.testing.assert_array_equal(above[0, :, 0, 0], [2, 3, 4, 2])
  last = dataclasses.replace(last, step=jnp.asarray([0]))
  above = parallel_decoder.GUESSES["above"](last)
  np.testing.assert_array_equal(above[0, :, 0, 0], [0, 0, 0, 0])


def test_places_are_refilled_and_images_stay_the_same():
  model, count = tiny.wrapped(3), 7
  config = dataclasses.replace(GUMBEL, guidance=1.5)
  cond, null = tiny.cond(count), conditions.null(tiny.cond(count))
  want = sampling.generate(model, cond, null, KEY, config)
  config = dataclasses.replace(config, decoder="parallel", rows=3)
  index, waiting = np.arange(3), list(range(3, count))
  state, is_new, found = None, np.ones(3, bool), {}

  def rows(tree, index):
    return jax.tree.map(lambda a: np.array(a)[index], tree)

  while len(found) < count:
    state, out = sampling.advance(
      model=model,
      cond=rows(cond, index),
      null=rows(null, index),
      rng=KEY,
      config=config,
      image_index=index,
      state=state,
      is_new=is_new,
      enough=1 if waiting else 3,
    )
    is_new = np.zeros(3, bool)
    for place in np.flatnonzero(np.array(state.count) == model.num_tokens):
      found.setdefault(int(index[place]), np.array(out.drafts)[place])
      if waiting:
        index = index.copy()
        index[place], is_new[place] = waiting.pop(0), True
  drafts = np.stack([found[i] for i in range(count)])
  np.testing.assert_array_equal(drafts, want.drafts)


def test_gumbel_and_inverse_cdf_have_one_law():
  """Counts of 20,000 draws against the probabilities, after the filters."""
  draws, row = 20000, jnp.asarray([1.5, 0.0, 0.7, -1.0, 0.2, 1.4, -3.0])
  logits = jnp.broadcast_to(row, (draws, 1, len(row)))
  keys = jax.random.split(jax.random.key(0), draws)
  noise = drawing.Noise(keys, jnp.zeros(draws, jnp.int32), 1, 1, 0)
  for options in ({}, dict(top_k=5), dict(top_p=0.8)):
    config = drawing.TokenConfig(temperature=0.9, **options)
    want = draws * np.array(drawing.token_probs(row, 0.9, config))
    for rule in drawing.RULES.values():
      drawn = rule.draw(0, noise, logits, None, None, config)
      counts = np.bincount(np.array(drawn).ravel(), minlength=len(row))
      possible = want > 0
      assert (counts[~possible] == 0).all()
      off = (counts - want)[possible] ** 2 / want[possible]
      # 99.99 % of chi-square with 6 degrees of freedom is below 27.9.
      assert off.sum() < 27.9


def test_random_numbers_do_not_depend_on_what_is_drawn_together():
  keys, steps = jax.random.split(KEY, 6), jnp.asarray([4, 1, 3, 1, 0, 8])
  all_ = drawing.Noise(keys, steps, slots=3, factors=2, f=1)
  one = drawing.Noise(keys[2:3], steps[2:3], slots=1, factors=2, f=1)
  np.testing.assert_array_equal(all_.gumbel(7)[2:3, :1], one.gumbel(7))
  np.testing.assert_array_equal(all_.uniform()[2:3, :1], one.uniform())
  other = dataclasses.replace(one, f=0)
  assert (np.array(other.gumbel(7)) != np.array(one.gumbel(7))).all()


@pytest.mark.parametrize(
  "settings, words",
  [
    (dict(rows=0), "rows=0: expected 1 or more"),
    (dict(decoder="both"), "decoder='both': choose one of"),
    (dict(first_guess="best"), "first_guess='best': choose one of"),
  ],
)
def test_settings_are_checked(settings, words):
  with pytest.raises(ValueError, match=words):
    SamplingConfig(**settings)


def test_what_it_needs_is_said():
  model, cond = TensorAR(tiny.backbone()), tiny.cond()

  def draw(table=None, **settings):
    config = dataclasses.replace(GUMBEL, decoder="parallel", **settings)
    sampling.generate(model, cond, None, KEY, config, marginals=table)

  with pytest.raises(ValueError, match="rows=10: the image has 9 tokens"):
    draw(rows=10)
  with pytest.raises(ValueError, match="needs how often each token occurs"):
    draw(rows=2, first_guess="marginals")
  other = marginals.measure(np.zeros((1, 9, 1), int), (12,))
  with pytest.raises(ValueError, match=r"the model has \[\(9, 11\)\]"):
    draw(other, rows=2, first_guess="marginals")
