"""The property tests of docs/method.md, section 8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensorar_jax.method import noising, objective, windows
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import weights
from tests import programs, tiny


def test_window_one_is_the_base_model_bit_for_bit():
  """Property 1, teacher forcing: inside one compiled program."""
  base = tiny.backbone()
  model = TensorAR(base, window=1)
  assert not hasattr(model, "encoder") and not hasattr(model, "decoder")
  tokens, cond = tiny.tokens(), tiny.cond()
  inputs, valid = windows.unfold(tokens, 1)

  @jax.jit
  def both(model):
    hidden = model(cond, inputs[:, :-1], valid[:-1])[:, :, 0]
    own = model.backbone(cond, model.backbone.embed(tokens[:, :-1]))
    return (
      model.logits(hidden, tokens)[0],
      model.backbone.logits(own, tokens)[0],
    )

  ours, base_logits = both(model)
  np.testing.assert_array_equal(ours, base_logits)


@pytest.mark.parametrize("window", [2, 4, 9])
@pytest.mark.parametrize("residual", ["first", "all"])
def test_freshly_wrapped_predicts_as_the_base_at_slot_zero(window, residual):
  """Property 2: for any noise in the windows."""
  model = tiny.fresh(window, output_residual=residual, depth=2, mlp_ratio=4.0)
  tokens, cond = tiny.tokens(), tiny.cond()
  inputs, valid = windows.unfold(tokens, window)
  rates = jnp.ones((window,)).at[0].set(0)
  noised = noising.categorical(jax.random.key(0), inputs, rates, (11,))
  hidden = programs.forward(model, cond, noised[:, :-1], valid[:-1])[:, :, 0]
  base = model.backbone
  want = programs.forward(base, cond, base.embed(tokens[:, :-1]))
  np.testing.assert_allclose(
    programs.logits(model, hidden, tokens)[0],
    programs.logits(base, want, tokens)[0],
    atol=1e-5,
  )


def test_without_input_residual_slot_zero_is_not_the_base():
  model = tiny.fresh(3, input_residual=False)
  tokens, cond = tiny.tokens(), tiny.cond()
  inputs, valid = windows.unfold(tokens, 3)
  hidden = programs.forward(model, cond, inputs[:, :-1], valid[:-1])[:, :, 0]
  x = model.backbone.embed(tokens[:, :-1])
  want = programs.forward(model.backbone, cond, x)
  assert np.abs(hidden - want).max() > 0.1


@pytest.mark.parametrize(
  "residual, same",
  [("first", [1, 0, 0]), ("all", [1, 1, 1]), ("none", [0] * 3)],
)
def test_output_residuals_reach_the_slots_they_name(residual, same):
  model = tiny.fresh(3, output_residual=residual)
  hidden = jax.random.normal(jax.random.key(0), (2, 16))
  out = model.decode_window(hidden)
  for j in range(3):
    assert bool((out[:, j] == hidden).all()) == bool(same[j])


def _gradient_reaches(model, beta, kind):
  """[prediction, position]: does logits[n] move with clean token position?

  Tokens are discrete, so every clean token is replaced in turn and the logits
  of every prediction are compared, with the same noise.
  """
  tokens, cond = tiny.tokens(batch=1), tiny.cond(1)
  noise = noising.NoiseConfig(kind=kind, schedule=beta)

  @jax.jit
  def logits(tokens):
    inputs, valid = windows.unfold(tokens, model.window)
    noised, _ = noising.corrupt(
      model, cond, inputs[:, :-1], valid[:-1], jax.random.key(5), noise
    )
    hidden = model(cond, noised, valid[:-1])
    return model.logits(hidden, inputs)[0][0]

  before = logits(tokens)
  reaches = np.zeros((9, 9), bool)
  for position in range(9):
    other = tokens.at[0, position, 0].set((tokens[0, position, 0] + 3) % 11)
    moved = np.abs(logits(other) - before).max(axis=(1, 2)) > 1e-5
    reaches[:, position] = moved
  return reaches


def test_with_beta_one_no_prediction_sees_its_own_targets():
  """Property 4: prediction n depends on tokens < n only."""
  reaches = _gradient_reaches(tiny.wrapped(3), [0, 1.0, 1.0], "categorical")
  n, position = np.indices((9, 9))
  np.testing.assert_array_equal(reaches, position < n)


def test_without_noise_the_windows_leak_the_targets():
  """Property 4: that is what the noise is for."""
  reaches = _gradient_reaches(tiny.wrapped(3), [0, 0.0, 0.0], "none")
  n, position = np.indices((9, 9))
  np.testing.assert_array_equal(reaches, (position < n + 2) & (n > 0))


def test_window_of_all_tokens_trains_and_pads_at_the_end():
  """Property 3: predictions n > T - k see PAD and give it no loss."""
  model = tiny.wrapped(9)
  tokens, cond = tiny.tokens(), tiny.cond()
  noise, config = noising.NoiseConfig(), objective.LossConfig("uniform")
  loss, metrics = jax.jit(
    lambda model, rng: objective.tensorar_loss(
      model, cond, tokens, rng, noise, config
    )
  )(model, jax.random.key(0))
  assert np.isfinite(loss)
  inputs, valid = windows.unfold(tokens, 9)
  assert valid.sum() == 45
  # What a PAD slot holds does not matter; PAD's embedding does.
  junk = jnp.where(valid[:, :, None], inputs, 5)
  a = model.encode_window(inputs, valid)
  np.testing.assert_array_equal(a, model.encode_window(junk, valid))
  model.encoder.pad[...] += 1.0
  assert (model.encode_window(inputs, valid) != a).any()
  assert len(metrics) == 18


def test_gradients_reach_every_weight_but_the_decoders_queries_and_keys():
  """With one key Q_out's attention weights are 1, whatever q and k are."""
  skeleton, params, frozen = weights.split(tiny.wrapped(3))
  tokens, cond = tiny.tokens(), tiny.cond()

  def loss(params):
    return objective.tensorar_loss(
      skeleton.merge(params, frozen),
      cond,
      tokens,
      jax.random.key(0),
      noising.NoiseConfig(),
      objective.LossConfig("uniform"),
    )[0]

  grads = jax.jit(jax.grad(loss))(params)
  silent = {path for path, g in grads.items() if not np.abs(g).max() > 0}
  assert silent == {
    f"decoder/query/blocks/0/{name}"
    for name in ("cross/query/kernel", "cross/key/kernel", "cross_norm/scale")
  }


@pytest.mark.parametrize(
  "options",
  [{"output_residual": "last"}, {"depth": 0}, {"mlp_ratio": 0.01}],
)
def test_bad_options_are_refused_by_value(options):
  with pytest.raises(ValueError, match=str(next(iter(options.values())))):
    tiny.fresh(3, **options)


def test_new_weights_need_a_key():
  with pytest.raises(ValueError, match="rngs"):
    TensorAR(tiny.backbone(), window=2)
