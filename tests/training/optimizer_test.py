import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import rar_b
from tensorar_jax.checkpoints import torch_import
from tensorar_jax.experiment import config_file
from tensorar_jax.experiment.families import family
from tensorar_jax.parallel import weights
from tensorar_jax.training import optimizer
from tensorar_jax.training.optimizer import OptimConfig
from tests import tiny
from tests.contract import families


def test_groups_have_their_own_learning_rates_and_matrices_decay():
  model = tiny.wrapped(2)
  skeleton, params, _ = weights.split(model)
  config = optimizer.OptimConfig(
    learning_rate=1.0,
    backbone_learning_rate=0.1,
    schedule="linear",
    backbone_schedule="constant",
    weight_decay=0.5,
    clip_norm=0.0,
  )
  tx = optimizer.make(config, 10)
  state = tx.init(params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, state = tx.update(zeros, state, params)
  for path, update in updates.items():
    rate = 0.1 if path.startswith("backbone/") else 1.0
    decays = not path.endswith(("scale", "gain", "pad"))
    want = -rate * 0.5 * params[path] * decays
    np.testing.assert_allclose(update, want, rtol=1e-5, atol=1e-7)
  for _ in range(9):
    updates, state = tx.update(zeros, state, params)
  assert optax.tree.norm(
    {p: u for p, u in updates.items() if p.startswith("encoder/")}
  ) < 0.11 * 0.5 * optax.tree.norm(
    {p: u for p, u in params.items() if p.startswith("encoder/")}
  )


@pytest.mark.parametrize("name", families.BACKBONES)
def test_by_default_vectors_do_not_decay(name):
  _, params, _ = weights.split(families.backbone(name))
  for path, weight in params.items():
    vector = weight.ndim - ("/stacked/" in path) < 2
    assert optimizer.decays(path, OptimConfig()) != vector, path


def test_rar_rates_are_the_published_ones(parity):
  io = np.load(parity / "rar" / "schedules" / "io.npz")
  peak, final, warmup, total = io["lr_params"]
  config = config_file.load("configs/rar_b.py").stages["base"].optim
  assert config.backbone_learning_rate == peak
  assert config.final_rate == pytest.approx(final / peak)
  assert config.warmup_steps == warmup
  with jax.enable_x64():
    rates = optimizer.schedules(config, int(total))["backbone"]
    got = [rates(jnp.asarray(step, float)) for step in io["lr_steps"]]
  np.testing.assert_allclose(got, io["lr"], rtol=1e-12)


def test_rar_decays_what_the_published_code_decays(parity):
  """In the base stage's training from nothing."""
  folder = parity / "rar" / "real_checkpoint_manifest"
  want = json.loads((folder / "rar_b_weight_decay_groups.json").read_text())
  module = family("backbones", "rar")
  config = module.VARIANTS["B"]
  model = weights.abstract(lambda rngs: module.Model(config, rngs=rngs))
  shapes = families.manifest(parity, "rar", "rar_b.bin")
  planned = torch_import.plan(model, module.import_rules(config), shapes)
  settings = OptimConfig(no_decay=rar_b.NO_DECAY)
  got = {True: [], False: []}
  for path, parts in planned.items():
    names = [name for name, _ in parts]
    got[optimizer.decays(f"backbone/{path}", settings)] += names
  assert sorted(got[True]) == sorted(want["weight_decay_0.03"])
  assert sorted(got[False]) == sorted(want["no_weight_decay"])


@pytest.mark.parametrize("name", ["B", "XL", "wd_anneal"])
def test_open_magvit2_schedules_are_the_published_ones(name, parity):
  """Its last step has the final rate; ours is reached one step later."""
  folder = parity / "open_magvit2" / "gpt"
  c = json.loads((folder / "config.json").read_text())["schedules"][name]
  steps, rate, *decays = np.load(folder / "io.npz")[f"out/sched/{name}"].T
  config = OptimConfig(
    learning_rate=c["lr"],
    schedule="linear",
    warmup_steps=c["wp_it"],
    warmup_start=c["wp0"],
    final_rate=c["wpe"],
    hold=0.05,
    weight_decay=c["wd"],
    final_weight_decay=c["wd_end"],
  )
  with jax.enable_x64():
    rates = optimizer.schedules(config, c["max_it"] - 1)["new"]
    got = [rates(jnp.asarray(step, float)) for step in steps]
    np.testing.assert_allclose(got, rate, rtol=1e-12)
    decay = optimizer.decay_schedule(config, c["max_it"] - 1)
    got = [decay(jnp.asarray(step, float)) for step in steps]
  for want in decays:
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_bad_settings_are_refused():
  good = OptimConfig()
  for field, value in (
    ("hold", 1.0),
    ("final_rate", 1.5),
    ("warmup_start", -0.1),
    ("ema_decay", 1.0),
  ):
    with pytest.raises(ValueError, match=f"{field}={value}"):
      dataclasses.replace(good, **{field: value})
