"""Four steps of the published training, by our train step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tensorar_jax as tj
from tensorar_jax.backbones import llamagen
from tensorar_jax.checkpoints import torch_export
from tensorar_jax.method import losses
from tensorar_jax.parallel import weights
from tensorar_jax.training import optimizer, train_step


@pytest.fixture(scope="module")
def trace(parity):
  """(published arrays, ours): losses, norms, gradients, weights, average."""
  folder = parity / "llamagen" / "gpt_c2i"
  want, io = np.load(folder / "train.npz"), np.load(folder / "io.npz")
  meta = json.loads((folder / "meta.json").read_text())
  settings, c = meta["train_trace"], meta["config"]
  config = llamagen.Config(
    vocab_size=c["vocab_size"],
    grid=(meta["grid"],) * 2,
    width=c["dim"],
    num_layers=c["n_layer"],
    num_heads=c["n_head"],
    num_classes=c["num_classes"],
  )
  model = tj.import_backbone(
    "llamagen", str(folder / "checkpoint.pt"), **vars(config)
  )
  tokens = jnp.asarray(io["token_ids"], jnp.int32)[..., None]
  cond = tj.ClassConditioning(c["num_classes"]).encode(io["class_ids"])

  def loss(model, context, batch, rng, step):
    hidden = model(cond, model.embed(tokens[:, :-1]))
    ce, _ = losses.cross_entropy(model.logits(hidden, tokens), tokens)
    return ce.mean(), {}

  tx = optimizer.make(
    optimizer.OptimConfig(
      learning_rate=settings["lr"],
      weight_decay=settings["wd"],
      beta1=settings["betas"][0],
      beta2=settings["betas"][1],
      eps=settings["eps"],
      clip_norm=settings["clip"],
    ),
    settings["steps"],
  )
  skeleton, state = train_step.init_state(model, tx, 0, ema=True)
  rules = llamagen.import_rules(config)

  def named(params):
    return torch_export.export_state_dict(skeleton.merge(params), rules)

  compute = lambda params: loss(skeleton.merge(params), *[None] * 4)[0]
  got = {"gradients": named(jax.grad(compute)(weights.split(model)[1]))}
  step = train_step.make_train_step(skeleton, loss, tx, settings["ema_decay"])
  rows = []
  for _ in range(settings["steps"]):
    state, scalars = step(state, None, None)
    rows.append((scalars["loss"], scalars["grad_norm"]))
  got["losses"], got["norms"] = np.asarray(rows).T
  got["after"], got["ema"] = named(state.params), named(state.ema)
  return want, got


def test_losses_and_norms_of_every_step(trace):
  want, got = trace
  np.testing.assert_allclose(got["losses"], want["step_losses"], atol=1e-4)
  np.testing.assert_allclose(
    got["norms"], want["step_grad_norms_preclip"], atol=5e-4
  )


def test_gradients_by_name(trace):
  want, got = trace
  for name, norm in zip(want["grad_names"], want["grad_norms"], strict=True):
    found = np.linalg.norm(got["gradients"][name])
    np.testing.assert_allclose(found, norm, atol=1e-4, err_msg=name)
  for name in want.files:
    if name.startswith("grad:"):
      found = got["gradients"][name.removeprefix("grad:")]
      np.testing.assert_allclose(found, want[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["after", "ema"])
def test_weights_and_their_average_after_the_last_step(kind, trace):
  want, got = trace
  names = [name for name in want.files if name.startswith(f"{kind}:")]
  assert len(names) == 7
  for name in names:
    error = np.abs(got[kind][name.removeprefix(f"{kind}:")] - want[name])
    assert (error < 1e-5).mean() >= 0.999 and error.max() < 2e-3, name
