"""Parity with the published code and transformers', in both their layouts."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tensorar_jax as tj
from tensorar_jax.backbones import janus
from tensorar_jax.checkpoints import torch_export, torch_import
from tensorar_jax.conditioning import conditions
from tensorar_jax.parallel import weights
from tensorar_jax.tokenizers import vq
from tests import programs
from tests.backbones.janus_case import Case, compare
from tests.contract import families

LAYOUTS = ("published", "hf")
# What says which ids the toy vocabulary has; two of them are not used.
SPECIAL = {"bos_id", "eos_id", "boi_id", "image_id"}
INPUTS = {"pad_id", "cfg_weight", "temperature"}
INPUTS |= {f"{p}_{name}" for p in "ab" for name in ("prompt_ids", "tf_codes")}


@pytest.fixture(scope="module", params=LAYOUTS)
def case(request, janus_gpt):
  return Case(janus_gpt, request.param)


def rows_of(case, prompt):
  """Conditional and unconditional rows, one after the other."""
  images = len(case.io[f"{prompt}_tf_codes"])
  cond = case.condition(prompt, rows=2 * images)
  is_null = np.arange(2 * images) % 2 == 1
  return {**cond, "is_null": is_null}


def of_prompts(case):
  """What is made of the prompts, before any layer."""
  table = jnp.arange(case.model.vocab_sizes[0])[:, None]
  batch, null = case.condition("a", "b"), conditions.null
  ids = jnp.stack([batch["text"][..., 0], batch["text"][..., 1]], axis=1)
  mask = np.repeat(~batch["is_padding"], 2, axis=0)
  pad = case.io["pad_id"]
  found = {
    "img_embed_table": programs.embed(case.model, table),
    "batch_attention_mask": mask,
    "batch_rows": np.where(mask, ids.reshape(mask.shape), pad),
  }
  for p in "ab":
    cond = rows_of(case, p)
    null = cond["is_null"][:, None]
    text = cond["text"]
    found[f"{p}_tokens"] = np.where(null, text[..., 1], text[..., 0])
  return found


def teacher_forced(case, p):
  """All rows at once, then with a cache, along the given codes."""
  cond, codes = rows_of(case, p), case.io[f"{p}_tf_codes"]
  tokens = jnp.asarray(np.repeat(codes, 2, axis=0), jnp.int32)[..., None]
  x = programs.embed(case.model, tokens[:, :-1])
  states, hidden = programs.states(case.model, cond, x)
  found = {"layers": states, "hidden": hidden}
  prefix = case.model.embed_condition(cond)
  found["inputs_embeds"] = jnp.concatenate([prefix, x], axis=1)
  found["logits_all"] = case.logits(hidden)
  found["pixels"] = case.pixels(codes)
  forward = programs.forward(case.model, cond, x)
  found |= both(case, case.logits(forward))
  warm = found["logits_cfg"] / case.io["temperature"]
  found["probs_temp"] = jax.nn.softmax(warm)
  found = {f"{p}_tf_{name}": value for name, value in found.items()}
  cached = case.logits(programs.cached(case.model, cond, x))
  return found | {f"{p}_kv_{n}": v for n, v in both(case, cached).items()}


def both(case, logits):
  cond, uncond = logits[::2], logits[1::2]
  found = {"logits_cond": cond, "logits_uncond": uncond}
  return {**found, "logits_cfg": case.guided(cond, uncond)}


def greedy(case, p):
  """Sampled along the best logits, one image."""
  cond = case.condition(p)
  tokens, guided = case.generate(cond)
  found = {"tokens": tokens, "logits_cfg": guided}
  x = programs.embed(case.model, jnp.asarray(tokens)[:, :-1, None])
  for half, given in (("cond", cond), ("uncond", conditions.null(cond))):
    hidden = programs.cached(case.model, given, x)
    found[f"logits_{half}"] = case.logits(hidden)
  found["pixels"] = case.pixels(tokens)
  found["uint8"] = case.bytes(found["pixels"])
  return {f"{p}_greedy_{name}": value for name, value in found.items()}


def batch(case):
  """Two prompts of different lengths at once."""
  tokens, guided = case.generate(case.condition("a", "b"))
  return {"batch_greedy_tokens": tokens, "batch_greedy_logits_cfg": guided}


@pytest.fixture(scope="module")
def found(case):
  """Array -> our value, of all groups."""
  arrays = {}
  for make in (of_prompts, batch):
    arrays |= make(case)
  for p in "ab":
    arrays |= teacher_forced(case, p) | greedy(case, p)
  return arrays


def test_parity(case, found):
  errors = {
    name: compare(array, case.io[name], case.tolerances[name], name)
    for name, array in found.items()
  }
  print({name: float(f"{error:.2g}") for name, error in errors.items()})


def test_no_array_is_left_out(case, found):
  assert found.keys() | INPUTS | SPECIAL == {*case.io.files}


# What the file holds for other uses, and export does not write.
UNUSED = ("language_model.lm_head.", "lm_head.", "vision_model.", "aligner.")
UNUSED += ("model.vision_model.", "model.aligner.")
UNUSED += ("gen_vision_model.quantize.codebook_used",)


def test_export_gives_the_file_back(case):
  """In the file's own dtype and layout, the backbone and the tokenizer."""
  want, found = torch_import.load_state_dict(case.file), {}
  half = "model.norm.weight" not in want and "lm_head.weight" in want
  options = {"weights_dtype": "bfloat16" if half else "float32"}
  file = str(case.file)
  for made in (
    tj.import_backbone("janus", file, **case.fields, **options),
    tj.import_tokenizer(
      "vq", file, "janus", **case.tokenizer_fields, **options
    ),
  ):
    module = janus if isinstance(made, janus.Model) else vq
    rules = [r for r in module.import_rules(made.config) if r.target]
    if half:
      others = [r.source.startswith("model") for r in rules]
      rules = [
        dataclasses.replace(r, is_alias=not o) for r, o in zip(rules, others)
      ]
    found |= torch_export.export_state_dict(made, rules)
  assert not found.keys() - want.keys()
  assert all(n.startswith(UNUSED) for n in want.keys() - found.keys())
  for name, tensor in found.items():
    expected = np.asarray(want[name])
    assert tensor.dtype == expected.dtype
    np.testing.assert_array_equal(tensor, expected, name)


# Of the README: the language model without its text head, image head, aligner,
# image table, and what is needed in all, without the tokenizer's encoder.
COUNTS = {
  "1B": (1_442_940_928, 37_767_168, 4_214_784, 131_072, 1_527_637_123),
  "7B": (6_490_935_296, 83_906_560, 16_818_176, 131_072, 6_634_374_275),
}
PARTS = ("text_embed|blocks|norm", "head|head_hidden", "aligner", "token_embed")


@pytest.mark.parametrize("file, variant", janus.SOURCES.items())
def test_every_parameter_of_a_manifest_is_counted(parity, file, variant):
  shapes = families.manifest(parity, "janus", file)
  names, sizes = set(), {}
  for module, config in (
    (janus, janus.VARIANTS[variant]),
    (vq, vq.VARIANTS["janus"]),
  ):
    make = lambda rngs, m=module, c=config: m.Model(c, rngs=rngs)
    model = weights.abstract(make)
    planned = torch_import.plan(model, module.import_rules(config), shapes)
    names |= {name for parts in planned.values() for name, _ in parts}
    for path, array in weights.split(model)[1].items():
      group = path.split("/")[0]
      sizes[group] = sizes.get(group, 0) + array.size
  parts = [
    sum(n for g, n in sizes.items() if re.fullmatch(p, g)) for p in PARTS
  ]
  decodes = sizes["decoder"] + sizes["from_code"] + sizes["quantizer"]
  assert (*parts, sum(parts) + decodes) == COUNTS[variant]
  assert decodes + sizes["encoder"] + sizes["to_code"] == 71_883_403
  left = shapes.keys() - names
  assert left <= {
    "language_model.lm_head.weight",
    "lm_head.weight",
    "gen_vision_model.quantize.codebook_used",
  }
