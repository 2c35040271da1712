"""Parity with the published LlamaGen code, on tiny random checkpoints."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tensorar_jax as tj
from tensorar_jax.backbones import llamagen
from tensorar_jax.conditioning import conditions
from tensorar_jax.method import drawing
from tensorar_jax.nn import layers
from tensorar_jax.parallel import weights
from tests import programs, tiny
from tests.backbones.llamagen_case import Case, close
from tests.contract import families

CASES = ("gpt_c2i", "gpt_c2i_gqa", "gpt_c2i_opts")


@pytest.fixture(scope="module", params=CASES)
def case(request, parity):
  return Case(parity / "llamagen" / request.param)


def test_rotary_table(case):
  c = case.model.config
  head_dim = c.width // c.num_heads
  table = layers.rotary_table_2d(c.grid, head_dim, c.rope_base, 1)
  close(table, case.io["rope_table"], 2e-6)


def test_rotary_tables_of_the_published_sizes(parity):
  tables = np.load(parity / "llamagen" / "rope_tables.npz")
  for name in tables.files:
    want = tables[name]
    grid, prefix = _layout(len(want))
    got = layers.rotary_table_2d(grid, 2 * want.shape[1], 10000.0, prefix)
    close(got, want, 2e-6)


def _layout(rows):
  """(grid, prefix) of a table with that many rows; prefixes are 1 or 120."""
  for prefix in (1, 120):
    side = int(round((rows - prefix) ** 0.5))
    if side * side + prefix == rows:
      return (side, side), prefix
  raise AssertionError(rows)


def test_teacher_forced_states_and_logits(case):
  states, hidden = case.teacher_forced(case.cond)
  first = case.model.class_embed(case.cond["label"])[:, None]
  rest = case.model.embed(case.tokens)
  close(jnp.concatenate([first, rest], 1), case.io["eval_hidden_in"], 1e-6)
  for layer, state in enumerate(states):
    close(state, case.io[f"eval_hidden_{layer}"], 2e-4)
  close(hidden, case.io["eval_hidden_norm"], 2e-4)
  close(case.logits(hidden), case.io["eval_logits"], 2e-4)


def test_short_sequences_and_the_null_class(case):
  short = case.meta["short_prefix_positions"]
  _, hidden = case.teacher_forced(case.cond, short - 1)
  close(case.logits(hidden), case.io["eval_logits_short"], 2e-4)
  _, hidden = case.teacher_forced(conditions.null(case.cond))
  close(case.logits(hidden), case.io["eval_logits_null"], 2e-4)


def test_cached_decoding(case):
  close(case.logits(case.decoded(case.cond)), case.io["kv_logits"], 2e-4)


@pytest.mark.parametrize("suffix", ["", "_dropped"])
def test_training_logits_and_losses(case, suffix):
  cond = dict(case.cond)
  if suffix:
    cond["is_null"] = jnp.asarray(case.io["drop_ids"], bool)
  x = case.model.embed(case.tokens[:, :-1])
  hidden = programs.forward(case.model, cond, x)
  logits = case.logits(hidden)
  close(logits, case.io[f"train_logits{suffix}"], 2e-4)
  ce, _ = programs.cross_entropy((logits,), case.tokens)
  close(ce.mean(), case.io[f"loss_train{suffix}"], 1e-5)
  if suffix:
    return
  close(ce, case.io["loss_per_token"], 1e-4)
  # Samples with valid = 0 count neither above nor below the line.
  valid = case.io["valid"][:, None] * np.ones(ce.shape)
  close((ce * valid).sum() / valid.sum(), case.io["loss_valid"], 1e-5)
  assert case.io["loss_valid_none"] == 0  # nothing to weigh: no loss


def test_greedy_generation(case):
  for name in case.meta["generation"]:
    out = case.generate(name, case.cond)
    np.testing.assert_array_equal(out.tokens[..., 0], case.io[f"{name}_tokens"])
    close(out.logits[0][:, :, 0], case.io[f"{name}_logits"], 5e-4)


def test_filters(parity):
  io = np.load(parity / "llamagen" / "gpt_c2i" / "io.npz")
  logits = jnp.asarray(io["filter_in"])
  for i, (top_k, top_p, temperature) in enumerate(io["filter_settings"]):
    # A published top_k above the vocabulary keeps all of it.
    config = tj.SamplingConfig(top_k=int(top_k), top_p=float(top_p))
    scaled = logits / max(float(temperature), 1e-5)
    got = drawing.filter_logits(scaled, config.sub_token(0))
    want = io[f"filter_out_{i}"]
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    close(got, want, 1e-4 * max(1, np.abs(want[np.isfinite(want)]).max()))
    close(jax.nn.softmax(got), io[f"filter_probs_{i}"], 1e-5)
    best = jnp.argmax(got, axis=-1)
    np.testing.assert_array_equal(best, io[f"filter_argmax_{i}"][:, 0])


def test_bfloat16_is_as_near_as_the_published_code(parity):
  """Informational arrays: mean error 0.05, loss 1e-2."""
  case = Case(parity / "llamagen" / "gpt_c2i", dtype="bfloat16")
  _, hidden = case.teacher_forced(case.cond)
  error = np.abs(case.logits(hidden) - case.io["bf16_eval_logits"])
  assert error.mean() < 0.05 and error.max() < 0.6
  x = case.model.embed(case.tokens[:, :-1])
  hidden = programs.forward(case.model, case.cond, x)
  ce, _ = programs.cross_entropy((case.logits(hidden),), case.tokens)
  close(ce.mean(), case.io["bf16_autocast_loss_train"], 1e-2)


def test_no_array_is_left_out(case):
  tested = r"""
    (token_ids|class_ids|drop_ids|valid|rope_table|filter_(in|settings)
    |eval_(hidden_\w+|logits(_null|_short)?)|kv_logits
    |train_logits(_dropped)?|loss_(train(_dropped)?|per_token|valid(_none)?)
    |gen_\w+_(tokens|logits|margin)|filter_(out|probs|argmax)_\d+
    |bf16_(eval_logits|autocast_loss_train))"""
  pattern = re.compile(tested, re.VERBOSE)
  assert not [name for name in case.io.files if not pattern.fullmatch(name)]


def test_parameter_counts_are_the_published_ones(parity):
  folder = parity / "llamagen" / "real_checkpoint_manifest"
  for file, variant in llamagen.SOURCES.items():
    manifest = json.loads((folder / file.replace(".pt", ".json")).read_text())
    config = llamagen.VARIANTS[variant]
    model = weights.abstract(
      lambda rngs, c=config: llamagen.Model(c, rngs=rngs)
    )
    assert families.count(model) == manifest["total_parameters"], file


def test_training_from_nothing_starts_as_upstream_does():
  """Normal(0, 0.02) everywhere, norms at 1, a zero head: a loss of ln V."""
  config = dataclasses.replace(tiny.CONFIG, width=64, num_classes=50)
  model = llamagen.Model(config, rngs=nnx.Rngs(0))
  _, params, _ = weights.split(model)
  for path, value in params.items():
    if path == "head/kernel":
      assert not value.any()
    elif path.endswith("scale"):
      assert (value == 1).all()
    else:
      assert abs(float(value.mean())) < 0.02 * 5 / value.size**0.5, path
      np.testing.assert_allclose(value.std(), 0.02, rtol=0.06, err_msg=path)
  tokens, cond = tiny.tokens(), tiny.cond()
  hidden = model(cond, model.embed(tokens[:, :-1]))
  ce, _ = programs.cross_entropy(model.logits(hidden, tokens), tokens)
  np.testing.assert_allclose(ce, np.log(config.vocab_size), rtol=1e-6)
