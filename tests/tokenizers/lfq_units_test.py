"""Units of the lookup-free tokenizer: shapes, bits, entropies, training."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tensorar_jax import interfaces
from tensorar_jax.parallel import weights
from tensorar_jax.tokenizers import lfq
from tests.tokenizers import common

SIZES = {"channels": 4, "channel_multipliers": (1, 2, 3), "num_res_blocks": 1}
SIZES |= {"bits": (2, 3), "norm_groups": 2, "image_channels": 1}
TINY = lfq.Config(**SIZES, image_size=(12, 20))


def drawn(config: lfq.Config) -> lfq.Model:
  """A model with weights from NumPy: tracing the initialiser takes long."""
  model = weights.abstract(lambda rngs: lfq.Model(config, rngs=rngs))
  rng = np.random.default_rng(0)
  for path, param in nnx.to_flat_state(nnx.state(model)):
    value = np.full(param.shape, path[-1] == "scale" or "gamma" in path)
    if param.ndim > 1:
      bound = math.prod(param.shape[:-1]) ** -0.5
      value = rng.uniform(-bound, bound, param.shape)
    param.set_value(jnp.asarray(value, jnp.float32))
  return model


@pytest.fixture(scope="module")
def tiny() -> lfq.Model:
  return drawn(TINY)


@pytest.mark.parametrize("bits", [(2, 3), (5,), (1, 3, 1)])
def test_shapes_and_seams(bits):
  model = drawn(dataclasses.replace(TINY, bits=bits))
  assert isinstance(model, interfaces.Tokenizer)
  assert isinstance(model, interfaces.Trainable)
  assert model.grid == (3, 5)
  assert model.vocab_sizes == tuple(2**b for b in bits)
  for size, grid in (((12, 20), None), ((4, 12), (1, 3))):
    images = jnp.zeros((2, *size, 1))
    tokens = jax.eval_shape(model.encode, images)
    length = math.prod(grid or model.grid)
    assert (tokens.shape, tokens.dtype) == ((2, length, len(bits)), jnp.int32)
    again = jax.eval_shape(lambda t, grid=grid: model.decode(t, grid), tokens)
    assert (again.shape, again.dtype) == (images.shape, jnp.float32)
  leaves = nnx.to_flat_state(nnx.state(model))
  assert all(isinstance(x, nnx.Param) for _, x in leaves)


def test_initialisation_is_the_published_one():
  norm = lfq.AdaptiveNorm(12, TINY, nnx.Rngs(0))
  for param in (norm.gamma.kernel[...], norm.beta.bias[...]):
    assert 0.5 * 5**-0.5 < jnp.abs(param).max() <= 5**-0.5


def test_the_first_channel_is_the_lowest_bit():
  latents = jnp.array([2.0, -3.0, 1e-30, 0.0, -0.0])
  assert lfq.tokens_of(latents, (2, 3)).tolist() == [1, 1]
  assert lfq.tokens_of(latents, (5,)).tolist() == [5]
  assert lfq.lookup(jnp.array([1, 1]), (2, 3)).tolist() == [1, -1, 1, -1, -1]
  assert lfq.codes_of(latents).tolist() == [1, -1, 1, -1, -1]
  assert lfq.tokens_of(jnp.ones(30), (30,)).tolist() == [2**30 - 1]


def test_a_token_beyond_its_vocabulary_is_no_code():
  tokens = jnp.array([[3, 7], [4, 7], [3, 8], [3, -1]])
  codes = np.asarray(lfq.lookup(tokens, (2, 3)))
  assert np.isnan(codes).any(-1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("d", [1, 5, 12])
def test_entropies_are_those_over_the_whole_codebook(d):
  latents = 0.01 * jax.random.normal(jax.random.key(d), (2, 3, 5, d))
  _, terms = jax.jit(lfq.quantize)(latents)
  codes = np.asarray(lfq.lookup(jnp.arange(2**d)[:, None], (d,)), np.float64)
  scores = 2 * np.asarray(latents, np.float64).reshape(-1, d) @ codes.T / 0.01
  log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
  mean = np.exp(log_p).mean(0)
  entropy = -(np.exp(log_p) * log_p).sum(-1).mean()
  np.testing.assert_allclose(terms["entropy"], entropy, rtol=1e-5)
  entropy = -(mean * np.log(mean + 1e-5)).sum()
  np.testing.assert_allclose(terms["codebook_entropy"], entropy, rtol=1e-5)


def test_entropies_of_the_published_codebook_are_cheap(optimised):
  """A table of 3,000 positions and 2^18 codes would take 3 GB."""
  latents = jnp.zeros((3, 40, 25, 18))

  @jax.jit
  def grad(latents):
    return jax.grad(lambda x: lfq.quantize(x)[1]["codebook_entropy"])(latents)

  memory = grad.lower(latents).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 100e6


def test_bfloat16_stays_close(tiny):
  half = drawn(dataclasses.replace(TINY, dtype="bfloat16"))
  tokens = jax.random.randint(jax.random.key(0), (2, 15, 2), 0, 4)
  decode = nnx.jit(lfq.Model.decode)
  images = decode(half, tokens)
  assert images.dtype == jnp.float32
  np.testing.assert_allclose(images, decode(tiny, tokens), atol=0.1)


def test_training_reconstructs_and_keeps_codes_in_use():
  """Discs of many places and sizes."""
  images = common.discs()
  sizes = SIZES | {"channels": 8, "channel_multipliers": (1, 2)}
  config = lfq.Config(**sizes, image_size=(12, 12))
  history = common.train(drawn(config), images)
  terms = {"l1", "commitment", "entropy", "codebook_entropy"}
  assert set(history[-1]) == terms
  median = float(np.abs(images / 127.5 - np.median(images) / 127.5).mean())
  assert history[-1]["l1"] < 0.75 * median
  assert history[-1]["codebook_entropy"] > 0.5 * 5 * np.log(2)


def test_errors_name_value_expectation_and_remedy(tiny):
  with pytest.raises(ValueError, match=r"norm_groups=5 .* \[128, .* example"):
    lfq.Config(norm_groups=5)
  with pytest.raises(ValueError, match="250x256: expected multiples of 16"):
    lfq.Config(image_size=(250, 256))
  for bits in ((), (0, 3), (31,)):
    with pytest.raises(ValueError, match="expected 1 to 30 .* for example"):
      lfq.Config(bits=bits)
  with pytest.raises(ValueError, match="weights='best': choose one of .*'ema'"):
    lfq.Config(weights="best")
  with pytest.raises(ValueError, match="10x20: expected multiples of 4"):
    tiny.encode(jnp.zeros((2, 10, 20, 1)))
  with pytest.raises(ValueError, match="expected 1 channels"):
    tiny.encode(jnp.zeros((2, 12, 20, 3)))
  with pytest.raises(ValueError, match=r"expected 15 .* \(3, 5\); pass"):
    tiny.decode(jnp.zeros((2, 14, 2), jnp.int32))
  with pytest.raises(ValueError, match="F = 2, the sub-tokens .*; take"):
    tiny.decode(jnp.zeros((2, 15, 1), jnp.int32))
  with pytest.raises(ValueError, match="1x1 .* take larger images"):
    tiny.decode(jnp.zeros((2, 1, 2), jnp.int32), grid=(1, 1))
