"""Parity with the published T5 encoder, on a tiny random checkpoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tensorar_jax as tj
from tensorar_jax.checkpoints import torch_export, torch_import
from tensorar_jax.conditioning import conditions, t5
from tensorar_jax.parallel import weights
from tests import programs
from tests.contract import families

BATCHES = ("short", "long", "llamagen")


class Case:
  """The fixture folder: arrays, their tolerances, our model of it."""

  def __init__(self, folder):
    self.folder = folder
    self.io = np.load(folder / "io.npz")
    self.tolerances = json.loads((folder / "tolerances.json").read_text())
    self.model = tj.import_t5(folder, "float32")

  def inputs(self, batch):
    ids = jnp.asarray(self.io[f"{batch}_input_ids"])
    return ids, jnp.asarray(self.io[f"{batch}_attention_mask"], bool)

  def check(self, got, name):
    within = self.tolerances[name]
    if within == "exact":
      np.testing.assert_array_equal(got, self.io[name])
    else:
      np.testing.assert_allclose(got, self.io[name], **within)


@pytest.fixture(scope="module")
def case(parity):
  return Case(parity / "t5" / "t5_encoder")


@pytest.fixture(scope="module")
def found(case):
  """batch -> (what enters each block, features)."""
  run = jax.jit(lambda model, *inputs: model.hidden_states(*inputs))
  return {batch: run(case.model, *case.inputs(batch)) for batch in BATCHES}


def test_buckets_and_bias(case):
  c = case.model.config
  offsets = case.io["bucket_offsets"]
  got = t5.buckets(offsets, c.num_buckets, c.max_distance)
  case.check(got, "bucket_table")
  case.check(case.model.position_bias(24), "position_bias_short")


def test_hidden_states_and_features(case, found):
  for batch, (states, features) in found.items():
    case.check(features, f"{batch}_last_hidden_state")
    if f"{batch}_hidden_after_block" in case.io:
      case.check(states, f"{batch}_hidden_after_block")


def test_features_as_the_image_model_reads_them(case, found):
  mask = case.inputs("llamagen")[1]
  features, mask = conditions.align_right(found["llamagen"][1], mask)
  case.check(features, "llamagen_left_padded")
  case.check(mask, "llamagen_left_mask")


def test_no_array_is_left_out(case):
  compared = {"bucket_table", "position_bias_short", "short_hidden_after_block"}
  compared |= {f"{batch}_last_hidden_state" for batch in BATCHES}
  compared |= {"llamagen_left_padded", "llamagen_left_mask"}
  inputs = {
    f"{b}_{n}" for b in BATCHES for n in ("input_ids", "attention_mask")
  }
  assert {*case.io.files} == compared | inputs | {"bucket_offsets"}


def test_bfloat16_is_near_float32(case, found):
  ids, mask = case.inputs("short")
  got = programs.forward(tj.import_t5(case.folder), ids, mask)
  want = found["short"][1]
  assert got.dtype == jnp.bfloat16
  # In bfloat16 the published code is 0.0255 away itself.
  assert np.abs(got - want).mean() < 0.0255 * np.abs(want).mean()


def test_export_gives_the_file_back(case):
  rules = t5.import_rules(case.model.config)
  got = torch_export.export_state_dict(case.model, rules)
  want = torch_import.load_state_dict(case.folder / "model.safetensors")
  assert got.keys() == want.keys()
  for name, tensor in want.items():
    np.testing.assert_array_equal(got[name], np.asarray(tensor), name)


def test_the_rules_cover_the_published_file(parity):
  folder = parity / "t5"
  manifest = folder / "real_checkpoint_manifest" / "flan_t5_xl_encoder.json"
  keys = json.loads(manifest.read_text())
  shapes = {name: tuple(shape) for name, (shape, _) in keys.items()}
  summary = json.loads((folder / "real_checkpoint_summary.json").read_text())
  config = t5.Config()
  model = weights.abstract(lambda rngs: t5.Model(config, rngs=rngs))
  rules = t5.import_rules(config)
  torch_import.plan(model, rules, shapes)
  count = families.count(model)
  assert count == summary["encoder_parameters_incl_shared_embedding"]
  assert len(shapes) == summary["encoder_keys"]
  # Whole models also hold copies of the table, and what is not the encoder.
  more = dict.fromkeys(summary["ignored_duplicate_keys"], (32128, 2048))
  for prefix in summary["ignored_prefixes"]:
    more[f"{prefix}block.0.weight"] = (1,)
  torch_import.plan(model, rules, {**shapes, **more})
  shapes.pop("encoder.final_layer_norm.weight")
  with pytest.raises(ValueError, match="nothing fills norm/scale"):
    torch_import.plan(model, rules, {**shapes, "encoder.odd": (1,)})


def test_other_models_and_sizes_are_refused():
  right = {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
  assert t5.published_config(right, "bfloat16").dtype == "bfloat16"
  for wrong in ({"model_type": "umt5"}, {"feed_forward_proj": "relu"}):
    with pytest.raises(ValueError, match=f"{[*wrong.values()][0]}.*Flan-T5"):
      t5.published_config({**right, **wrong}, "float32")
  for wrong, words in (
    ({"dtype": "float16"}, "dtype='float16'"),
    ({"num_buckets": 7}, "num_buckets=7: expected an even number"),
    ({"max_distance": 8}, "max_distance=8: expected more than 8"),
  ):
    with pytest.raises(ValueError, match=words):
      t5.Config(**wrong)
