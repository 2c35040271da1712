"""Tests of the tokenizer whose tokens are the pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tensorar_jax import interfaces
from tensorar_jax.tokenizers import pixels


def make(**fields) -> pixels.Model:
  return pixels.Model(pixels.Config(**fields), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("levels", [2, 3, 11, 17, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_is_exact(levels, channels):
  tokenizer = make(image_size=(3, 5), image_channels=channels, levels=levels)
  tokens = np.arange(levels).repeat(15 * channels)
  tokens = np.random.default_rng(0).permutation(tokens)
  tokens = tokens.reshape(levels, 15, channels)
  images = np.round(tokens.reshape(levels, 3, 5, channels) * 255 / (levels - 1))
  images = images.astype(np.uint8)
  found = jax.jit(tokenizer.encode)(images.astype(np.float32) / 127.5 - 1)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, tokens)
  decoded = np.asarray(jax.jit(tokenizer.decode)(found))
  assert decoded.shape == images.shape
  # The project's uint8 conversion: clip(127.5 x + 128), truncated.
  back = np.clip(127.5 * decoded + 128, 0, 255).astype(np.int32)
  half_way = (tokens * 255 * 2) % (2 * (levels - 1)) == levels - 1
  assert np.abs(back - images).max() <= half_way.any()
  again = tokenizer.encode(jnp.asarray(back / 127.5 - 1, jnp.float32))
  np.testing.assert_array_equal(again, tokens)


def test_ends_of_the_range_and_clipping():
  tokenizer = make(image_size=(1, 4))
  images = jnp.array([-1.0, 1.0, -1.5, 1.5]).reshape(1, 1, 4, 1)
  tokens = tokenizer.encode(images)
  np.testing.assert_array_equal(tokens.ravel(), [0, 16, 0, 16])
  np.testing.assert_array_equal(tokenizer.decode(tokens).ravel(), [-1, 1] * 2)


def test_it_is_a_tokenizer_without_parameters():
  tokenizer = make(image_channels=3, levels=11)
  assert isinstance(tokenizer, interfaces.Tokenizer)
  assert tokenizer.grid == (8, 8)
  assert tokenizer.vocab_sizes == (11, 11, 11)
  assert not jax.tree.leaves(nnx.state(tokenizer))
  assert pixels.import_rules(tokenizer.config) == []
  assert pixels.SOURCES == {}
  assert pixels.VARIANTS["digits"] == pixels.Config()


def test_another_grid():
  tokenizer = make()
  images = jnp.linspace(-1, 1, 2 * 3 * 5).reshape(2, 3, 5, 1)
  tokens = tokenizer.encode(images)
  assert tokens.shape == (2, 15, 1)
  decoded = tokenizer.decode(tokens, grid=(3, 5))
  np.testing.assert_allclose(decoded, images, atol=1 / 16 + 1e-6)
  with pytest.raises(
    ValueError, match=r"expected 64 .* \(8, 8\); pass the grid"
  ):
    tokenizer.decode(tokens)
  with pytest.raises(ValueError, match="expected 1 channels"):
    tokenizer.encode(jnp.zeros((2, 8, 8, 3)))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"levels": 1}, "levels=1; expected 2 to 256"),
    ({"levels": 257}, "levels=257; expected 2 to 256"),
    ({"image_size": (0, 8)}, r"image_size=\(0, 8\)"),
    ({"image_channels": 0}, "image_channels=0"),
  ],
)
def test_bad_configs(fields, message):
  with pytest.raises(ValueError, match=message):
    pixels.Config(**fields)
