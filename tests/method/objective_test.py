"""Random order; the rest of the objective is in losses_test, noising_test."""

import jax
import jax.numpy as jnp
import numpy as np

from tensorar_jax.method import objective
from tensorar_jax.method.objective import LossConfig


def test_the_share_of_random_orders_is_the_published_one(parity):
  io = np.load(parity / "rar" / "schedules" / "io.npz")
  config = LossConfig(random_order=tuple(map(int, io["anneal_params"])))
  with jax.enable_x64():
    got = objective.random_rate(config, io["anneal_steps"])
  np.testing.assert_allclose(got, io["anneal_ratio"], rtol=1e-12)


def test_orders_are_permutations_or_raster():
  rng, raster = jax.random.key(0), np.arange(7)
  draw = lambda rate: np.asarray(
    objective.draw_order(rng, (2000, 7), jnp.asarray(rate))
  )
  order = draw(1.0)
  np.testing.assert_array_equal(np.sort(order), [raster] * 2000)
  # Every token comes first equally often; 5 standard deviations.
  first = np.bincount(order[:, 0], minlength=7) / 2000
  np.testing.assert_allclose(first, 1 / 7, atol=5 * (6 / 49 / 2000) ** 0.5)
  np.testing.assert_array_equal(draw(0.0), [raster] * 2000)
  share = (draw(0.5) != raster).any(axis=1).mean()
  np.testing.assert_allclose(share, 0.5, atol=5 * 0.5 / 2000**0.5)
