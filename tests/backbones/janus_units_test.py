"""Sizes, options and files of the family beyond those of the fixture."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import tensorar_jax as tj
from tensorar_jax.backbones import janus
from tensorar_jax.checkpoints import torch_export, torch_import
from tensorar_jax.nn import layers
from tensorar_jax.parallel import weights
from tests import programs, tiny
from tests.backbones.janus_case import divide, sizes
from tests.contract import families

ODD = janus.Config(
  text_vocab_size=13,
  vocab_size=11,
  grid=(3, 2),
  width=12,
  num_layers=2,
  num_heads=6,
  num_kv_heads=2,
  head_dim=4,
  mlp_width=7,
  code_dim=3,
  aligner_depth=3,
  head_width=5,
  rope_base=500.0,
)


def odd(seed=0):
  make = lambda rngs: janus.Model(ODD, rngs=rngs)
  return tiny.redraw(weights.abstract(make), seed)


@pytest.fixture(scope="module")
def file(janus_gpt):
  return janus_gpt / "published" / "model.safetensors"


@pytest.fixture(scope="module")
def fields(file):
  return {**sizes(file.parent)[0], "grid": (4, 4)}


def test_halves_are_rotated_by_their_angles():
  q = np.random.RandomState(0).standard_normal((2, 3, 5, 6)).astype("float32")
  angles = np.random.RandomState(1).standard_normal((2, 1, 5, 3))
  table = np.stack([np.cos(angles), np.sin(angles)], -1).astype("float32")
  got = layers.rotate_halves(jnp.asarray(q), jnp.asarray(table))
  turned = (q[..., :3] + 1j * q[..., 3:]) * np.exp(1j * angles)
  want = np.concatenate([turned.real, turned.imag], axis=-1)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_heads_groups_and_grids_of_other_sizes():
  """Heads whose widths do not add up to the model's, and a wide grid."""
  model, cond = odd(), tiny.prompts((0, 1, 2))
  block = model.blocks.stacked.attention
  assert block.query.kernel.shape == (2, 12, 24)
  assert block.key.kernel.shape == block.value.kernel.shape == (2, 12, 8)
  x = programs.embed(model, families.tokens((11,), batch=3, length=5))
  want = programs.forward(model, cond, x)
  assert want.shape == (3, 6, 12)
  np.testing.assert_allclose(programs.cached(model, cond, x), want, atol=5e-5)
  wrapped = tj.TensorAR(model, window=2, rngs=nnx.Rngs(0))
  out = tj.generate(wrapped, cond, None, jax.random.key(0))
  assert out.drafts.shape == (3, 6, 2, 1)


@pytest.mark.parametrize("alias", [False, True])
def test_either_layout_of_other_sizes_goes_out_and_in(alias):
  model, rules = odd(), janus.import_rules(ODD)
  rules = [
    dataclasses.replace(r, is_alias=r.is_alias != alias)
    for r in rules
    if r.target
  ]
  tensors = torch_export.export_state_dict(model, rules)
  other = torch_import.fill(odd(1), janus.import_rules(ODD), tensors)
  want, got = (weights.split(m)[1] for m in (model, other))
  for path, array in want.items():
    np.testing.assert_array_equal(got[path], array, path)


def test_bad_sizes_are_refused():
  for fields, words in (
    (dict(width=10, num_heads=4), "width=10 with num_heads=4: expected a wh"),
    (dict(width=12, num_heads=4), "heads of width 3: .* an even one"),
    (dict(head_dim=7), "heads of width 7"),
    (dict(num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=16"),
    (dict(aligner_depth=0), "aligner_depth=0: expected at least 1"),
    (dict(text_vocab_size=0), "text_vocab_size=0: expected"),
  ):
    with pytest.raises(ValueError, match=words):
      janus.Config(**fields)


def test_conditions_of_another_kind_are_refused():
  model = families.backbone("janus")
  for cond, words in (
    (tiny.cond(), "the token ids of prompts, the entry 'text'"),
    (tiny.texts(), r"shape \(2, 5, 7\) and dtype float32: .* integers \[B, P"),
    ({**tiny.prompts(), "order": np.zeros((2, 9), int)}, "in raster order"),
    (
      {**tiny.prompts(), "is_padding": np.zeros((2, 4), bool)},
      r"is_padding of shape \(2, 4\) for",
    ),
    (
      tj.PromptConditioning(length=5, vocab_size=14).example(),
      "token id 13: expected 0 to 12, as the backbone's text_vocab_size",
    ),
  ):
    with pytest.raises(ValueError, match=words):
      model.check(cond)
  model.check(tiny.prompts())


# --- files -------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_divided_file_is_read_with_its_index(tmp_path, file, fields, suffix):
  tensors = safetensors.numpy.load_file(file)
  index = divide(tensors, tmp_path, suffix)
  want = weights.split(tj.import_backbone("janus", str(file), **fields))[1]
  got = weights.split(tj.import_backbone("janus", str(index), **fields))[1]
  for path, array in want.items():
    np.testing.assert_array_equal(got[path], array, path)
  part = next(tmp_path.glob(f"*2-of-00002.{suffix}"))
  content = part.read_bytes()
  part.write_bytes(content[: len(content) // 2])
  with pytest.raises(ValueError, match="truncated"):
    tj.import_backbone("janus", str(index), **fields)
  part.unlink()
  with pytest.raises(ValueError, match="2-of-00002.* no such file"):
    tj.import_backbone("janus", str(index), **fields)
  with pytest.raises(ValueError, match="nothing fills"):
    one = next(tmp_path.glob(f"*1-of-00002.{suffix}"))
    tj.import_backbone("janus", str(one), **fields)


def test_files_that_do_not_fit_are_refused(tmp_path, file, fields):
  tensors = safetensors.numpy.load_file(file)

  def load(tensors):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return tj.import_backbone("janus", str(path), **fields)

  few = {n: t for n, t in tensors.items() if "lm_head" not in n}
  load({**few, "language_model.model.rotary_emb.inv_freq": np.zeros(8)})
  plain = {n.removeprefix("language_model."): t for n, t in tensors.items()}
  with pytest.raises(ValueError, match="no rule claims model.embed_tokens"):
    load(plain)  # a language model alone
  twice = tensors["gen_embed.weight"]
  with pytest.raises(ValueError, match="token_embed/embedding is claimed by"):
    load({**tensors, "model.generation_embeddings.weight": twice})
  with pytest.raises(ValueError, match=r"gives \(96, 8\) for token_embed/emb"):
    tj.import_backbone("janus", str(file), **{**fields, "vocab_size": 95})
  with pytest.raises(ValueError, match="no rule claims gen_aligner.layers.2"):
    tj.import_backbone("janus", str(file), **{**fields, "aligner_depth": 1})
