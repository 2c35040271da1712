"""Every file of configs/: its stages fit together; one of each kind traces."""

import dataclasses
import importlib
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

import configs
from tensorar_jax.experiment import build, config_file
from tensorar_jax.training import loop, optimizer, train_step

FILES = pathlib.Path(configs.__path__[0]).glob("*.py")
NAMES = sorted({path.stem for path in FILES} - {"published"})


# The others differ in sizes only.
TRACED = (
  "digits",
  "fashion_mnist",
  "llamagen_b",
  "llamagen_t2i",
  "open_magvit2_b",
  "rar_b",
  "janus_pro_1b",
)


def stages_of(name):
  return config_file.load(f"configs/{name}.py").stages


@pytest.mark.parametrize("name", NAMES)
def test_stages_fit_together(name):
  for stage in stages_of(name).values():
    loop.check(stage)
    if stage.source:  # it can be trained from nothing as well
      loop.check(dataclasses.replace(stage, source=None))


@pytest.mark.parametrize(
  "name, scale", [("rar_b", 0.0), ("open_magvit2_b", 1.0), ("llamagen_b", 1.0)]
)
def test_published_configs_read_small_scales_as_their_authors(name, scale):
  flags = {"sampling.guidance": str(scale)}
  stages = config_file.load(f"configs/{name}.py", flags).stages
  assert not stages["base"].sampling.guided
  assert stages_of(name)["base"].sampling.guided


@pytest.mark.parametrize("name", NAMES)
def test_no_section_stands_in_two_places(name):
  """Else `--config.a.x=1` would change b.x with it."""
  seen = {}

  def walk(section, path):
    if isinstance(section, ConfigDict):
      where = seen.setdefault(id(section), path)
      assert where == path, f"{where} and {path} are one"
      for key in section:
        walk(section[key], f"{path}.{key}")

  walk(importlib.import_module(f"configs.{name}").get_config(), "config")


def text_of(stage):
  """The text of two images, as the stage's conditioning reads it."""
  reads = build.conditioning(stage.conditioning)
  if not reads.is_text:
    return {}
  cond = reads.example()
  text, mask = cond["text"], ~cond["is_padding"]
  return {"text": np.repeat(text, 2, 0), "text_mask": np.repeat(mask, 2, 0)}


@pytest.mark.parametrize("name", TRACED)
def test_a_train_step_traces(name):
  stage = stages_of(name)["tensorar"]
  tx = optimizer.make(stage.optim, stage.train.num_steps)
  model = build.abstract_model(stage)
  task = loop.make_task(stage, pathlib.Path(), model, images=False)
  batch = task.prepare(
    {
      "tokens": np.zeros((2, model.num_tokens, len(model.vocab_sizes)), int),
      "label": np.zeros(2, int),
      **text_of(stage),
      "valid": np.ones(2, bool),
    }
  )

  def step(batch):
    skeleton, state = train_step.init_state(
      build.model(stage, nnx.Rngs(0)), tx, 0, ema=False
    )
    return train_step.make_train_step(skeleton, task.loss, tx, 0.0)(
      state, None, batch
    )

  state, scalars = jax.eval_shape(step, batch)
  assert scalars["loss"].shape == ()
  assert {f"ce/{j}" for j in range(model.window)} <= set(scalars)


def test_the_stages_of_text_to_image_differ_in_size_only():
  base = config_file.load("configs/llamagen_t2i.py:512").stages["base"]
  loop.check(base)
  assert base.source == "weights/t2i_XL_stage2_512.pt"
  assert base.backbone.config.grid == (32, 32)
  with pytest.raises(ValueError, match="'384': published models are of 256"):
    config_file.load("configs/llamagen_t2i.py:384")
