import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensorar_jax.method import losses, noising, objective, windows
from tensorar_jax.method.noising import NoiseConfig
from tests import tiny


def test_rdm_weights_are_the_spec_s():
  weights = losses.slot_weights("rdm", noising.beta("exponential", 4))
  np.testing.assert_allclose(weights, [1, 0.159, 0.096, 0.342], atol=5e-4)
  weights = losses.slot_weights("rdm", noising.beta("linear", 4))
  np.testing.assert_allclose(weights, 1 / np.arange(1, 5))


def test_paper_weights_drop_the_sign_and_guard_beta_one():
  weights = losses.slot_weights("paper", noising.beta([0, 0.5, 1], 3))
  np.testing.assert_allclose(weights, [1, 0.5 / 0.5, 0])
  np.testing.assert_allclose(
    losses.slot_weights("uniform", noising.beta("sine", 3)), 1
  )


def test_bad_weights_are_refused():
  with pytest.raises(ValueError, match="best"):
    losses.slot_weights("best", noising.beta("sine", 3))
  with pytest.raises(ValueError, match="falls"):
    losses.slot_weights("rdm", noising.beta([0, 0.9, 0.3], 3))


def test_loss_is_the_double_sum_of_the_spec():
  model = tiny.wrapped(4)
  tokens, cond = tiny.tokens(), tiny.cond()
  noise, config = NoiseConfig(kind="none"), objective.LossConfig("paper")
  loss, metrics = objective.tensorar_loss(
    model, cond, tokens, None, noise, config
  )
  weights = objective.slot_weights(4, noise, config)
  inputs, valid = windows.unfold(tokens, 4)
  hidden = model(cond, inputs[:, :-1], valid[:-1])
  logp = np.asarray(jax.nn.log_softmax(model.logits(hidden, inputs)[0]))
  total, per_slot = 0.0, np.zeros(4)
  for b in range(2):
    for n in range(9):
      for j in range(4):
        if n + j < 9:
          ce = -logp[b, n, j, int(tokens[b, n + j, 0])]
          total += weights[j] * ce / (2 * 9)
          per_slot[j] += ce / (2 * (9 - j))
  np.testing.assert_allclose(loss, total, rtol=1e-5)
  for j in range(4):
    np.testing.assert_allclose(metrics[f"ce/{j}"], per_slot[j], rtol=1e-5)


def test_sub_tokens_add_up_and_are_right_together():
  logits = (
    jnp.log(jnp.asarray([[0.2, 0.8]])),
    jnp.log(jnp.asarray([[0.5, 0.3, 0.2]])),
  )
  ce, correct = losses.cross_entropy(logits, jnp.asarray([[1, 2]]))
  np.testing.assert_allclose(ce, -np.log(0.8 * 0.2), rtol=1e-6)
  assert not correct[0]


def test_images_that_are_not_valid_count_for_nothing():
  """Loss, metrics and gradients are those of the others alone."""
  hidden = jax.random.normal(jax.random.key(0), (3, 5, 2, 7))
  head = jnp.eye(7, 11)
  targets, valid = windows.unfold(tiny.tokens(batch=3, length=5), 2)

  @jax.jit
  def run(hidden, targets, valid):
    logits = lambda hidden, tokens, rng: (hidden @ head,)
    loss = lambda hidden: losses.tensor_cross_entropy(
      logits, hidden, targets, valid, np.array([1.0, 0.5])
    )
    return jax.value_and_grad(loss, has_aux=True)(hidden)

  rows = np.array([0, 2])
  want, gradient = run(hidden[rows], targets[rows], valid)
  per_image = jnp.array([True, False, True])[:, None, None] & valid
  got, moved = run(hidden, targets, per_image)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), got, want)
  np.testing.assert_allclose(moved[rows], gradient, atol=1e-7)
  np.testing.assert_array_equal(moved[1], 0)
  (loss, metrics), gradient = run(hidden, targets, per_image & False)
  assert loss == 0 and not any(metrics.values()) and not gradient.any()
