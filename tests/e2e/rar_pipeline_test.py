"""RAR from class ids to bytes: backbone, sampler and tokenizer together.

The fixture was written by the reference's own sampling function, with argmax
in place of the draw; README.md beside it states the tolerances used here.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tensorar_jax as tj
from tensorar_jax.generation import batches
from tensorar_jax.nn import image_bytes
from tests.backbones import rar_case
from tests.tokenizers import common


@pytest.fixture(scope="module")
def folder(parity):
  return parity / "rar" / "pipeline"


@pytest.fixture(scope="module")
def io(folder):
  return dict(np.load(folder / "io.npz"))


@pytest.fixture(scope="module")
def settings(folder):
  return json.loads((folder / "config.json").read_text())


def assert_bytes_agree(got, want):
  """Where a float is cut off at an integer, rounding may cost one level."""
  assert (got.dtype, got.shape) == (np.uint8, want.shape)
  levels = np.abs(got.astype(int) - want)
  assert levels.max() <= 1 and (levels > 0).mean() < 0.002


def test_bytes_of_the_decoded_images(folder, io, settings):
  tokenizer = common.published_maskgit_vq(folder / settings["tokenizer"])
  images = jnp.asarray(2 * io["images_float"].transpose(0, 2, 3, 1) - 1)
  got = np.asarray(image_bytes.to_uint8(images, tokenizer.uint8_offset))
  assert_bytes_agree(got, io["images_uint8"])
  saved = np.load(folder / "adm_samples.npz")
  np.testing.assert_array_equal(saved["arr_0"], io["images_uint8"])


def test_class_ids_to_images(folder, io, settings):
  backbone = rar_case.load(folder / settings["generator"])
  tokenizer = common.published_maskgit_vq(folder / settings["tokenizer"])
  classes = tj.ClassConditioning(backbone.config.num_classes)
  cond = classes.encode(io["class_ids"])
  config = tj.SamplingConfig(
    temperature=0.0,  # argmax, which no other temperature changes
    guidance=settings["guidance_scale"],
    guidance_power=settings["guidance_scale_pow"],
  )
  out = tj.generate(
    tj.TensorAR(backbone, window=1),
    cond,
    classes.null(cond),
    jax.random.key(0),
    config,
  )
  images = np.asarray(tokenizer.decode(out.tokens)).transpose(0, 3, 1, 2)
  pixels = (images.clip(-1, 1) + 1) / 2
  np.testing.assert_allclose(pixels, io["images_float"], rtol=0, atol=1e-4)
  assert_bytes_agree(batches.decode(tokenizer, out.tokens), io["images_uint8"])
