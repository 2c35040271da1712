"""Tests of what the convolutional tokenizers share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tensorar_jax.nn import convolutions, image_tokenizer


def test_conv_is_initialised_as_in_pytorch():
  conv = convolutions.Conv(5, 13, 3, rngs=nnx.Rngs(0))
  for param in (conv.kernel[...], conv.bias[...]):
    assert 0.7 * (5 * 9) ** -0.5 < jnp.abs(param).max() <= (5 * 9) ** -0.5


def test_conv_keeps_the_size_and_doubles_or_halves_it_on_request():
  x = jax.random.normal(jax.random.key(0), (2, 6, 10, 5))

  def make(**options):
    return convolutions.Conv(5, 3, 3, rngs=nnx.Rngs(0), **options)

  assert make()(x).shape == (2, 6, 10, 3)
  assert make(strides=2, padding=1)(x).shape == (2, 3, 5, 3)
  doubled = make(upsample=True)(x)
  assert doubled.shape == (2, 12, 20, 3)
  want = make()(jnp.kron(x, jnp.ones((1, 2, 2, 1))))
  np.testing.assert_allclose(doubled, want, atol=1e-6)
  assert make(use_bias=False).bias is None
  assert make(dtype="bfloat16")(x).dtype == jnp.bfloat16


def test_group_norm_survives_a_big_mean():
  norm = convolutions.GroupNorm(4, 2, rngs=nnx.Rngs(0))
  x = 1000 + np.random.RandomState(0).normal(size=(2, 3, 5, 4))
  x = x.astype(np.float32)
  got = norm(jnp.asarray(x))
  groups = np.float64(x).reshape(2, 15, 2, 2)
  mean = groups.mean((1, 3), keepdims=True)
  variance = groups.var((1, 3), keepdims=True)
  want = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
  np.testing.assert_allclose(got, want, atol=5e-4)


def test_nearest_rows_are_nearest():
  table = jax.random.normal(jax.random.key(0), (11, 3))
  latents = jax.random.normal(jax.random.key(1), (2, 3, 5, 3))
  wide = np.asarray(latents, np.float64)[..., None, :]
  want = ((wide - np.asarray(table)) ** 2).sum(-1).argmin(-1)
  codes = convolutions.nearest_rows(latents, table)
  assert codes.dtype == jnp.int32
  np.testing.assert_array_equal(codes, want)
  # Of equal rows the first is taken.
  codes = convolutions.nearest_rows(latents, jnp.concatenate([table, table]))
  np.testing.assert_array_equal(codes, want)


def test_checks_name_value_expectation_and_remedy():
  assert image_tokenizer.token_grid(12, 20, 4) == (3, 5)
  for height, width in ((10, 20), (12, 0), (2, 4)):
    with pytest.raises(ValueError, match=f"{height}x{width}: .* of 4; crop"):
      image_tokenizer.token_grid(height, width, 4)
  image_tokenizer.check_norm_groups(2, (4, 6))
  with pytest.raises(ValueError, match=r"norm_groups=4 .*\[6\]; .* example 2"):
    image_tokenizer.check_norm_groups(4, (4, 6))
  tokens = jnp.zeros((2, 14, 1))
  image_tokenizer.check_length(tokens, (2, 7))
  with pytest.raises(ValueError, match=r"expected 15 .* \(3, 5\); pass"):
    image_tokenizer.check_length(tokens, (3, 5))
