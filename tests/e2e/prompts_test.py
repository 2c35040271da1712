"""A published chat model that draws: import, tokenize, train, prompts."""

import dataclasses
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from tensorar_jax.backbones import janus
from tensorar_jax.checkpoints import torch_export
from tensorar_jax.parallel import weights
from tensorar_jax.tokenizers import vq
from tests import tiny
from tests.backbones.janus_case import divide
from tests.conditioning import tiny_chat
from tests.e2e import in_process

LENGTH = 12  # ids of a prompt at most
SIZES = dict(
  text_vocab_size=13,
  vocab_size=11,
  grid=(3, 3),
  width=16,
  num_layers=2,
  num_heads=2,
  mlp_width=24,
  code_dim=4,
)


def write_model(folder):
  """A published folder with random weights; the path of its index."""
  tensors = {}
  for module, made in (
    (janus, janus.Config(**SIZES)),
    (vq, dataclasses.replace(vq.VARIANTS["janus"], **tiny.VQ)),
  ):
    make = lambda rngs, m=module, c=made: m.Model(c, rngs=rngs)
    model = tiny.redraw(weights.abstract(make))
    rules = module.import_rules(made)
    tensors |= torch_export.export_state_dict(model, rules)
  return divide(tensors, tiny_chat.folder(folder), "bin")


def config(source, tokens) -> ConfigDict:
  return ConfigDict(
    dict(
      source_dtype="bfloat16",
      data=dict(name=f"tokens:{tokens}"),
      tokenizer=dict(name="vq", variant="janus", init="tokenizer", **tiny.VQ),
      conditioning=dict(
        name="prompt",
        length=LENGTH,
        vocab_size=13,
        encoder=str(source.parent),
      ),
      backbone=dict(name="janus", **SIZES),
      loss=dict(condition_dropout=0.5),
      optim=dict(learning_rate=1e-3),
      train=dict(batch_size=2, num_steps=2, log_every=1, checkpoint_every=2),
      sampling=dict(guidance=5.0),
      stages=dict(
        tokenizer=dict(objective="tokenizer", source=str(source)),
        base=dict(source=str(source)),
        tensorar=dict(init="base", tensorar=dict(window=2)),
      ),
    )
  )


@pytest.fixture(scope="module")
def project(tmp_path_factory):
  """A trained model, and its project."""
  root = tmp_path_factory.mktemp("prompts")
  source = write_model(root / "model")
  made = in_process.CaptionedProject(
    root,
    captions=3 * ["A red cat on a mat"] + ["a cat"],
    config=config(source, root / "tokens"),
  )
  made.run("import")
  made.tokenize(recipe="center")
  made.run("train")
  return made


def test_prompts_are_stored_as_ids_and_trained_on(project):
  manifest = json.loads((project.root / "tokens" / "manifest.json").read_text())
  assert manifest["num_images"] == 4
  text = manifest["text"]
  assert (text["width"], text["length"], text["dtype"]) == (2, LENGTH, "int32")
  assert len(text["encoder"]["tokenizer"]) == 64
  rows = (project.workdir / "tensorar" / "log.jsonl").read_text().splitlines()
  assert len(rows) == 2 and np.isfinite(json.loads(rows[1])["loss"])


def test_prompts_become_images(project):
  asked = dict(mode="sample", num_images=1, seed=3)
  project.run(**asked, prompt=("a cat",) + 2 * ("a red cat on a mat",))
  folder = project.workdir / "tensorar" / "samples" / "000"
  images = np.load(folder / "samples.npz")["arr_0"]
  assert images.shape == (3, 6, 6, 3)
  # The image depends on its prompt, seed and number alone.
  project.run(**asked, prompt=("a cat", "a red mat", "a"))
  other = np.load(folder.parent / "001" / "samples.npz")["arr_0"]
  np.testing.assert_array_equal(other[0], images[0])
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["text_encoder"]["class"].endswith("chat.PromptEncoder")


def test_what_cannot_be_drawn_is_refused(project):
  with pytest.raises(ValueError, match="from text, there are no classes"):
    project.run("sample")
  with pytest.raises(ValueError, match="prompt 0 is empty"):
    project.run("sample", prompt=(" ",))
