"""What every tokenizer must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensorar_jax import interfaces
from tensorar_jax.generation import batches
from tests.contract import families

pytestmark = pytest.mark.parametrize("name", families.TOKENIZERS)


def test_tokens_have_the_shape_and_range_that_it_states(name):
  tokenizer = families.tokenizer(name)
  assert isinstance(tokenizer, interfaces.Tokenizer)
  rows, cols = tokenizer.grid
  assert (rows, cols) == (3, 3)
  tokens = families.tokens(tokenizer.vocab_sizes)
  images = jax.jit(lambda t, x: t.decode(x))(tokenizer, tokens)
  assert images.ndim == 4 and images.shape[0] == 2
  again = jax.jit(lambda t, x: t.encode(x))(tokenizer, images)
  assert again.shape == (2, 9, len(tokenizer.vocab_sizes))
  assert again.dtype == jnp.int32
  for f, size in enumerate(tokenizer.vocab_sizes):
    assert again[..., f].min() >= 0 and again[..., f].max() < size


def test_images_come_out_as_uint8(name):
  tokenizer = families.tokenizer(name)
  images = batches.decode(tokenizer, families.tokens(tokenizer.vocab_sizes))
  assert images.dtype == np.uint8
