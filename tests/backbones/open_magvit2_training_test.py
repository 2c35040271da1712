"""Five steps of the published training, by our train step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensorar_jax.backbones import open_magvit2
from tensorar_jax.checkpoints import torch_export
from tensorar_jax.method import losses
from tensorar_jax.training import optimizer, train_step
from tests.backbones.open_magvit2_case import Case

ATOL = 5e-5  # the README's, for the trajectory


@pytest.fixture(scope="module")
def trace(parity):
  """(the case, losses, gradient norms, weights by name after the steps)."""
  case = Case(parity / "open_magvit2" / "gpt")
  c = case.meta["optim"]
  config = optimizer.OptimConfig(
    learning_rate=c["lr"],
    schedule="linear",
    warmup_steps=c["wp_it"],
    warmup_start=c["wp0"],
    final_rate=c["wpe"],
    hold=0.05,
    weight_decay=c["weight_decay"],
    no_decay="",
    clip_norm=c["clip"],
  )
  # The published schedule has its final rate at the last step, not behind it.
  tx = optimizer.make(config, c["max_it"] - 1)
  rates = optimizer.schedules(config, c["max_it"] - 1)["new"]
  np.testing.assert_allclose(
    [rates(jnp.asarray(n)) for n in range(c["steps"])],
    case.io["out/opt_lr"],
    rtol=1e-6,
  )
  assert (case.io["out/opt_wd"] == config.weight_decay).all()
  dropped = jnp.asarray(case.input("class_drop"), bool)
  cond = {**case.cond, "is_null": dropped}

  def loss(model, context, batch, rng, step):
    x = model.embed(case.tokens[:, :-1])
    logits = model.logits(model(cond, x), case.tokens)
    ce, _ = losses.cross_entropy(logits, case.tokens)
    return ce.mean(), {}

  skeleton, state = train_step.init_state(case.model, tx, 0, ema=False)
  step = train_step.make_train_step(skeleton, loss, tx, 0.0)
  rows = []
  for _ in range(c["steps"]):
    state, scalars = step(state, None, None)
    rows.append((scalars["loss"], scalars["grad_norm"]))
  model = skeleton.merge(state.params)
  rows.append((jax.jit(loss)(model, *[None] * 4)[0], np.nan))
  names = torch_export.export_state_dict(
    model, open_magvit2.import_rules(model.config)
  )
  return case, *np.asarray(rows).T, names


def test_losses_and_norms_of_every_step(trace):
  case, found, norms, _ = trace
  np.testing.assert_allclose(found, case.io["out/opt_loss"], atol=ATOL)
  np.testing.assert_allclose(
    norms[:-1], case.io["out/opt_grad_norm"], atol=ATOL
  )


def test_weights_after_the_last_step(trace):
  case, _, _, names = trace
  assert len(case.meta["optim"]["params_after"]) == 4
  for name in case.meta["optim"]["params_after"]:
    want = case.io[f"out/opt_after/{name}"]
    got = names[f"transformer.{name}"]
    np.testing.assert_allclose(got, want, atol=ATOL, err_msg=name)
