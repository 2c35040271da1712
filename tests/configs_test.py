"""Every file of configs/: its stages fit together and trace."""

import importlib
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

import configs
from tensorar_jax import build, optim, train

NAMES = sorted(p.stem for p in pathlib.Path(configs.__path__[0]).glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_can_be_trained(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  stages = build.stages(config)
  for stage in stages.values():
    train.check(stage)
    # A base model can be trained from nothing as well.
    train.check({**stage, "source": None})
  stage = stages["tensorar"]
  settings = build.call(optim.OptimConfig, stage["optim"], "optim")
  tx = optim.make(settings, stage["train"]["num_steps"])
  model = nnx.eval_shape(lambda: build.model(stage, nnx.Rngs(0)))
  task = train.make_task(stage, pathlib.Path(), model, images=False)
  batch = task.prepare(
    {
      "tokens": np.zeros((2, model.num_tokens, len(model.vocab_sizes)), int),
      "label": np.zeros(2, int),
    }
  )

  def step(batch):
    skeleton, state = train.init_state(
      build.model(stage, nnx.Rngs(0)), tx, 0, ema=False
    )
    return train.make_train_step(skeleton, task.loss, tx, 0.0)(
      state, None, batch
    )

  state, scalars = jax.eval_shape(step, batch)
  assert scalars["loss"].shape == ()
  assert {f"ce/{j}" for j in range(model.window)} <= set(scalars)
