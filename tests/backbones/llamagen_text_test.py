"""Parity with the published text-to-image code, on tiny random checkpoints."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tensorar_jax as tj
from tensorar_jax.backbones import llamagen
from tensorar_jax.checkpoints import torch_export, torch_import
from tensorar_jax.conditioning import conditions
from tensorar_jax.method import noising, objective
from tensorar_jax.nn import attention, layers
from tests import programs, tiny
from tests.backbones.llamagen_case import Case, close

# How near guided logits have to be, by the scale.
GUIDED = {1.0: 2e-4, 4.0: 5e-4, 7.5: 1e-3}


@pytest.fixture(scope="module", params=("gpt_t2i", "gpt_t2i_120"))
def case(request, parity):
  return Case(parity / "llamagen" / request.param)


def without_mask(cond):
  return {name: v for name, v in cond.items() if name != "is_padding"}


def dropped(case):
  return {**case.cond, "is_null": jnp.asarray(case.io["drop_ids"], bool)}


def test_text_moves_to_the_right_and_its_padding_is_zero(case):
  np.testing.assert_array_equal(case.cond["text"], case.io["caption_left"])
  is_text = ~case.cond["is_padding"]
  np.testing.assert_array_equal(is_text, case.io["emb_mask_left"])


def test_attention_mask_and_rotary_table(case):
  rows = case.io["attn_mask"].shape[-1]
  padding = case.cond["is_padding"]
  mask = attention.causal_mask(jnp.arange(rows), rows, padding).visible
  np.testing.assert_array_equal(mask[:, None], case.io["attn_mask"])
  c = case.model.config
  table = layers.rotary_table_2d(
    c.grid, c.width // c.num_heads, c.rope_base, c.text_length
  )
  close(table, case.io["rope_table"], 2e-6)


def test_text_embeddings(case):
  embed = case.model.text_embed
  close(programs.forward(embed, case.cond), case.io["cap_embed"], 5e-6)
  null = programs.forward(embed, conditions.null(case.cond))
  close(null, case.io["cap_embed_uncond"], 5e-6)


def test_teacher_forced_states_and_logits(case):
  states, hidden = case.teacher_forced(case.cond)
  close(case.logits(hidden), case.io["eval_logits"], 2e-4)
  for cond, name in (
    (without_mask(case.cond), "nomask"),
    (conditions.null(case.cond), "uncond"),
  ):
    logits = case.logits(case.teacher_forced(cond)[1])
    close(logits, case.io[f"eval_logits_{name}"], 2e-4)
  if "eval_hidden_in" not in case.io:
    return
  embedded = programs.forward(case.model.text_embed, case.cond)
  rows = embedded, case.model.embed(case.tokens)
  close(jnp.concatenate(rows, axis=1), case.io["eval_hidden_in"], 5e-6)
  for layer, state in enumerate(states):
    close(state, case.io[f"eval_hidden_{layer}"], 2e-4)
  close(hidden, case.io["eval_hidden_norm"], 2e-4)


def test_cached_decoding(case):
  """Prefill gives only its last row; those before it have no step of ours."""
  want, last = case.io["kv_logits"], case.model.config.text_length - 1
  close(case.logits(case.decoded(case.cond)), want[:, last:], 2e-4)
  _, hidden = case.teacher_forced(case.cond, 0)
  close(case.logits(hidden), want[:, : last + 1], 2e-4)


@pytest.mark.parametrize("suffix", ["", "_dropped"])
def test_training_logits_and_losses(case, suffix):
  cond = dropped(case) if suffix else case.cond
  x = case.model.embed(case.tokens[:, :-1])
  hidden = programs.forward(case.model, cond, x)
  logits = case.logits(hidden)
  close(logits, case.io[f"train_logits{suffix}"], 2e-4)
  ce, _ = programs.cross_entropy((logits,), case.tokens)
  close(ce.mean(), case.io[f"loss_train{suffix}"], 1e-5)


def test_the_objective_counts_valid_samples_only(case):
  model, io = tj.TensorAR(case.model, window=1), case.io
  configs = noising.NoiseConfig(), objective.LossConfig()

  @jax.jit
  def run(model, is_valid):
    cond = {**case.cond, "is_valid": is_valid}
    return objective.tensorar_loss(model, cond, case.tokens, None, *configs)

  for valid, name in (
    (np.ones(len(io["valid"])), "loss_train"),
    (io["valid"], "loss_valid"),
    (np.zeros(len(io["valid"])), "loss_valid_none"),
  ):
    loss, metrics = run(model, valid.astype(bool))
    close(loss, io[name], 1e-5)
    close(metrics["ce/0"], io[name], 1e-5)
  assert loss == 0


def test_greedy_generation(case):
  for name, setting in case.meta["generation"].items():
    masked = setting.get("use_mask", True)
    cond = case.cond if masked else without_mask(case.cond)
    out = case.generate(name, cond)
    logits = np.asarray(out.logits[0][:, :, 0])
    np.testing.assert_array_equal(out.tokens[..., 0], case.io[f"{name}_tokens"])
    atol = GUIDED[setting["cfg_scale"]]
    close(logits, case.io[f"{name}_logits"], atol)
    best = np.sort(logits, axis=-1)
    margin = best[..., -1] - best[..., -2]
    close(margin, case.io[f"{name}_margin"], 2 * atol)


def test_no_array_is_left_out(case):
  tested = r"""
    (token_ids|t5_(feats|mask)_right|valid|drop_ids  # inputs
    |caption_left|emb_mask_left|attn_mask|rope_table|cap_embed(_uncond)?
    |eval_hidden_(in|norm|\d)|eval_logits(_nomask|_uncond)?|kv_logits
    |train_logits(_dropped)?|loss_(train(_dropped)?|valid(_none)?)
    |gen_(%s)_(tokens|logits|margin))"""
  tested %= "|".join(n.removeprefix("gen_") for n in case.meta["generation"])
  pattern = re.compile(tested, re.VERBOSE)
  assert not [name for name in case.io.files if not pattern.fullmatch(name)]


def test_export_gives_the_file_back(case):
  rules = llamagen.import_rules(case.model.config)
  found = torch_export.export_state_dict(case.model, rules)
  want = torch_import.load_state_dict(case.file)
  assert found.keys() == want.keys()
  for name, tensor in want.items():
    np.testing.assert_array_equal(found[name], np.asarray(tensor), name)


def test_files_of_the_other_kind_are_refused(case):
  fields = {**vars(case.model.config), "text_width": None}
  with pytest.raises(ValueError, match="text_embed/null, which the model lac"):
    tj.import_backbone("llamagen", str(case.file), **fields)


def test_new_models_start_as_published():
  """Null features are normal / sqrt(E), and no parameter; the head is zero."""
  config = llamagen.Config(
    width=16, num_layers=1, num_heads=2, text_width=64, text_length=50
  )
  embed = llamagen.TextEmbed(config, config.text_width, rngs=nnx.Rngs(0))
  null = embed.null[...]
  assert null.shape == (50, 64)
  np.testing.assert_allclose(null.std(), 64**-0.5, rtol=0.05)
  assert "null" not in dict(nnx.to_flat_state(nnx.state(embed, nnx.Param)))
  for projection in (embed.up, embed.down):
    np.testing.assert_allclose(projection.kernel[...].std(), 0.02, rtol=0.1)


def test_conditions_of_another_kind_or_size_are_refused():
  text = tiny.backbone(text_width=7, text_length=5)
  text.check(tiny.texts())
  with pytest.raises(ValueError, match="text features, the entry 'text'"):
    text.check(tiny.cond())
  with pytest.raises(ValueError, match="class labels, the entry 'label'"):
    tiny.backbone().check(tiny.texts())
  other = tj.TextConditioning(width=8, length=5).example()
  with pytest.raises(ValueError, match=r"\(1, 5, 8\): .* reads \[B, 5, 7\]"):
    tj.generate(tj.TensorAR(text), other, None, jax.random.key(0))
  cond = {**tiny.texts(), "is_padding": jnp.zeros((2, 4), bool)}
  with pytest.raises(ValueError, match=r"is_padding of shape \(2, 4\) for"):
    text.check(cond)
  with pytest.raises(ValueError, match="text_width=7, text_length=0: expect"):
    tiny.backbone(text_width=7, text_length=0)
