"""Parts of a batch and recomputation change memory, not what is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tensorar_jax.experiment import schema
from tensorar_jax.method import losses
from tensorar_jax.nn import layers
from tensorar_jax.parallel import sharding, weights
from tensorar_jax.training import train_step
from tests import tiny


def linear_step(accumulate, loss):
  """One step of plain gradient descent on a linear model."""
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  tx = optax.sgd(0.1)
  skeleton, state = train_step.init_state(model, tx, 0, False)
  step = train_step.make_train_step(
    skeleton, loss, tx, 0.0, accumulate=accumulate
  )
  rng = np.random.default_rng(0)
  batch = {"x": rng.standard_normal((12, 3)), "y": rng.standard_normal((12, 2))}
  return step(state, None, jax.tree.map(jnp.float32, batch))


def test_a_step_leaves_the_callers_model_alone():
  model, tx = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), optax.sgd(0.1)
  skeleton, state = train_step.init_state(model, tx, 0, False)
  step = train_step.make_train_step(skeleton, squared_error, tx, 0.0)
  batch = {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 2))}
  before = np.asarray(model.kernel[...]).copy()
  step(state, None, batch)
  np.testing.assert_array_equal(model.kernel[...], before)


def squared_error(model, context, batch, rng, step):
  loss = jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
  return loss, {"first": batch["x"][0, 0], "draw": jax.random.uniform(rng)}


@pytest.mark.parametrize("accumulate", [2, 3, 12])
def test_parts_of_a_batch_add_up_to_it(accumulate):
  want, whole = linear_step(1, squared_error)
  got, parts = linear_step(accumulate, squared_error)
  for path, array in want.params.items():
    np.testing.assert_allclose(got.params[path], array, rtol=1e-5)
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)


def test_every_part_has_rows_and_random_numbers_of_its_own():
  seen = []

  def loss(model, context, batch, rng, step):
    jax.debug.callback(
      lambda x, u: seen.append((x[:, 0].tolist(), float(u))),
      batch["x"],
      jax.random.uniform(rng),
    )
    return squared_error(model, context, batch, rng, step)

  linear_step(3, loss)
  jax.effects_barrier()
  assert len({u for _, u in seen}) == 3
  assert len({x for rows, _ in seen for x in rows}) == 12


@functools.cache
def gradients(remat):
  """(loss, gradients, bytes of temporaries) of a wrapped model's loss."""
  model = tiny.wrapped(3)
  layers.set_remat(model, remat)
  skeleton, params, _ = weights.split(model)
  rng, batch = np.random.default_rng(0), 64
  inputs = jnp.asarray(rng.integers(0, 11, (batch, 8, 3, 1)), jnp.int32)
  targets = jnp.asarray(rng.integers(0, 11, (batch, 9, 3, 1)), jnp.int32)

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    model, valid = skeleton.merge(params), jnp.ones((9, 3), bool)
    hidden = model(tiny.cond(batch), inputs, valid[:-1])
    ones = np.ones(3)
    return losses.tensor_cross_entropy(
      model.logits, hidden, targets, valid, ones
    )[0]

  program = loss.lower(params).compile()
  return *program(params), program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_is_computed_again_is_the_same_and_needs_no_memory(remat):
  (want, want_grads, most), (got, grads, less) = map(gradients, ("none", remat))
  np.testing.assert_allclose(got, want, rtol=1e-6)
  for path, array in want_grads.items():
    np.testing.assert_allclose(grads[path], array, atol=1e-6)
  assert less < {"dots": 0.9, "full": 0.6}[remat] * most


def test_bad_choices_say_what_there_is():
  with pytest.raises(ValueError, match="remat='some': choose one of .*'full'"):
    schema.TrainConfig(remat="some")
  with pytest.raises(ValueError, match="no multiple of accumulate=3"):
    schema.TrainConfig(batch_size=8, accumulate=3)
  mesh = jax.sharding.AbstractMesh((2, 2, 1), sharding.AXES)
  sharding.check_batch(mesh, 16, 4)
  with pytest.raises(ValueError, match="= 4, times train.accumulate=3"):
    sharding.check_batch(mesh, 16, 3)
