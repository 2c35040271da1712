"""From a published folder and captions to the condition of a backbone."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import tensorar_jax as tj
from tensorar_jax.conditioning import encoders
from tests import programs, tiny
from tests.conditioning import tiny_text

CAPTIONS = ["A red cat", "a cat on a mat"]


@pytest.fixture(scope="module")
def folder(parity, tmp_path_factory):
  return tiny_text.folder(parity, tmp_path_factory.mktemp("text") / "t5")


@pytest.fixture(scope="module")
def encode(folder):
  return tj.import_text_encoder(folder, dtype="float32", length=7)


def divide(folder):
  """The folder's weights in two files behind an index."""
  weights = safetensors.numpy.load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  names, files = sorted(weights), {}
  for number in (0, 1):
    file = f"model-0000{number + 1}-of-00002.safetensors"
    part = {name: weights[name] for name in names[number::2]}
    safetensors.numpy.save_file(part, folder / file)
    files |= dict.fromkeys(part, file)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
  return index


def test_captions_become_the_condition_of_a_backbone(encode):
  features, mask = encode(CAPTIONS)
  assert features.shape == (2, 7, 64) and mask.sum(axis=1).tolist() == [4, 6]
  ids, _ = encode.tokenizer(CAPTIONS)
  np.testing.assert_array_equal(ids[0], [3, 5, 4, 1, 0, 0, 0])
  # Padding is seen by none: a text alone has the features that it has here.
  alone = programs.forward(encode.model, ids[:1, :4], np.ones((1, 4), bool))
  np.testing.assert_allclose(features[0, :4], alone[0], atol=2e-5)
  texts = tj.TextConditioning(encode.width, encode.length)
  cond = texts.encode((features, mask))
  np.testing.assert_array_equal(cond["text"][0, 3:], features[0, :4])
  backbone = tiny.backbone(text_width=encode.width, text_length=encode.length)
  backbone.check(cond)
  assert backbone.embed_condition(cond).shape == (2, 7, 16)


def test_many_captions_come_in_batches(encode, monkeypatch):
  many = [f"{'a ' * n}cat" for n in range(5)]
  want, mask = encode(many)
  monkeypatch.setattr(encoders, "BATCH_SIZE", 2)
  got, same = encode(many)  # the last batch is filled up with known ones
  np.testing.assert_array_equal(same, mask)
  np.testing.assert_allclose(got[mask], np.asarray(want)[mask], atol=2e-5)


def test_divided_weights_are_the_same_weights(parity, encode, tmp_path):
  folder = tiny_text.folder(parity, tmp_path / "t5")
  divide(folder)
  again = tj.import_text_encoder(folder, dtype="float32", length=7)
  for got, want in zip(
    jax.tree.leaves(again.model), jax.tree.leaves(encode.model), strict=True
  ):
    np.testing.assert_array_equal(got, want)


def test_bfloat16_is_the_default(folder, encode):
  half = tj.import_text_encoder(folder, length=7)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(half.model)} == {
    "bfloat16"
  }
  features, _ = half(CAPTIONS)
  assert features.dtype == jnp.bfloat16
  want = encode(CAPTIONS)[0]
  assert np.abs(features - want).mean() < 0.03 * np.abs(want).mean()


def test_incomplete_folders_are_refused(parity, tmp_path):
  with pytest.raises(ValueError, match="nowhere: no such folder"):
    tj.import_text_encoder(tmp_path / "nowhere")
  folder = tiny_text.folder(parity, tmp_path / "t5")
  with pytest.raises(ValueError, match="dtype='float16': expected one of"):
    tj.import_text_encoder(folder, dtype="float16")
  for name, words in (
    ("config.json", "config.json: no such file. Download it again"),
    ("model.safetensors", "found none of .*model.safetensors.index.json"),
    ("tokenizer.json", "The text encoder's own tokenizer.json"),
  ):
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    with pytest.raises(ValueError, match=words):
      tj.import_text_encoder(folder)
    (folder / name).write_bytes(content)
  config = json.loads((folder / "config.json").read_text())
  config["vocab_size"] = 8
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="shared.weight gives"):
    tj.import_text_encoder(folder)


def test_a_tokenizer_of_another_model_is_refused(encode):
  other = copy.copy(encode.tokenizer)
  other.vocab_size = 129
  with pytest.raises(
    ValueError, match="knows 129 tokens, the text encoder 128"
  ):
    encoders.T5Encoder(encode.model, other)
