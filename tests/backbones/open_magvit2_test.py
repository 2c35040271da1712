"""Parity with the published Open-MAGVIT2 code, on a tiny random checkpoint.

Every group of arrays is computed by one function, name -> array, and compared
at the tolerance that the fixture's README suggests.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tensorar_jax as tj
from tensorar_jax.backbones import open_magvit2
from tensorar_jax.checkpoints import torch_export, torch_import
from tensorar_jax.method import drawing, losses, sampling
from tensorar_jax.nn import attention, layers
from tensorar_jax.parallel import weights
from tests import programs
from tests.backbones.open_magvit2_case import Case


def halves(name, arrays):
  return {f"{name}_pre": arrays[0], f"{name}_post": arrays[1]}


def loss_terms(name, logits, tokens):
  pre, post = (
    programs.cross_entropy((logits[f],), tokens[..., f : f + 1])[0].mean()
    for f in range(2)
  )
  both = programs.cross_entropy(logits, tokens)[0].mean()
  return {name: both, **halves(name, (pre, post))}


def rotary(case):
  c = case.model.config
  head_dim = c.width // c.num_heads
  return {
    "rope_table": layers.rotary_table_2d(c.grid, head_dim, c.rope_base, 1)
  }


def spatial_taps(case):
  model = case.model
  x = model.embed(case.tokens[:, :-1])
  start = model.class_embed(case.cond["label"])[:, None]
  x = jnp.concatenate([start, x], axis=1)
  block = model.blocks.each()[0]
  rotate = model.config.rotation(jnp.arange(x.shape[1])[None], prefix=1)
  rows = jnp.arange(x.shape[1])
  mask = attention.causal_mask(rows, len(rows), None)
  norm = block.attention_norm(x)
  mixed, _ = block.attention(norm, rotate, mask)
  states, _ = programs.states(model, case.cond, x[:, 1:])
  return {
    "tap_spatial_in": x,
    "tap_spatial0_attn_norm": norm,
    "tap_spatial0_attn_out": mixed,
    "tap_spatial0_ffn_out": block.mlp(block.mlp_norm(x + mixed)),
    **{f"tap_spatial{i}_out": state for i, state in enumerate(states)},
  }


def inner_taps(case):
  """Upstream's batch of B * N pairs; each pair is (step 0, step 1)."""
  model, tokens = case.model, case.tokens
  hidden = programs.forward(model, case.cond, model.embed(tokens[:, :-1]))
  flat = lambda a: a.reshape(-1, *a.shape[-2:])
  first = flat(hidden)
  first, second = (
    a.reshape(-1, model.width)
    for a in (hidden, model.token_embeds[0](tokens[..., 0]))
  )
  block = model.inner_blocks.each()[0]
  y0, values = block.attend_first(first)
  y1 = block.attend_second(second, values)
  states, normed = model.inner_states(hidden, tokens)
  return {
    "tap_intra_in": jnp.stack([first, second], axis=1),
    "tap_intra0_attn_out": jnp.stack([y0, y1], axis=1),
    **{f"tap_intra{i}_out": flat(state) for i, state in enumerate(states)},
    "tap_final_norm": normed,
  }


def teacher_forced(case):
  cond = case.logits(case.cond, case.tokens)
  null = case.logits(case.null, case.tokens)
  scales = jnp.asarray(case.input("cfg_scale"), jnp.float32)
  guided = [
    drawing.guide(jnp.concatenate(both), scale)
    for *both, scale in zip(cond, null, scales, strict=True)
  ]
  return {
    **halves("tf_logits", cond),
    **halves("tf_null_logits", null),
    **halves("tf_cfg_logits", guided),
  }


def teacher_forced_losses(case):
  logits = case.logits(case.cond, case.tokens)
  return loss_terms("tf_loss", logits, case.tokens)


def cached(case):
  model, tokens = case.model, case.tokens

  def rows(cond, tokens):
    hidden = programs.cached(model, cond, model.embed(tokens[:, :-1]))
    return hidden, programs.logits(model, hidden, tokens)

  hidden, plain = rows(case.cond, tokens)
  both = jax.tree.map(lambda *a: jnp.concatenate(a), case.cond, case.null)
  _, doubled = rows(both, jnp.concatenate([tokens, tokens]))
  scales = jnp.asarray(case.input("cfg_scale"), jnp.float32)
  guided = [drawing.guide(a, s) for a, s in zip(doubled, scales, strict=True)]
  return {
    "kv_context": hidden,
    **halves("kv_logits", plain),
    **halves("kv_cfg_logits", guided),
  }


def generate(case, **options):
  config = tj.SamplingConfig(return_logits=True, **options)
  null = case.null if config.guided else None
  base = tj.TensorAR(case.model, window=1)
  return tj.generate(base, case.cond, null, jax.random.key(0), config)


def greedy(case):
  arrays = {}
  for name, guidance in (
    ("nocfg", 1.0),
    ("cfg", tuple(case.input("cfg_scale"))),
  ):
    out = generate(case, temperature=0.0, guidance=guidance)
    logits = [one[:, :, 0] for one in out.logits]
    arrays |= {
      **halves(f"greedy_{name}", (out.tokens[..., 0], out.tokens[..., 1])),
      f"greedy_{name}_full": case.full(out.tokens),
      **halves(f"greedy_{name}_logits", logits),
    }
  return arrays


def sampled(case):
  """The sampler, fed with the fixture's uniform numbers."""
  arrays = {}
  for name in ("sampA", "sampB"):
    uniform = jnp.asarray(case.input(f"{name}_u"))  # [step, sub-token, batch]
    given = lambda noise, u=uniform: u[noise.steps[0]].T[:, None, noise.f]
    options = dict(
      temperature=tuple(case.input(f"{name}_temperature")),
      guidance=tuple(case.input(f"{name}_cfg_scale")),
      top_k=tuple(map(int, case.input(f"{name}_top_k"))),
      top_p=tuple(case.input(f"{name}_top_p")),
    )
    with mock.patch.object(drawing.Noise, "uniform", given):
      sampling._generate.clear_cache()
      out = generate(case, **options)
    sampling._generate.clear_cache()
    probs = []
    for f, logits in enumerate(out.logits):
      config = tj.SamplingConfig(**options).sub_token(f)
      scaled = logits[:, :, 0] / config.temperature
      probs.append(jax.nn.softmax(drawing.filter_logits(scaled, config)))
    arrays |= halves(name, (out.tokens[..., 0], out.tokens[..., 1]))
    arrays |= halves(f"{name}_probs", probs)
  return arrays


def filters(case):
  logits = jnp.asarray(case.input("filter_logits"))
  configs = [
    tj.SamplingConfig(top_k=int(top_k), top_p=float(top_p))
    for top_k, top_p in case.input("filter_settings")
  ]
  return {
    f"filter_out_{i}": drawing.filter_logits(logits, config.sub_token(0))
    for i, config in enumerate(configs)
  }


def train_losses(case):
  cond = {**case.cond, "is_null": jnp.asarray(case.input("class_drop"), bool)}
  logits = case.logits(cond, case.tokens)
  return loss_terms("train_loss", logits, case.tokens)


def gradients(case):
  cond = {**case.cond, "is_null": jnp.asarray(case.input("class_drop"), bool)}
  skeleton, params, _ = weights.split(case.model)

  def loss(params):
    model = skeleton.merge(params)
    hidden = model(cond, model.embed(case.tokens[:, :-1]))
    logits = model.logits(hidden, case.tokens)
    return losses.cross_entropy(logits, case.tokens)[0].mean()

  grads = torch_export.export_state_dict(
    skeleton.merge(jax.jit(jax.grad(loss))(params)),
    open_magvit2.import_rules(case.model.config),
  )
  grads = {n.removeprefix("transformer."): g for n, g in grads.items()}
  norms = [np.linalg.norm(grads[n]) for n in case.meta["grad_names_sorted"]]
  assert len(norms) == len(grads)
  return {
    **{f"grad/{name}": grads[name] for name in case.meta["grad_params"]},
    "grad_l2_per_param": np.asarray(norms),
    "grad_total_norm": np.linalg.norm(norms),
  }


def after_the_tokenizer(case):
  """The part of the shared step from image to loss that is ours."""
  tokens = case.pair("out/e2e_target")
  logits = case.logits(case.cond, tokens)
  return halves("e2e_logits", logits)


def after_the_tokenizer_losses(case):
  tokens = case.pair("out/e2e_target")
  return loss_terms("e2e_loss", case.logits(case.cond, tokens), tokens)


# Integer arrays are compared exactly, whatever the group's tolerance.
GROUPS = {
  "rotary": (rotary, 1e-6),
  "spatial_taps": (spatial_taps, 5e-5),
  "inner_taps": (inner_taps, 5e-5),
  "teacher_forced": (teacher_forced, 5e-5),
  "teacher_forced_losses": (teacher_forced_losses, 5e-6),
  "cached": (cached, 5e-5),
  "greedy": (greedy, 5e-5),
  "sampled": (sampled, 1e-5),
  "filters": (filters, 0.0),
  "train_losses": (train_losses, 5e-6),
  "gradients": (gradients, 5e-6),
  "after_the_tokenizer": (after_the_tokenizer, 5e-5),
  "after_the_tokenizer_losses": (after_the_tokenizer_losses, 5e-6),
}
# Arrays of other parts, by prefix or suffix of their names, and where they are.
ELSEWHERE = {
  "opt_": "the optimiser's tests",
  "sched/": "the optimiser's tests",
  "_image": "tests/e2e/open_magvit2_pipeline_test.py",
  "_uint8": "tests/e2e/open_magvit2_pipeline_test.py",
  "e2e_encoder_out": "tests/e2e/open_magvit2_pipeline_test.py",
  "e2e_target_": "tests/e2e/open_magvit2_pipeline_test.py",
}


@pytest.fixture(scope="module")
def case(parity):
  return Case(parity / "open_magvit2" / "gpt")


@functools.cache
def group(case, name):
  return GROUPS[name][0](case)


@pytest.mark.parametrize("name", GROUPS)
def test_parity(case, name):
  for array, got in group(case, name).items():
    got, want = np.asarray(got), case.io[f"out/{array}"]
    assert got.shape == want.shape, array
    if want.dtype.kind in "iu":
      np.testing.assert_array_equal(got, want, err_msg=array)
    else:
      atol = GROUPS[name][1]
      np.testing.assert_allclose(got, want, atol=atol, rtol=0, err_msg=array)


def test_no_array_of_the_fixture_is_left_out(case):
  np.testing.assert_array_equal(
    case.full(case.tokens), case.input("tokens_full")
  )
  claimed = {f"out/{array}" for name in GROUPS for array in group(case, name)}
  claimed |= {f"in/{name}" for name in case.read}
  for name in set(case.io.files) - claimed:
    _, _, array = name.partition("/")
    assert any(
      array.startswith(part) or array.endswith(part) for part in ELSEWHERE
    ), name
  assert claimed <= set(case.io.files)


def test_export_gives_the_file_back(case):
  want = torch_import.load_state_dict(case.folder / "model.ckpt")
  want = {n: t for n, t in want.items() if n.startswith("transformer.")}
  rules = open_magvit2.import_rules(case.model.config)
  got = torch_export.export_state_dict(case.model, rules)
  assert got.keys() == want.keys()
  for name, array in got.items():
    tensor = np.asarray(want[name])
    assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), name
    assert array.tobytes() == tensor.tobytes(), name


def test_a_trainers_checkpoint_is_read(case, tmp_path):
  """Optimiser, callbacks and settings beside the state dict do not matter."""
  content = torch.load(case.folder / "model.ckpt", weights_only=True)
  moments = {0: {"step": torch.ones(()), "exp_avg": torch.ones(3)}}
  content |= {
    "hyper_parameters": {"lr": 3e-4, "betas": (0.9, 0.95), "name": None},
    "callbacks": {"ModelCheckpoint{'monitor': None}": {"best": torch.ones(())}},
    "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1}]}],
    "lr_schedulers": [],
  }
  torch.save(content, tmp_path / "last.ckpt")
  _, got, _ = weights.split(case.load(tmp_path / "last.ckpt"))
  _, want, _ = weights.split(case.model)
  jax.tree.map(np.testing.assert_array_equal, got, want)
