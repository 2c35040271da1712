import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tensorar_jax.generation import batches
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.nn import image_bytes
from tensorar_jax.tokenizers import pixels, vq
from tests import tiny


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_images_do_not_depend_on_the_batch_size(batch_size):
  model = tiny.wrapped(2)
  labels = np.arange(8) % 5
  config = SamplingConfig(guidance=1.5)

  def draw(size):
    parts = batches.generate(model, tiny.CLASSES, labels, 3, config, size)
    return np.concatenate([np.asarray(b.drafts) for b in parts])

  np.testing.assert_array_equal(draw(batch_size), draw(5))
  assert draw(batch_size).shape == (8, 9, 2, 1)


def test_the_parallel_decoder_fills_places_again_and_keeps_the_order():
  model, labels = tiny.wrapped(2), np.arange(8) % 5
  config = SamplingConfig(guidance=1.5, draw="gumbel")
  parallel = dataclasses.replace(config, decoder="parallel", rows=3)

  def draw(config, size):
    parts = batches.generate(model, tiny.CLASSES, labels, 3, config, size)
    return jax.tree.map(lambda *a: jax.numpy.concatenate(a), *parts)

  want = draw(config, 8)
  one_batch, several = draw(parallel, 8), draw(parallel, 3)
  for got in (one_batch, several):
    np.testing.assert_array_equal(got.drafts, want.drafts)
  np.testing.assert_array_equal(several.steps, one_batch.steps)


def test_images_are_resized_on_request():
  config = pixels.Config(image_size=(3, 3), levels=11)
  tokenizer = pixels.Model(config, rngs=nnx.Rngs(0))
  tokens = tiny.tokens()
  assert batches.decode(tokenizer, tokens).shape == (2, 3, 3, 1)
  assert batches.decode(tokenizer, tokens, (7, 5)).shape == (2, 7, 5, 1)


def test_a_large_batch_is_decoded_in_parts_and_in_order():
  fields = dict(channels=8, channel_multipliers=(1, 2), norm_groups=4)
  config = vq.Config(image_size=(8, 8), codebook_size=11, **fields)
  tokenizer = vq.Model(config, rngs=nnx.Rngs(0))
  count, cells = batches.DECODED + 3, tokenizer.grid[0] * tokenizer.grid[1]
  tokens = np.random.default_rng(0).integers(0, 11, (count, cells, 1), np.int32)
  got = batches.decode(tokenizer, tokens)
  for start in range(0, count, 4):
    want = batches.decode(tokenizer, tokens[start : start + 4])
    np.testing.assert_allclose(got[start : start + 4], want, atol=1)
  assert (got[0] != got[1]).any()


def test_uint8_truncates_and_clips():
  values = jax.numpy.asarray([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
  values = values[:, None, None, None]
  got = image_bytes.to_uint8(values, 128.0)[:, 0, 0, 0]
  np.testing.assert_array_equal(got, [0, 0, 128, 255, 255, 255])
  got = image_bytes.to_uint8(values, 127.5)[:, 0, 0, 0]
  np.testing.assert_array_equal(got, [0, 0, 127, 254, 255, 255])
