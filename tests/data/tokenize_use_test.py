"""From images to the tokens that models read: published codes, training."""

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tensorar_jax.data import pipeline, shards, sources, tokenize
from tensorar_jax.method import noising, objective
from tensorar_jax.parallel import weights
from tensorar_jax.tokenizers import pixels
from tests import tiny
from tests.tokenizers import vq_test


@pytest.mark.parametrize("case", ["vq16", "vq8"])
@pytest.mark.parametrize("recipe", ["ten_crop", "flip"])
def test_parity_of_published_codes(parity, tmp_path, case, recipe):
  model, arrays = vq_test.load(case)
  file = tmp_path / "images" / "n01440764" / "1.png"
  file.parent.mkdir(parents=True)
  Image.fromarray(arrays["src_image"]).save(file)
  tokenize.tokenize(
    sources.load(f"folder:{tmp_path}/images", "train"),
    model,
    tmp_path / "tokens",
    recipe=recipe,
    image_size=int(arrays["src_image_size"]),
    crop_range=float(arrays["src_crop_range"]),
    batch_size=10,
  )
  stored = sources.load(f"tokens:{tmp_path}/tokens", "train")
  count = stored.num_variants
  batch = stored.fetch(np.zeros(count, int), np.arange(count))
  expected = arrays[f"codes_{recipe}"][0]
  np.testing.assert_array_equal(batch["tokens"][..., 0], expected)


def test_a_model_trains_on_the_shards(tmp_path):
  """Grey images in memory -> shards -> batches -> a finite loss."""
  draw = np.random.default_rng(0)
  pictures = draw.integers(0, 256, (13, 5, 4, 1), dtype=np.uint8)
  labels = np.arange(13, dtype=np.int32) % 5
  source = sources.ArraySource(pictures, labels, num_classes=5)
  tokenizer = pixels.Model(pixels.Config((3, 3), levels=11), rngs=nnx.Rngs(0))
  tokenize.tokenize(
    source,
    tokenizer,
    tmp_path,
    recipe="ten_crop",
    crop_range=(1.4, 1.7),
    image_size=3,
  )
  assert shards.read_manifest(tmp_path)["crop_range"] == [1.4, 1.7]
  stored = sources.load(f"tokens:{tmp_path}", "train")
  assert stored.num_variants == 20
  batch = next(pipeline.train_iterator(stored, batch_size=2, seed=0))
  assert batch["tokens"].shape == (2, 9, 1)
  skeleton, params, frozen = weights.split(tiny.wrapped())

  @jax.jit
  def loss(params, cond, tokens):
    model = skeleton.merge(params, frozen)
    configs = noising.NoiseConfig(), objective.LossConfig()
    rng = jax.random.key(0)
    return objective.tensorar_loss(model, cond, tokens, rng, *configs)[0]

  cond = tiny.CLASSES.encode(batch["label"])
  assert np.isfinite(loss(params, cond, batch["tokens"]))
