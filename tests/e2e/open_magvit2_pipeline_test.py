"""Open-MAGVIT2 from end to end: class -> tokens -> image, image -> loss.

Backbone and tokenizer come out of one file, as the published ones do.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tensorar_jax as tj
from tensorar_jax.generation import batches
from tensorar_jax.method import losses
from tests.backbones.open_magvit2_case import Case, tokenizer_fields


@pytest.fixture(scope="module")
def case(parity):
  return Case(parity / "open_magvit2" / "gpt")


@pytest.fixture(scope="module")
def tokenizer(case):
  fields = tokenizer_fields(case.folder)
  source = str(case.folder / "model.ckpt")
  return tj.import_tokenizer("lfq", source, **fields)


def close(got, want, atol):
  np.testing.assert_allclose(np.asarray(got), want, atol=atol, rtol=0)


def channels_first(images):
  return np.moveaxis(np.asarray(images), -1, 1)


@pytest.mark.parametrize("name, guided", [("nocfg", False), ("cfg", True)])
def test_classes_become_images(case, tokenizer, name, guided):
  scale = tuple(case.io["in/cfg_scale"]) if guided else 1.0
  config = tj.SamplingConfig(temperature=0.0, guidance=scale)
  base = tj.TensorAR(case.model, window=1)
  null = case.null if guided else None
  out = tj.generate(base, case.cond, null, jax.random.key(0), config)
  images = tokenizer.decode(out.tokens)
  close(channels_first(images), case.io[f"out/greedy_{name}_image"], 3e-5)
  if guided:
    got = batches.decode(tokenizer, out.tokens).astype(int)
    assert np.abs(got - case.io[f"out/greedy_{name}_uint8"]).max() <= 1


@pytest.mark.parametrize("name", ["sampA", "sampB"])
def test_sampled_tokens_become_images(case, tokenizer, name):
  images = tokenizer.decode(case.pair(f"out/{name}"))
  close(channels_first(images), case.io[f"out/{name}_image"], 3e-5)


def test_images_become_a_loss(case, tokenizer):
  images = jnp.moveaxis(jnp.asarray(case.io["in/e2e_image"]), 1, -1)
  latents = channels_first(tokenizer.latents(images))
  close(latents, case.io["out/e2e_encoder_out"], 2e-5)
  tokens = tokenizer.encode(images)
  np.testing.assert_array_equal(tokens, case.pair("out/e2e_target"))
  logits = case.logits(case.cond, tokens)
  for f, half in enumerate(("pre", "post")):
    close(logits[f], case.io[f"out/e2e_logits_{half}"], 5e-5)
    ce, _ = losses.cross_entropy((logits[f],), tokens[..., f : f + 1])
    close(ce.mean(), case.io[f"out/e2e_loss_{half}"], 5e-6)
  ce, _ = losses.cross_entropy(logits, tokens)
  close(ce.mean(), case.io["out/e2e_loss"], 5e-6)
