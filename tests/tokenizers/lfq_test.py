"""Parity of the lookup-free tokenizer with the published one, and its weights.

The fixtures were written by the reference implementation; README.md beside
them explains each array and states the tolerances used here.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tensorar_jax.checkpoints import torch_export, torch_import
from tensorar_jax.nn import image_bytes
from tensorar_jax.parallel import weights as weights_lib
from tensorar_jax.tokenizers import lfq
from tests.contract import families
from tests.tokenizers.common import nchw, nhwc

FIXTURES = {"raw": "lfq_tokenizer", "ema": "lfq_tokenizer"}
FIXTURES |= {"first_stage": "gpt"}
MANIFESTS = {"raw": "imagenet_256_L_tokenizer", "first_stage": "AR_256_B"}
MANIFESTS |= {"ema": MANIFESTS["raw"]}
# This tokenizer is not trained against a discriminator yet.
GAN = {"in/disc_logits_real", "in/disc_logits_fake", "out/gan_gen_loss"}
GAN |= {"out/gan_hinge_d_loss", "out/gan_lecam"}
GAN |= {"out/disc_out_eval", "out/disc_out_train"}


# --- fixtures --------------------------------------------------------------


def config_of(ddconfig, bits, weights) -> lfq.Config:
  return lfq.Config(
    channels=ddconfig["ch"],
    channel_multipliers=tuple(ddconfig["ch_mult"]),
    num_res_blocks=ddconfig["num_res_blocks"],
    bits=tuple(bits),
    image_channels=ddconfig["in_channels"],
    image_size=(ddconfig["resolution"],) * 2,
    weights=weights,
  )


@functools.cache
def load(parity, weights):
  """(model, arrays, the tensors of the file)."""
  folder = parity / "open_magvit2" / FIXTURES[weights]
  meta = json.loads((folder / "config.json").read_text())["model_init_args"]
  if "first_stage_config" in meta:
    meta = meta["first_stage_config"]["params"]
    bits = meta["factorized_bits"]
  else:
    bits = json.loads((folder / "config.json").read_text())["factorized_bits"]
  config = config_of(meta["ddconfig"], bits, weights)
  tensors = torch_import.load_state_dict(folder / "model.ckpt")
  model = weights_lib.abstract(lambda rngs: lfq.Model(config, rngs=rngs))
  model = torch_import.fill(model, lfq.import_rules(config), tensors)
  return model, Arrays(np.load(folder / "io.npz")), tensors


class Arrays(dict):
  """The arrays of a fixture, which remembers those it was asked for."""

  def __init__(self, arrays):
    super().__init__(arrays)
    self.read = set()

  def __getitem__(self, name):
    self.read.add(name)
    return super().__getitem__(name)


def one_token(tokens) -> np.ndarray:
  """Full indices [B, T] of sub-tokens, by way of the code."""
  codes = lfq.lookup(jnp.asarray(tokens), (3, 5))
  return np.asarray(lfq.tokens_of(codes, (8,)))[..., 0]


def sub_tokens(indices) -> jax.Array:
  codes = lfq.lookup(jnp.asarray(indices)[..., None], (8,))
  return lfq.tokens_of(codes, (3, 5))


@nnx.jit
def activations(stack, x):
  codes = x if stack.decoder else None
  return {name: (x := step(x)) for name, step in stack.steps(codes)}


encode = nnx.jit(lfq.Model.encode)
decode = nnx.jit(lfq.Model.decode, static_argnames="grid")


# --- parity: array name -> ours, in groups ---------------------------------


def weights_group(weights, parity):
  model, io, _ = load(parity, weights)
  taps = activations(model.encoder, nhwc(io["in/image"]))
  latents = taps["conv_out"]
  tokens = encode(model, nhwc(io["in/image"]))
  codes, _ = lfq.quantize(latents)
  rebuilt = activations(model.decoder, codes)["conv_out"]
  return {
    "encoder_out": nchw(latents),
    "bits": nchw(latents > 0).astype(np.uint8),
    "indices": one_token(tokens),
    "indices_pre": tokens[..., 0],
    "indices_post": tokens[..., 1],
    "quant_straight_through": nchw(codes),
    "quant": nchw(lfq.lookup(tokens, (3, 5)).reshape(codes.shape)),
    "decoded_from_indices": nchw(decode(model, tokens)),
    "reconstruction": nchw(rebuilt),
  }


def raw_group(parity):
  found = weights_group("raw", parity)
  return {f"raw_{name}": value for name, value in found.items()}


def ema_group(parity):
  found = weights_group("ema", parity)
  return {f"ema_{name}": value for name, value in found.items()}


def tap_group(parity):
  model, io, _ = load(parity, "raw")
  enc = activations(model.encoder, nhwc(io["in/image"]))
  dec = activations(model.decoder, nhwc(io["out/raw_quant"]))
  names = {f"enc_down{i}_downsample": f"levels/{i}/resample" for i in (1, 2, 3)}
  names |= {"enc_mid": "mid/0", "enc_norm_out": "norm_out"}
  names |= {"dec_conv_in": "conv_in", "dec_mid": "mid/0"}
  names |= {"dec_adaptive_first": "levels/4/norm"}
  names |= {"dec_up_first_blocks": "levels/4/blocks/0"}
  names |= {"dec_up_first_upconv": "levels/4/resample"}
  names |= {"dec_up_first_upsampled": "levels/4/depth_to_space"}
  names |= {"dec_adaptive_second": "levels/3/norm"}
  found = {
    f"tap_{theirs}": nchw((enc if theirs.startswith("enc") else dec)[ours])[:1]
    for theirs, ours in names.items()
  }
  first = nchw(enc["levels/0/blocks/0"])[:1, :4]
  return found | {"tap_enc_down0_block0": first}


def rect_group(parity):
  model, io, _ = load(parity, "raw")
  images = nhwc(io["in/image_rect"])
  tokens = encode(model, images)
  return {
    "rect_encoder_out": nchw(activations(model.encoder, images)["conv_out"]),
    "rect_indices": one_token(tokens),
    "rect_decoded_from_indices": nchw(decode(model, tokens, grid=(3, 4))),
  }


def quantizer_group(parity):
  model, io, _ = load(parity, "raw")
  latents = nhwc(io["in/lfq_in"])
  tokens = lfq.tokens_of(latents, (3, 5)).reshape(2, -1, 2)
  random = sub_tokens(io["in/rand_indices"])
  return {
    "lfq_quant": nchw(lfq.codes_of(latents)),
    "lfq_indices": lfq.tokens_of(latents, (8,)).reshape(2, -1),
    "lfq_indices_pre": tokens[..., 0],
    "lfq_indices_post": tokens[..., 1],
    "lfq_codebook": lfq.lookup(jnp.arange(256)[:, None], (8,)),
    "rand_indices_pre": random[..., 0],
    "rand_indices_post": random[..., 1],
    "rand_quant": nchw(lfq.lookup(random, (3, 5)).reshape(2, 4, 4, 8)),
    "rand_decoded": nchw(decode(model, random)),
  }


def parts_group(parity):
  model, io, _ = load(parity, "raw")
  norm = model.decoder.levels[-1].norm
  style = nhwc(io["in/agn_style"])
  return {
    "d2s_out": nchw(lfq.depth_to_space(nhwc(io["in/d2s_in"]))),
    "agn_out": nchw(norm(nhwc(io["in/agn_x"]), style)),
  }


def training_group(parity):
  _, io, _ = load(parity, "raw")
  cotangent = nhwc(io["in/lfq_cotangent"])

  def objective(latents):
    codes, terms = lfq.quantize(latents)
    spread = terms["entropy"] - terms["codebook_entropy"]
    loss = 0.1 * spread + 0.25 * terms["commitment"]
    return loss + (cotangent * codes).sum(), (terms, spread)

  latents = nhwc(io["in/lfq_in"])
  grad, aux = jax.jit(jax.grad(objective, has_aux=True))(latents)
  terms, spread = aux
  return {
    "lfq_train_per_sample_entropy": terms["entropy"],
    "lfq_train_codebook_entropy": terms["codebook_entropy"],
    "lfq_train_entropy_aux": spread,
    "lfq_train_commit": terms["commitment"],
    "lfq_train_grad": nchw(grad),
  }


def average_group(parity):
  """One step of the moving average, as training takes it."""
  (raw, _, tensors), (ema, *_) = load(parity, "raw"), load(parity, "ema")
  new, old = (m.encoder.conv_in.kernel[...] for m in (raw, ema))
  decay = float(np.asarray(tensors["model_ema.decay"]))
  assert abs(decay - 0.999) < 1e-6
  stepped = optax.incremental_update(new, old, 1.0 - decay)
  return {"ema_step_encoder_conv_in_weight": stepped.transpose(3, 2, 0, 1)}


GROUPS = (raw_group, ema_group, tap_group, rect_group)
GROUPS += (quantizer_group, parts_group, training_group, average_group)


@functools.cache
def computed(group, parity):
  return group(parity)


def tolerance(name: str) -> float:
  """Of the README; 0.0 for what has no rounding."""
  if name.startswith("lfq_train") or name.startswith("ema_step"):
    return 5e-6
  if name.startswith("tap") or name == "agn_out":
    return 5e-5
  if name.endswith("encoder_out"):
    return 2e-5
  return 3e-5 if "decoded" in name or "reconstruction" in name else 0.0


def assert_close(found, io):
  errors = {}
  for name, array in found.items():
    array, want = np.asarray(array), io[f"out/{name}"]
    assert array.shape == want.shape, name
    errors[name] = np.abs(array.astype(np.float64) - want).max()
  print({name: float(f"{error:.2g}") for name, error in errors.items()})
  assert not {n: e for n, e in errors.items() if not e <= tolerance(n)}


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.__name__)
def test_parity(group, parity):
  assert_close(computed(group, parity), load(parity, "raw")[1])


def test_parity_leaves_no_array_out(parity):
  compared = {f"out/{n}" for g in GROUPS for n in computed(g, parity)}
  arrays = [load(parity, weights)[1] for weights in ("raw", "ema")]
  inputs = {n for io in arrays for n in io.read if n.startswith("in/")}
  assert compared | inputs | GAN == set(arrays[0])


def test_parity_inside_an_autoregressive_checkpoint(parity):
  """Those arrays of the backbone's fixture that pass through the tokenizer."""
  model, io, _ = load(parity, "first_stage")
  images = nhwc(io["in/e2e_image"])
  tokens = encode(model, images)
  found = {
    "e2e_encoder_out": nchw(activations(model.encoder, images)["conv_out"]),
    "e2e_target_pre": tokens[..., 0],
    "e2e_target_post": tokens[..., 1],
  }
  errors = {n: np.abs(np.asarray(a) - io[f"out/{n}"]) for n, a in found.items()}
  for name in ("greedy_nocfg", "greedy_cfg", "sampA", "sampB"):
    pair = [io[f"out/{name}_{part}"] for part in ("pre", "post")]
    images = decode(model, jnp.asarray(np.stack(pair, -1), jnp.int32))
    errors[name] = np.abs(nchw(images) - io[f"out/{name}_image"])
    if name == "greedy_cfg":
      pixels = np.asarray(image_bytes.to_uint8(images, model.uint8_offset), int)
      assert np.abs(pixels - io["out/greedy_cfg_uint8"]).max() <= 1
  errors = {name: float(error.max()) for name, error in errors.items()}
  print(errors)
  assert errors.pop("e2e_target_pre") == errors.pop("e2e_target_post") == 0
  assert errors.pop("e2e_encoder_out") <= 2e-5
  assert max(errors.values()) <= 3e-5


# --- weights ---------------------------------------------------------------


published = functools.partial(families.manifest, name="open_magvit2")


@functools.cache
def abstract() -> lfq.Model:
  config = lfq.VARIANTS[lfq.SOURCES["imagenet_256_L.ckpt"]]
  return weights_lib.abstract(lambda rngs: lfq.Model(config, rngs=rngs))


@functools.cache
def planned(parity, weights, manifest=None) -> dict[str, str]:
  """path -> the name of the tensor that fills it."""
  model = abstract()
  config = dataclasses.replace(model.config, weights=weights)
  shapes = published(parity, file=manifest or MANIFESTS[weights])
  plan = torch_import.plan(model, lfq.import_rules(config), shapes)
  return {path: parts[0][0] for path, parts in plan.items()}


def test_parameter_counts_are_the_published_ones():
  for side, count in (("encoder", 49_751_442), ("decoder", 65_376_387)):
    state = nnx.state(getattr(abstract(), side))
    assert sum(x.size for x in jax.tree.leaves(state)) == count


@pytest.mark.parametrize("weights", lfq.WEIGHTS)
def test_import_rules_cover_the_published_file(weights, parity):
  names = set(planned(parity, weights).values())
  shapes = published(parity, file=MANIFESTS[weights])
  assert names == {n for n in shapes if is_read(n, weights)}


@pytest.mark.parametrize("name", ["AR_256_L", "AR_256_XL"])
def test_larger_models_hold_the_same_tokenizer(name, parity):
  assert planned(parity, "first_stage", name) == planned(parity, "first_stage")


def is_read(name: str, weights: str) -> bool:
  """Whether the weights are made of the tensor; no patterns, for a check."""
  prefix = {"raw": "", "ema": "model_ema."}.get(weights, "first_stage_model.")
  name = name.removeprefix(prefix) if name.startswith(prefix) else ""
  return name.startswith(("encoder", "decoder"))


def test_names_without_dots_lead_where_the_others_do(parity):
  folder = parity / "open_magvit2" / "real_checkpoint_manifest"
  name = "imagenet_256_L_tokenizer_ema_key_map.json"
  dotless = json.loads((folder / name).read_text())
  raw, ema = planned(parity, "raw"), planned(parity, "ema")
  assert len(raw) > 300
  assert {path: dotless[name] for path, name in raw.items()} == ema


@pytest.mark.parametrize("weights", lfq.WEIGHTS)
def test_a_fixture_goes_out_as_it_came_in(weights, parity):
  model, _, tensors = load(parity, weights)
  rules = lfq.import_rules(model.config)
  exported = torch_export.export_state_dict(model, rules)
  assert set(exported) == {n for n in tensors if is_read(n, weights)}
  for name, array in exported.items():
    want = np.asarray(tensors[name])
    assert (array.shape, array.dtype) == (want.shape, want.dtype), name
    assert array.tobytes() == want.tobytes(), name


def test_the_wrong_weights_are_refused(parity):
  for weights, other in (("ema", "first_stage"), ("first_stage", "raw")):
    with pytest.raises(ValueError, match="no rule claims"):
      planned(parity, weights, MANIFESTS[other])
