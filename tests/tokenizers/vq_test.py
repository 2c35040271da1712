"""Tests of the VQ tokenizer: parity with the published network, and units.

The fixtures were written by the reference implementation; README.md beside
them explains each array and states the tolerances used here.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tensorar_jax import interfaces
from tensorar_jax.parallel import weights
from tensorar_jax.tokenizers import vq
from tests.tokenizers import common
from tests.tokenizers.common import nchw, nhwc

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "parity"
PARITY = pathlib.Path(os.environ.get("TENSORAR_PARITY", FIXTURES)) / "llamagen"
CASES = ("vq16", "vq8")
INPUTS = {"image", "image_rect", "random_grid", "random_codes"}
INPUTS |= {"ste_cotangent"}
# Cropping, resizing and the usage queue are not the tokenizer's business.
ELSEWHERE = {"src_image", "src_image_size", "src_crop_range", "src_crop_size"}
ELSEWHERE |= {"src_center_crop_big", "src_center_crop", "src_ten_crop"}
ELSEWHERE |= {"codebook_usage", "codebook_used_after_tail"}
SIZES = {"channels": 4, "channel_multipliers": (1, 2, 3), "num_res_blocks": 1}
SIZES |= {"latent_channels": 5, "code_dim": 3, "codebook_size": 11}
SIZES |= {"norm_groups": 2, "image_channels": 1, "image_size": (12, 20)}
TINY = vq.Config(**SIZES)


def parity_folder(name: str) -> pathlib.Path:
  folder = PARITY / name
  if not folder.is_dir():
    pytest.fail(f"no parity fixtures at {folder}: is the clone complete?")
  return folder


def target_of(rules: list[interfaces.Rule], name: str):
  """The single rule that claims a name, and the path it leads to."""
  matches = [(r, m) for r in rules if (m := re.fullmatch(r.source, name))]
  assert len(matches) == 1, f"{name}: claimed by {[r for r, _ in matches]}"
  rule, match = matches[0]
  return rule, rule.target and rule.target.format(**match.groupdict())


def fill(config: vq.Config, tensors: dict[str, np.ndarray]) -> nnx.Module:
  """Stands in for the import engine; as strict as that in both directions."""
  model = weights.abstract(lambda rngs: vq.Model(config, rngs=rngs))
  rules, used = vq.import_rules(config), set()
  state = nnx.to_flat_state(nnx.state(model, nnx.Param))
  params = {"/".join(map(str, path)): param for path, param in state}
  for name, tensor in tensors.items():
    rule, target = target_of(rules, name)
    used.add(rule)
    if target is None:
      continue
    value = tensor.transpose(rule.axes) if rule.axes else tensor
    param = params.pop(target)  # Fails where two names fill one parameter.
    assert param.shape == value.shape, (name, target)
    param.set_value(value)
  assert not params, f"left unfilled: {list(params)}"
  assert used == set(rules), f"claim nothing: {set(rules) - used}"
  return model


@functools.cache
def load(case: str) -> tuple[nnx.Module, dict[str, np.ndarray]]:
  import torch

  folder = parity_folder(case)
  meta = json.loads((folder / "meta.json").read_text())
  io = dict(np.load(folder / "io.npz"))
  fields = common.vq_config(
    meta,
    image_size=io["image"].shape[2:],
    commitment_weight=meta["commit_loss_beta"],
    entropy_weight=meta["entropy_loss_ratio"],
  )
  config = vq.Config(**fields)
  saved = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
  model = fill(config, {name: value.numpy() for name, value in saved.items()})
  nnx.update(model, jax.tree.map(jnp.asarray, nnx.state(model)))
  return model, io


def activations(stack, x) -> dict[str, jax.Array]:
  return {name: (x := step(x)) for name, step in stack.steps()}


@nnx.jit
def encoder_activations(model, images):
  taps = activations(model.encoder, images)
  return taps, model.to_code(taps["conv_out"]), model.encode(images)


@nnx.jit
def decoder_activations(model, codes):
  x = model.from_code(model.quantizer.lookup(codes))
  return {"from_code": x} | activations(model.decoder, x)


decode = nnx.jit(vq.Model.decode, static_argnames="grid")
encode = nnx.jit(vq.Model.encode)
latents_of = nnx.jit(vq.Model.latents)


def tap(x) -> np.ndarray:
  """The part of an activation that the fixtures keep."""
  x = nchw(x)[:1, :16]
  return x[:, :, ::4] if x.shape[-1] >= 32 else x


def margins(model, latents) -> np.ndarray:
  unit = latents / np.linalg.norm(latents, axis=-1, keepdims=True)
  table = np.asarray(model.quantizer.codebook[...])
  table = table / np.linalg.norm(table, axis=-1, keepdims=True)
  best = np.sort(((unit[..., None, :] - table) ** 2).sum(-1), axis=-1)
  return best[..., 1] - best[..., 0]


def taps_of(taps, model, side: str, scale: str, attention: str) -> dict:
  last = len(model.config.channel_multipliers) - 1
  ours = {"conv_in": "conv_in", "norm_out": "norm_out"}
  ours |= {f"{scale}{i}": f"resamples/{i}" for i in range(last)}
  ours |= {f"mid{i}": f"mid/{i}" for i in range(3)}
  ours |= {attention[:-2]: f"attentions/{attention[-1]}"}
  ours |= {"res0": "levels/0/0"} if side == "enc" else {}
  return {f"tap_{side}_{theirs}": tap(taps[n]) for theirs, n in ours.items()}


def computed_encoder(model, io) -> dict[str, np.ndarray]:
  out = {}
  for end in ("_rect", ""):
    images = nhwc(io["image" + end])
    taps, latents, tokens = encoder_activations(model, images)
    out["encoder_out" + end] = nchw(taps["conv_out"])
    out["prequant" + end] = nchw(latents)
    out["indices" + end] = tokens.ravel()
  return out | taps_of(taps, model, "enc", "down", "attn_last/1")


def computed_quantizer(model, io) -> dict[str, np.ndarray]:
  out = {}
  for end in ("", "_rect"):
    latents = latents_of(model, nhwc(io["image" + end]))
    codes, rows, _ = model.quantizer(latents)
    out["quant" + end] = nchw(rows)
    out["codebook_entry" + end] = nchw(model.quantizer.lookup(codes))
    out["code_margin" + end] = margins(model, np.asarray(latents)).ravel()
  return out


def computed_decoder(model, io) -> dict[str, np.ndarray]:
  b, _, h, w = io["quant"].shape
  taps = decoder_activations(model, io["indices"].reshape(b, h, w))
  out = taps_of(taps, model, "dec", "up", "attn_first/0")
  out["post_quant"] = nchw(taps["from_code"])
  out["decoded"] = nchw(decode(model, io["indices"].reshape(b, -1, 1)))
  grid = io["quant_rect"].shape[2:]
  tokens = io["indices_rect"].reshape(1, -1, 1)
  out["decoded_rect"] = nchw(decode(model, tokens, grid=grid))
  grid = tuple(io["random_grid"].tolist())
  tokens = io["random_codes"][..., None]
  out["decoded_random"] = nchw(decode(model, tokens, grid=grid))
  return out


def computed_training(model, io) -> dict[str, np.ndarray]:
  latents = nhwc(io["prequant"])
  graph, params = nnx.split(model.quantizer)

  def through(z):
    return (nnx.merge(graph, params)(z)[1] * nhwc(io["ste_cotangent"])).sum()

  def total(z, params):
    losses = nnx.merge(graph, params)(z)[2]
    return sum(losses.values()), losses

  grads, losses = jax.grad(total, (0, 1), has_aux=True)(latents, params)
  return {
    "ste_grad_z": nchw(jax.grad(through)(latents)),
    "qloss_grad_z": nchw(grads[0]),
    "qloss_grad_codebook": grads[1]["codebook"][...],
    "vq_loss": losses["codebook"],
    "commit_loss": losses["commitment"],
    "entropy_loss": losses["entropy"],
  }


def computed_extraction(model, io) -> dict[str, np.ndarray]:
  crop = io["src_center_crop"]
  out = {"src_normalised": nchw(crop[None] / np.float32(127.5) - 1.0)}
  flips = np.stack([crop, crop[:, ::-1]])
  for name, images in (("ten_crop", io["src_ten_crop"]), ("flip", flips)):
    images = images / np.float32(127.5) - 1.0
    out[f"codes_{name}"] = encode(model, images)[None, ..., 0]
    found = margins(model, np.asarray(latents_of(model, images)))
    out[f"codes_{name}_margin"] = found.reshape(1, len(images), -1)
  return out


GROUPS = {
  "encoder": computed_encoder,
  "quantizer": computed_quantizer,
  "decoder": computed_decoder,
  "training": computed_training,
  "extraction": computed_extraction,
}


@functools.cache
def computed(case: str, group: str) -> dict[str, np.ndarray]:
  return GROUPS[group](*load(case))


def tolerance(name: str) -> float:
  if re.match(r"indices|codes_\w+(?<!margin)$", name):
    return 0.0
  if re.match(r"quant|codebook_entry|src_normalised", name):
    return 1e-6
  if name.endswith("_loss"):
    return 1e-5
  return 5e-5 if "_grad_" in name else 1e-4


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, group):
  _, io = load(case)
  errors = {}
  for name, array in computed(case, group).items():
    array = np.asarray(array)
    assert array.shape == io[name].shape, name
    errors[name] = np.abs(array.astype(np.float64) - io[name]).max()
  print(case, group, {k: float(f"{v:.2g}") for k, v in errors.items()})
  wrong = {k: v for k, v in errors.items() if not v <= tolerance(k)}
  assert not wrong


@pytest.mark.parametrize("case", CASES)
def test_parity_leaves_no_array_out(case):
  _, io = load(case)
  names = [set(computed(case, group)) for group in GROUPS]
  assert set().union(*names) | INPUTS | ELSEWHERE == set(io)


@pytest.mark.parametrize("file, variant", vq.SOURCES.items())
def test_import_rules_cover_the_published_file(file, variant):
  name = file.replace(".pt", ".json")
  manifest = parity_folder("real_checkpoint_manifest") / name
  keys = json.loads(manifest.read_text())["keys"]
  # Views of one zero: the shapes without the memory.
  views = {k: np.broadcast_to(0.0, shape) for k, (shape, _) in keys.items()}
  fill(vq.VARIANTS[variant], views)


def drawn(config: vq.Config) -> vq.Model:
  """A model with weights from NumPy: tracing the initialiser takes long."""
  model = weights.abstract(lambda rngs: vq.Model(config, rngs=rngs))
  rng = np.random.default_rng(0)
  for path, param in nnx.to_flat_state(nnx.state(model)):
    value = np.full(param.shape, path[-1] == "scale")
    if param.ndim > 1:
      value = (
        rng.uniform(-1, 1, param.shape) / math.prod(param.shape[:-1]) ** 0.5
      )
    param.set_value(jnp.asarray(value, jnp.float32))
  return model


@pytest.fixture(scope="module")
def tiny() -> vq.Model:
  return drawn(TINY)


def test_shapes_and_seams(tiny):
  assert isinstance(tiny, interfaces.Tokenizer)
  assert isinstance(tiny, interfaces.Trainable)
  assert tiny.grid == (3, 5)
  assert tiny.vocab_sizes == (11,)
  images = jax.random.uniform(jax.random.key(0), (2, 12, 20, 1), minval=-1)
  tokens = encode(tiny, images)
  assert (tokens.shape, tokens.dtype) == ((2, 15, 1), jnp.int32)
  assert decode(tiny, tokens).shape == images.shape
  tokens = encode(tiny, images[:, :4, :12])
  assert decode(tiny, tokens, grid=(1, 3)).shape == (2, 4, 12, 1)
  vector = jax.eval_shape(lambda: nnx.state(tiny))
  assert all(isinstance(x, nnx.Param) for _, x in nnx.to_flat_state(vector))


def test_initialisation_is_the_published_one():
  rows = vq.Quantizer(TINY, nnx.Rngs(0)).codebook[...]
  np.testing.assert_allclose(jnp.linalg.norm(rows, axis=-1), 1.0, atol=1e-6)


def test_tokens_are_the_nearest_rows(tiny):
  latents = jax.random.normal(jax.random.key(1), (2, 3, 5, 3))
  tiny_rows = np.asarray(tiny.quantizer.lookup(jnp.arange(11)), np.float64)
  unit = np.asarray(latents, np.float64)
  unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
  distances = ((unit[..., None, :] - tiny_rows) ** 2).sum(-1)
  codes, rows, losses = tiny.quantizer(latents)
  np.testing.assert_array_equal(codes, distances.argmin(-1))
  np.testing.assert_allclose(rows, tiny_rows[np.asarray(codes)], atol=1e-6)
  nearest = distances.min(-1).mean() / 3
  np.testing.assert_allclose(losses["codebook"], nearest, rtol=1e-5)
  assert np.isnan(tiny.quantizer.lookup(jnp.array([11]))).all()
  zero = jax.grad(lambda z: tiny.quantizer(z)[1].sum())(0 * latents)
  assert np.isfinite(zero).all()


def test_bfloat16_stays_close(tiny):
  config = dataclasses.replace(TINY, dtype="bfloat16")
  half = drawn(config)
  tokens = jnp.arange(30).reshape(2, 15, 1) % 11
  images = decode(half, tokens)
  assert images.dtype == jnp.float32
  np.testing.assert_allclose(images, decode(tiny, tokens), atol=0.05)


def test_training_reconstructs_and_keeps_the_codebook_in_use():
  """Discs of many places and sizes, from a codebook of 11 rows."""
  images = common.discs()
  config = SIZES | {"channels": 8, "channel_multipliers": (1, 2)}
  config = vq.Config(**config | {"image_size": (12, 12)}, entropy_weight=0.01)
  history = common.train(drawn(config), images)
  assert set(history[-1]) == {"mse", "codebook_usage", "commitment"}
  variance = float(np.var(images / 127.5))
  assert history[-1]["mse"] < 0.5 * variance
  assert history[-1]["codebook_usage"] > 0.7


def test_errors_name_value_expectation_and_remedy(tiny):
  with pytest.raises(ValueError, match=r"norm_groups=5 .* \[128, .* example"):
    vq.Config(norm_groups=5)
  with pytest.raises(ValueError, match="250x256: expected multiples of 16"):
    vq.Config(image_size=(250, 256))
  with pytest.raises(ValueError, match="10x20: expected multiples of 4"):
    tiny.encode(jnp.zeros((2, 10, 20, 1)))
  with pytest.raises(ValueError, match="expected 1 channels"):
    tiny.encode(jnp.zeros((2, 12, 20, 3)))
  with pytest.raises(ValueError, match=r"expected 15 .* \(3, 5\); pass"):
    tiny.decode(jnp.zeros((2, 14, 1), jnp.int32))
