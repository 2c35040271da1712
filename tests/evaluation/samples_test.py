import jax
import numpy as np
import pytest
from flax import nnx

from tensorar_jax.drawing import SamplingConfig
from tensorar_jax.evaluation import samples
from tensorar_jax.tokenizers import pixels
from tests import tiny


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_images_do_not_depend_on_the_batch_size(batch_size):
  model = tiny.wrapped(2)
  labels = np.arange(5)
  config = SamplingConfig(guidance=1.5)

  def draw(size):
    batches = samples.generate(model, tiny.CLASSES, labels, 3, config, size)
    return np.concatenate([np.asarray(b.drafts) for b in batches])

  np.testing.assert_array_equal(draw(batch_size), draw(5))
  assert draw(batch_size).shape == (5, 9, 2, 1)


def test_images_are_resized_on_request():
  config = pixels.Config(image_size=(3, 3), levels=11)
  tokenizer = pixels.Model(config, rngs=nnx.Rngs(0))
  tokens = tiny.tokens()
  assert samples.decode(tokenizer, tokens).shape == (2, 3, 3, 1)
  assert samples.decode(tokenizer, tokens, (7, 5)).shape == (2, 7, 5, 1)


def test_uint8_truncates_and_clips():
  values = jax.numpy.asarray([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
  values = values[:, None, None, None]
  got = samples.to_uint8(values, 128.0)[:, 0, 0, 0]
  np.testing.assert_array_equal(got, [0, 0, 128, 255, 255, 255])
  got = samples.to_uint8(values, 127.5)[:, 0, 0, 0]
  np.testing.assert_array_equal(got, [0, 0, 127, 254, 255, 255])
