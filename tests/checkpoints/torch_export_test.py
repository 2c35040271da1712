"""What was imported goes out again as it came, bit for bit."""

import json
import os
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx

from tensorar_jax.backbones import llamagen
from tensorar_jax.checkpoints import torch_export, torch_import
from tensorar_jax.interfaces import Rule
from tensorar_jax.parallel import weights
from tensorar_jax.tokenizers import vq
from tests import tiny
from tests.backbones import llamagen_case
from tests.tokenizers import common

RULES = llamagen.import_rules(tiny.CONFIG)
UNUSED = re.compile(r"quantize\.codebook_used|freqs_cis|.*kv_cache.*")


def gpt(folder):
  """(model class, config, rules) of a fixture of the GPT."""
  config = llamagen.Config(**llamagen_case.backbone_fields(folder))
  return llamagen.Model, config, llamagen.import_rules(config)


def tokenizer(folder):
  """(model class, config, rules) of a fixture of the tokenizer."""
  meta = json.loads((folder / "meta.json").read_text())
  config = vq.Config(**common.vq_config(meta, image_size=(64, 64)))
  return vq.Model, config, vq.import_rules(config)


def fill(family, tensors, dtype=None):
  make, config, rules = family
  model = weights.abstract(lambda rngs: make(config, rngs=rngs))
  return torch_import.fill(model, rules, tensors, dtype)


def assert_same_files(got, want):
  """Two files hold the same tensors; those never needed may be absent."""
  got = torch_import.load_state_dict(got)
  want = torch_import.load_state_dict(want)
  needed = {name for name in want if not UNUSED.fullmatch(name)}
  assert got.keys() == needed
  for name in needed:
    a, b = np.asarray(got[name]), np.asarray(want[name])
    assert (a.shape, a.dtype) == (b.shape, b.dtype), name
    assert a.tobytes() == b.tobytes(), name


@pytest.mark.parametrize(
  "case", ["gpt_c2i", "gpt_c2i_gqa", "gpt_c2i_opts", "vq16", "vq8"]
)
def test_a_fixture_goes_out_as_it_came_in(case, parity, tmp_path):
  folder = parity / "llamagen" / case
  family = (gpt if case.startswith("gpt") else tokenizer)(folder)
  source = folder / "checkpoint.pt"
  model = fill(family, torch_import.load_state_dict(source))
  tensors = torch_export.export_state_dict(model, family[2])
  for path in (tmp_path / "a.pt", tmp_path / "a.safetensors"):
    torch_export.save(path, tensors)
    assert_same_files(path, source)


@pytest.mark.parametrize("suffix", torch_export.SUFFIXES)
def test_every_container_goes_out_as_it_came_in(suffix, parity, tmp_path):
  folder = parity / "llamagen" / "containers"
  family = gpt(folder)
  for source in folder.glob("*.pt*"):
    dtype = "bfloat16" if "bf16" in source.name else None
    model = fill(family, torch_import.load_state_dict(source), dtype)
    path = tmp_path / f"{source.name}{suffix}"
    torch_export.save(path, torch_export.export_state_dict(model, family[2]))
    assert_same_files(path, source)


def test_a_bfloat16_file_survives_float32(parity):
  """Widening is exact, so that narrowing gives the same bits again."""
  folder = parity / "llamagen" / "containers"
  family = gpt(folder)
  want = torch_import.load_state_dict(folder / "fsdp_consolidated_bf16.pth")
  model = fill(family, want)
  got = torch_export.export_state_dict(model, family[2], "bfloat16")
  for name, array in got.items():
    assert array.dtype == jnp.bfloat16
    assert array.tobytes() == np.asarray(want[name]).tobytes()


def test_pytorch_reads_what_is_written(tmp_path):
  model = tiny.backbone()
  tensors = torch_export.export_state_dict(model, RULES)
  torch_export.save(tmp_path / "a.pt", tensors)
  torch_export.save(tmp_path / "a.safetensors", tensors)
  found = torch.load(tmp_path / "a.pt", weights_only=True)
  assert found.keys() == {"model"}
  flat = safetensors.torch.load_file(tmp_path / "a.safetensors")
  assert found["model"].keys() == flat.keys() == tensors.keys()
  for name, tensor in found["model"].items():
    assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert torch.equal(tensor, flat[name])
  kernel = model.blocks.stacked.mlp.down.kernel[2]
  got = found["model"]["layers.2.feed_forward.w2.weight"]
  np.testing.assert_array_equal(got.numpy(), kernel.T)


def test_exported_arrays_are_the_callers_own():
  model = tiny.backbone()
  tensors = torch_export.export_state_dict(model, RULES)
  before = model.norm.scale[...].copy()
  tensors["norm.weight"][:] = 7
  np.testing.assert_array_equal(model.norm.scale[...], before)


# --- rules -----------------------------------------------------------------


class Toy(nnx.Module):
  """Three parameters, of which one is in a list and one is stacked."""

  def __init__(self):
    self.parts = nnx.List([nnx.Dict(left=nnx.Param(jnp.arange(3.0)))])
    self.stack = nnx.Param(jnp.arange(24.0).reshape(4, 2, 3))
    self.scale = nnx.Param(jnp.float32(5))


REST = [Rule(r"stack\.(?P<layer>\d+)", "stack", (1, 0)), Rule("s", "scale")]
PART = Rule(r"p\.(?P<n>\d+)\.(?P<side>left|right)", "parts/{n}/{side}")


def test_a_rule_is_turned_round():
  got = torch_export.export_state_dict(Toy(), [PART, *REST, Rule("x.*", None)])
  assert got.keys() == {"p.0.left", "s", *(f"stack.{i}" for i in range(4))}
  np.testing.assert_array_equal(got["p.0.left"], [0, 1, 2])
  np.testing.assert_array_equal(got["stack.3"], [[18, 21], [19, 22], [20, 23]])
  assert got["s"].shape == () and got["s"] == 5


@pytest.mark.parametrize(
  ("source", "target"),
  [
    (r"p\.(?P<n>\d+)\.(?:down|up)", "parts/{n}/left"),  # two names
    (r"p\.(?P<n>\d+)\.left.?", "parts/{n}/left"),
    (r"p\.(?P<n>\d+).left", "parts/{n}/left"),  # an unescaped dot
    (r"p\.\d+\.left", "parts/0/left"),
    (r"p\.(?P<n>\d+)\.(?P<what>a|b)", "parts/{n}/left"),
    (r"(?P<n>\d+)(\.left)?", "parts/{n}/left"),
  ],
)
def test_a_rule_for_several_names_is_refused(source, target):
  with pytest.raises(ValueError, match="cannot be turned round") as error:
    torch_export.export_state_dict(Toy(), [Rule(source, target), *REST])
  assert repr(source) in str(error.value)


def test_rules_of_another_model_are_refused():
  with pytest.raises(ValueError, match="0 rules lead to parts/0/left"):
    torch_export.export_state_dict(Toy(), REST)
  twice = Rule("other", "parts/0/left")
  with pytest.raises(ValueError, match="2 rules lead to parts/0/left"):
    torch_export.export_state_dict(Toy(), [PART, twice, *REST])
  with pytest.raises(ValueError, match="pass only the backbone"):
    torch_export.export_state_dict(tiny.wrapped(), RULES)
  same_name = [PART, REST[0], Rule(r"p\.0\.left", "scale")]
  with pytest.raises(ValueError, match="2 rules claim p.0.left"):
    torch_export.export_state_dict(Toy(), same_name)


def test_damaged_weights_are_refused():
  model = tiny.backbone()
  model.norm.scale[0] = 1e6
  with pytest.raises(ValueError, match="norm.weight reaches 1e.06.*float16"):
    torch_export.export_state_dict(model, RULES, "float16")
  model.norm.scale[0] = jnp.nan
  with pytest.raises(ValueError, match="norm.weight holds NaN"):
    torch_export.export_state_dict(model, RULES)
  with pytest.raises(ValueError, match="dtype='int8': expected one of"):
    torch_export.export_state_dict(model, RULES, "int8")


# --- files -----------------------------------------------------------------

ONE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T}


@pytest.mark.parametrize("suffix", torch_export.SUFFIXES)
def test_a_file_is_new_and_whole_or_not_there(suffix, tmp_path, monkeypatch):
  path = tmp_path / f"a{suffix}"

  def interrupt(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(os, "link", interrupt)
    torch_export.save(path, ONE)
  assert not list(tmp_path.iterdir())
  torch_export.save(path, ONE)
  assert [p.name for p in tmp_path.iterdir()] == [path.name]
  got = torch_import.load_state_dict(path)["a"]
  np.testing.assert_array_equal(got, ONE["a"])
  before = path.read_bytes()
  with pytest.raises(ValueError, match="exists. Remove it, or choose"):
    torch_export.save(path, {"a": np.zeros(9, np.float32)})
  assert path.read_bytes() == before


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
  with pytest.raises(ValueError, match="expected a file name with one of"):
    torch_export.save(tmp_path / "a.npz", ONE)
  with pytest.raises(ValueError, match="no such folder"):
    torch_export.save(tmp_path / "b" / "a.pt", ONE)


def test_without_torch_the_writer_says_so(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ValueError, match="need the package torch"):
    torch_export.save(tmp_path / "a.pt", ONE)
  torch_export.save(tmp_path / "a.safetensors", ONE)
  assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
