"""Tests of the MaskGIT-VQGAN tokenizer: parity with the published network.

The fixtures were written by the reference implementation; README.md beside
them explains each array and states the tolerances used here. They are square
and of one size: a second, short network in PyTorch stands in for the others.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tensorar_jax import interfaces
from tensorar_jax.checkpoints import torch_export, torch_import
from tensorar_jax.nn import image_bytes
from tensorar_jax.parallel import weights
from tensorar_jax.tokenizers import maskgit_vq
from tests.contract import families
from tests.tokenizers import common
from tests.tokenizers.common import nchw, nhwc

FILE = "maskgit-vqgan-imagenet-f16-256.bin"
INPUTS = {"image_sq"}
TINY = maskgit_vq.Config(
  channels=4,
  channel_multipliers=(1, 2, 3),
  num_res_blocks=1,
  code_dim=3,
  codebook_size=11,
  norm_groups=2,
  image_channels=1,
  image_size=(12, 20),
)
# Each differs from the fixture in what it could have been fitted to.
SHAPES = {
  "flat": (TINY, (8, 20)),
  "tall, wide from the start": (
    dataclasses.replace(
      TINY, channel_multipliers=(2, 2), num_res_blocks=3, image_channels=3
    ),
    (14, 6),
  ),
  "narrower again, 8x": (
    dataclasses.replace(
      TINY,
      channel_multipliers=(3, 1, 2, 1),
      num_res_blocks=2,
      code_dim=7,
      image_size=(8, 8),
    ),
    (16, 24),
  ),
  "one level": (dataclasses.replace(TINY, channel_multipliers=(2,)), (3, 5)),
}

decode = nnx.jit(maskgit_vq.Model.decode, static_argnames="grid")
encode = nnx.jit(maskgit_vq.Model.encode)
latents_of = nnx.jit(maskgit_vq.Model.latents)


@pytest.fixture(scope="module")
def folder(parity):
  return parity / "rar" / "maskgit_vqgan"


@pytest.fixture(scope="module")
def io(folder):
  return dict(np.load(folder / "io.npz"))


@pytest.fixture(scope="module")
def published(folder):
  return common.published_maskgit_vq(folder / FILE)


def means(stack, x) -> dict[str, np.ndarray]:
  """The mean of each channel behind each part of a stack, by our names."""

  @nnx.jit
  def run(stack, x):
    return {n: (x := step(x)).mean((1, 2)) for n, step in stack.steps()}

  return run(stack, x)


def margins(latents, table) -> np.ndarray:
  """By how much the second row of the codebook is farther than the first."""
  wide = np.asarray(latents, np.float64)[..., None, :]
  distances = np.sort(((wide - np.asarray(table)) ** 2).sum(-1), axis=-1)
  return distances[..., 1] - distances[..., 0]


@pytest.fixture(scope="module")
def computed(published, io) -> dict[str, np.ndarray]:
  model, images = published, jnp.asarray(2 * nhwc(io["image_sq"]) - 1)
  latents = latents_of(model, images)
  tokens = jnp.asarray(io["indices_sq"], jnp.int32)[..., None]
  _, _, losses = model.quantizer(latents)
  rows = model.quantizer.lookup(tokens.reshape(latents.shape[:-1]))
  decoded = decode(model, tokens)
  out = {
    "latents_sq": nchw(latents),
    "indices_sq": encode(model, images)[..., 0],
    "quantized_sq": nchw(rows),
    "vq_loss_sq": sum(losses.values()),
    "margin_sq": margins(latents, model.quantizer.codebook).reshape(2, 16),
    "decoded_raw_sq": nchw(decoded + 1) / 2,
    "decoded_sq": nchw(jnp.clip(decoded, -1, 1) + 1) / 2,
    "uint8_sq": image_bytes.to_uint8(decoded, model.uint8_offset),
  }
  encoder = means(model.encoder, (images + 1) / 2)
  decoder = means(model.decoder, rows)
  for side, taps, way in (("enc", encoder, "down"), ("dec", decoder, "up")):
    taps.pop("conv_out")
    for name, value in taps.items():
      name = name.replace("levels/", way).replace("/", "")
      out[f"stage_sq_{side}_{name}"] = value
  return {name: np.asarray(array) for name, array in out.items()}


GROUPS = {  # array or its beginning -> largest difference
  "indices": 0.0,
  "quantized": 0.0,
  "latents": 5e-5,
  "margin": 5e-5,
  "vq_loss": 1e-5,
  "decoded": 1e-4,
  "stage_sq_enc": 5e-5,
  "stage_sq_dec": 1e-4,
  "uint8": 1.0,
}


@pytest.mark.parametrize("group", GROUPS)
def test_parity(group, computed, io):
  errors = {}
  for name in computed:
    if name.startswith(group):
      got, want = computed[name], io[name]
      assert got.shape == want.shape, name
      errors[name] = np.abs(got.astype(np.float64) - want).max()
  print(group, {k: float(f"{v:.2g}") for k, v in errors.items()})
  assert errors and max(errors.values()) <= GROUPS[group]


def test_few_bytes_differ(computed, io):
  """A float that is cut off may fall on the other side of an integer."""
  assert (computed["uint8_sq"] != io["uint8_sq"]).mean() < 0.002


def test_parity_leaves_no_array_out(computed, io):
  assert computed.keys() | INPUTS == io.keys()
  for name in computed:
    assert any(name.startswith(group) for group in GROUPS), name


def test_an_import_goes_out_as_it_came_in(published, folder):
  want = torch_import.load_state_dict(folder / FILE)
  rules = maskgit_vq.import_rules(published.config)
  got = torch_export.export_state_dict(published, rules)
  assert got.keys() == want.keys()
  for name, array in got.items():
    source = np.asarray(want[name])
    assert (array.dtype, array.shape) == (source.dtype, source.shape), name
    assert array.tobytes() == source.tobytes(), name


def test_import_rules_cover_the_published_file(parity):
  shapes = families.manifest(parity, "rar", "maskgit_vqgan")
  assert sum(math.prod(shape) for shape in shapes.values()) == 54_515_587
  config = maskgit_vq.VARIANTS[maskgit_vq.SOURCES[FILE]]
  model = weights.abstract(lambda rngs: maskgit_vq.Model(config, rngs=rngs))
  leaves = jax.tree.leaves(nnx.state(model))
  assert sum(math.prod(leaf.shape) for leaf in leaves) == 54_515_587
  rules = maskgit_vq.import_rules(config)
  torch_import.plan(model, rules, shapes)
  missing = dict(list(shapes.items())[1:])
  with pytest.raises(ValueError, match="nothing fills"):
    torch_import.plan(model, rules, missing)
  with pytest.raises(ValueError, match="no rule claims odd"):
    torch_import.plan(model, rules, {**shapes, "odd": (1,)})


class Peer:
  """The network once more, in PyTorch, driven by the names of a state dict."""

  def __init__(self, tensors, config):
    self.tensors = {k: torch.tensor(v) for k, v in tensors.items()}
    self.config = config

  def conv(self, x, name):
    kernel = self.tensors[f"{name}.weight"]
    bias = self.tensors.get(f"{name}.bias")
    padding = kernel.shape[-1] // 2
    return torch.nn.functional.conv2d(x, kernel, bias, padding=padding)

  def norm(self, x, name):
    affine = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
    groups = self.config.norm_groups
    x = torch.nn.functional.group_norm(x, groups, *affine, eps=1e-6)
    return x * torch.sigmoid(x)

  def blocks(self, x, name):
    for j in range(self.config.num_res_blocks):
      h = self.conv(self.norm(x, f"{name}.{j}.norm1"), f"{name}.{j}.conv1")
      h = self.conv(self.norm(h, f"{name}.{j}.norm2"), f"{name}.{j}.conv2")
      changes = f"{name}.{j}.nin_shortcut.weight" in self.tensors
      x = h + (self.conv(h, f"{name}.{j}.nin_shortcut") if changes else x)
    return x

  def encode(self, x):
    x = self.conv(x, "encoder.conv_in")
    last = len(self.config.channel_multipliers) - 1
    for i in range(last + 1):
      x = self.blocks(x, f"encoder.down.{i}.block")
      x = torch.nn.functional.avg_pool2d(x, 2) if i < last else x
    x = self.norm(self.blocks(x, "encoder.mid"), "encoder.norm_out")
    return self.conv(x, "encoder.conv_out")

  def decode(self, x):
    x = self.blocks(self.conv(x, "decoder.conv_in"), "decoder.mid")
    for i in reversed(range(len(self.config.channel_multipliers))):
      x = self.blocks(x, f"decoder.up.{i}.block")
      if i:
        x = torch.nn.functional.interpolate(x, scale_factor=2)
        x = self.conv(x, f"decoder.up.{i}.upsample_conv")
    return self.conv(self.norm(x, "decoder.norm_out"), "decoder.conv_out")


@functools.cache
def drawn(config: maskgit_vq.Config) -> maskgit_vq.Model:
  """A model with weights from NumPy: tracing the initialiser takes long."""
  model = weights.abstract(lambda rngs: maskgit_vq.Model(config, rngs=rngs))
  skeleton, params, _ = weights.split(model)
  rng = np.random.RandomState(0)
  for path, param in params.items():
    value = path.endswith("scale") + 0.3 * rng.normal(size=param.shape)
    params[path] = jnp.asarray(value, jnp.float32)
  return skeleton.merge(params)


@pytest.mark.parametrize("shape", SHAPES)
def test_other_sizes_and_grids_agree_with_pytorch(shape):
  config, (height, width) = SHAPES[shape]
  model = drawn(config)
  rules = maskgit_vq.import_rules(config)
  peer = Peer(torch_export.export_state_dict(model, rules), config)
  images = np.random.RandomState(0).uniform(
    size=(2, height, width, config.image_channels)
  )
  images = images.astype(np.float32)
  latents = latents_of(model, jnp.asarray(2 * images - 1))
  want = nhwc(peer.encode(torch.tensor(nchw(images))))
  np.testing.assert_allclose(latents, want, rtol=1e-5, atol=5e-5)

  grid = config.grid_of(height, width)
  tokens = encode(model, jnp.asarray(2 * images - 1))
  rows = np.asarray(model.quantizer.codebook)[tokens.reshape(2, *grid)]
  want = nhwc(peer.decode(torch.tensor(nchw(rows))))
  got = (decode(model, tokens, grid=grid) + 1) / 2
  assert got.shape == images.shape
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_shapes_and_seams():
  tiny = drawn(TINY)
  assert isinstance(tiny, interfaces.Tokenizer)
  assert isinstance(tiny, interfaces.Trainable)
  assert (tiny.grid, tiny.vocab_sizes) == ((3, 5), (11,))
  assert tiny.uint8_offset == 127.5
  images = jax.random.uniform(jax.random.key(0), (2, 12, 20, 1), minval=-1)
  tokens = encode(tiny, images)
  assert (tokens.shape, tokens.dtype) == ((2, 15, 1), jnp.int32)
  assert decode(tiny, tokens).shape == images.shape
  state = nnx.to_flat_state(nnx.state(tiny))
  assert all(isinstance(value, nnx.Param) for _, value in state)


def test_quantizer_trains_codebook_and_encoder():
  """Losses, and gradients by hand; the weight is that of the codebook."""
  quantizer = drawn(TINY).quantizer
  graph, params = nnx.split(quantizer)
  z = jax.random.normal(jax.random.key(1), (2, 3, 5, 3))
  codes, rows, losses = quantizer(z)
  table = np.asarray(quantizer.codebook[...])
  np.testing.assert_allclose(rows, table[codes], atol=1e-6)
  gap = np.asarray(table[codes] - z)
  square = np.mean(gap**2)
  np.testing.assert_allclose(losses["commitment"], square, rtol=1e-5)
  np.testing.assert_allclose(losses["codebook"], 0.25 * square, rtol=1e-5)
  assert np.isnan(quantizer.lookup(jnp.array([11]))).all()

  def total(z, params):
    return sum(nnx.merge(graph, params)(z)[2].values())

  got_z, got_params = jax.grad(total, (0, 1))(z, params)
  np.testing.assert_allclose(got_z, -2 * gap / gap.size, atol=1e-6)
  want = np.zeros_like(table)
  np.add.at(want, np.asarray(codes), 0.25 * 2 * gap / gap.size)
  np.testing.assert_allclose(got_params["codebook"][...], want, atol=1e-6)
  weight = jax.random.normal(jax.random.key(2), z.shape)
  through = jax.grad(lambda z: (quantizer(z)[1] * weight).sum())(z)
  np.testing.assert_array_equal(through, weight)


def test_loss_is_finite_and_reaches_every_parameter():
  graph, params = nnx.split(drawn(TINY))
  images = np.random.RandomState(0).randint(0, 256, (2, 12, 20, 1))
  batch = {"image": jnp.asarray(images, jnp.uint8)}

  @jax.jit
  def gradient(params):
    def loss(params):
      return nnx.merge(graph, params).loss(batch, jax.random.key(0))

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, metrics), grads = gradient(params)
  np.testing.assert_allclose(loss, sum(metrics.values()), rtol=1e-6)
  assert set(metrics) == {"mse", "codebook", "commitment"}
  for path, grad in nnx.to_flat_state(grads):
    assert np.isfinite(grad[...]).all() and np.abs(grad[...]).max() > 0, path


def test_bfloat16_stays_close():
  tiny, half = (
    drawn(dataclasses.replace(TINY, dtype=dtype))
    for dtype in ("float32", "bfloat16")
  )
  tokens = jnp.arange(30).reshape(2, 15, 1) % 11
  images, want = decode(half, tokens), decode(tiny, tokens)
  assert images.dtype == jnp.float32
  assert np.abs(images - want).mean() < 0.05 * np.abs(want).mean()


def test_errors_name_value_expectation_and_remedy():
  tiny = drawn(TINY)
  with pytest.raises(ValueError, match=r"norm_groups=5 .* \[128, .* example"):
    maskgit_vq.Config(norm_groups=5)
  with pytest.raises(ValueError, match=r"norm_groups=32 .* \[16, 16\]"):
    maskgit_vq.Config(channels=16, channel_multipliers=(2, 1))
  with pytest.raises(ValueError, match="250x256: expected multiples of 16"):
    maskgit_vq.Config(image_size=(250, 256))
  with pytest.raises(ValueError, match="10x20: expected multiples of 4"):
    tiny.encode(jnp.zeros((2, 10, 20, 1)))
  with pytest.raises(ValueError, match="expected 1 channels"):
    tiny.encode(jnp.zeros((2, 12, 20, 3)))
  with pytest.raises(ValueError, match=r"expected 15 .* \(3, 5\); pass"):
    tiny.decode(jnp.zeros((2, 14, 1), jnp.int32))
