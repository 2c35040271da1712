"""Tests of the Inception network: parity with the published one.

The fixtures were written by the reference implementations, with random weights
and every width divided by 8; README.md beside them explains each array and
states the tolerances used here.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tensorar_jax.checkpoints import torch_export, torch_import
from tensorar_jax.evaluation import inception

SIZES = ("64x64", "32x32", "37x53", "256x256", "299x299", "320x416")
TAPS = (
  "Conv2d_1a_3x3",
  "Conv2d_2a_3x3",
  "Conv2d_2b_3x3",
  "MaxPool_1",
  "Conv2d_3b_1x1",
  "Conv2d_4a_3x3",
  "MaxPool_2",
  "Mixed_5b",
  "Mixed_5c",
  "Mixed_5d",
  "Mixed_6a",
  "Mixed_6b",
  "Mixed_6c",
  "Mixed_6d",
  "Mixed_6e",
  "Mixed_7a",
  "Mixed_7b",
  "Mixed_7c",
)
BLOCKS = {  # of the fixture -> the part of its sizes
  "InceptionA": "Mixed_5b",
  "InceptionB": "Mixed_6a",
  "InceptionC": "Mixed_6b",
  "InceptionD": "Mixed_7a",
  "InceptionE_1": "Mixed_7b",
  "InceptionE_2": "Mixed_7c",
}
POOLS = {
  "avg3_s1_same_excl_pad": inception.Pool(mean=True),
  "max3_s1_same": inception.Pool(),
  "max3_s2_valid": inception.Pool(stride=2, padding="VALID"),
}
TOLERANCES = {  # largest difference
  **{"tf1_resized": 1e-4, "tf1_normalised": 1e-6, "tf1_full": 1e-6},
  **{"tf1_channel_mean": 1e-6, "tf1_channel_meansq": 1e-6},
  **{"pytorch_fid_normalised": 1e-6, "block": 2e-5, "tap": 3e-4},
  **{"pool3": 3e-4, "spatial": 3e-4, "logits": 1e-3, "logits_unbiased": 1e-3},
}
# Measured differences between the two published ways to resize.
OTHER_RULE = {"37x53": 1.26, "256x256": 0.14, "299x299": 0.0078}


def nhwc(x):
  return jnp.asarray(np.asarray(x).transpose(0, 2, 3, 1))


def nchw(x):
  return np.asarray(x).transpose(0, 3, 1, 2)


def assert_close(got, want, kind):
  got = np.asarray(got, np.float64)
  assert got.shape == want.shape
  error = np.abs(got - want).max()
  print(f"{kind}: {error:.2g} of {TOLERANCES[kind]:g}")
  assert error <= TOLERANCES[kind]


@pytest.fixture(scope="module")
def folder(parity):
  return parity / "evaluation"


@pytest.fixture(scope="module")
def arrays(folder):
  """File without its suffix -> name -> array."""
  files = [*folder.glob("inception_*.npz"), *folder.glob("protocol_*.npz")]
  return {file.stem: dict(np.load(file)) for file in files}


@pytest.fixture(scope="module")
def expected(folder):
  return json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="module")
def mini(arrays):
  return inception.load(arrays["inception_mini_weights"])


@pytest.fixture(scope="module")
def features(mini):
  return inception.Extractor(mini, batch_size=30)


def test_parity_leaves_no_array_out(arrays):
  sizes, pools = "|".join(SIZES), "|".join(POOLS)
  blocks = "|".join(["BasicConv2d_s2", *BLOCKS])
  computed = r"pool3|spatial|logits|logits_unbiased"
  claims = {
    "inception_preprocess": (
      rf"({sizes})\.(image|probe_yx|tf1_.*|pytorch_fid_normalised)",
    ),
    "inception_blocks": (rf"({blocks})/(in|out|w/.*)", rf"pool/(in|{pools})"),
    "inception_mini_weights": (r".*",),
    "inception_mini_io": (
      rf"[abc]\.(images|({computed})(_f64)?)",
      rf"a\.tap\.({'|'.join(TAPS)})\.(probe_chw|probe_val|channel_mean|shape)",
      rf"a\.full\.({'|'.join(TAPS)})",
    ),
    "protocol_ref_batch": ("arr_0",),
    "protocol_sample_batch": ("arr_0", "arr_1"),  # labels, which nobody reads
    "protocol_activations": (
      r"(ref|sample)_(pool3|spatial_(first8|mean|var))",
    ),
  }
  assert claims.keys() == arrays.keys()
  for file, found in arrays.items():
    pattern = re.compile("|".join(claims[file]))
    unclaimed = [name for name in found if not pattern.fullmatch(name)]
    assert not unclaimed, file


def test_import_is_lossless(mini, arrays):
  want = arrays["inception_mini_weights"]
  rules = inception.import_rules(mini.config)
  got = torch_export.export_state_dict(mini, rules)
  counters = {name for name in want if name.endswith("num_batches_tracked")}
  assert len(counters) == 94 and got.keys() == want.keys() - counters
  for name, array in got.items():
    assert (array.dtype, array.shape) == (want[name].dtype, want[name].shape)
    assert array.tobytes() == want[name].tobytes(), name


@pytest.mark.parametrize("size", SIZES)
def test_resize_parity(size, arrays):
  given = {
    name.removeprefix(f"{size}."): array
    for name, array in arrays["inception_preprocess"].items()
    if name.startswith(f"{size}.")
  }
  image = jnp.asarray(given.pop("image"))
  rows, cols = given.pop("probe_yx").T
  normal = np.asarray(jax.jit(inception.normalise)(image))[0]
  wide = normal.astype(np.float64)
  computed = {
    "tf1_resized": inception.resize(image)[0, rows, cols],
    "tf1_normalised": normal[rows, cols],
    "tf1_channel_mean": wide.mean((0, 1)),
    "tf1_channel_meansq": (wide**2).mean((0, 1)),
    "tf1_full": normal,
    "pytorch_fid_normalised": half_pixel(image)[0, rows, cols],
  }
  # Each file holds the whole image for one size only.
  assert computed.keys() - given.keys() <= {"tf1_full"}
  for name, want in given.items():
    assert_close(computed[name], want, name)
  # Not by a single bit: the compiler's fused products come later.
  np.testing.assert_array_equal(computed["tf1_resized"], given["tf1_resized"])
  if size in OTHER_RULE:
    other = np.abs(half_pixel(image)[0] - normal).max()
    assert other == pytest.approx(OTHER_RULE[size], rel=0.05)


def half_pixel(image):
  """What evaluations see that are not comparable to these."""
  x = torch.tensor(nchw(image)).float() / 255
  x = torch.nn.functional.interpolate(
    x, (299, 299), mode="bilinear", align_corners=False
  )
  return 2 * np.asarray(nhwc(x)) - 1


@pytest.mark.parametrize("block", BLOCKS)
def test_block_parity(block, arrays):
  tensors, part = dict(arrays["inception_mini_weights"]), BLOCKS[block]
  given = arrays["inception_blocks"]
  own = {
    f"{part}.{name.removeprefix(f'{block}/w/')}": array
    for name, array in given.items()
    if name.startswith(f"{block}/w/")
  }
  replaced = {n for n in tensors if n.startswith(f"{part}.")}
  assert own.keys() == {n for n in replaced if "num_batches" not in n}
  model = inception.load({**tensors, **own})
  got = nnx.jit(model.parts[TAPS.index(part)])(nhwc(given[f"{block}/in"]))
  assert_close(nchw(got), given[f"{block}/out"], "block")


def test_lone_conv_parity(arrays):
  block = "BasicConv2d_s2"
  given = arrays["inception_blocks"]
  tensors = {
    name.replace(f"{block}/w/", "x."): array
    for name, array in given.items()
    if name.startswith(f"{block}/w/")
  }
  spec = inception.Conv(6, (3, 3), stride=2, padding="VALID")
  model = nnx.Dict(y=inception.ConvNorm(5, spec, 1, nnx.Rngs(0)))
  rules = inception.conv_rules("x", "y")
  model = torch_import.fill(model, rules, tensors)
  got = model.y(nhwc(given[f"{block}/in"]))
  assert_close(nchw(got), given[f"{block}/out"], "block")


@pytest.mark.parametrize("name", POOLS)
def test_pool_parity(name, arrays):
  given = arrays["inception_blocks"]
  pool = inception.Pooling(3, POOLS[name], 1, nnx.Rngs(0))
  got = pool(nhwc(given["pool/in"]))
  assert_close(nchw(got), given[f"pool/{name}"], "block")


@pytest.mark.parametrize("batch", "abc")
def test_features_parity(batch, arrays, mini):
  given = arrays["inception_mini_io"]
  images = given[f"{batch}.images"]
  got = inception.Extractor(mini, batch_size=2).of(images)
  computed = {
    "pool3": got.pool,
    "spatial": got.spatial,
    "logits_unbiased": got.logits,
    "logits": mini.classify(jnp.asarray(got.pool), bias=True),
  }
  for name, array in computed.items():
    for end in ("", "_f64"):
      assert_close(array, given[f"{batch}.{name}{end}"], name)


def test_taps_parity(arrays, mini):
  given = arrays["inception_mini_io"]

  @nnx.jit
  def run(parts, images):
    x = inception.normalise(images)
    return [x := part(x) for part in parts]

  maps = map(nchw, run(mini.parts, jnp.asarray(given["a.images"])))
  for name, got in zip(TAPS, maps, strict=True):
    prefix = f"a.tap.{name}."
    assert got.shape == tuple(given[f"{prefix}shape"])
    probes = got[0][tuple(given[f"{prefix}probe_chw"].T)]
    assert_close(probes, given[f"{prefix}probe_val"], "tap")
    means = got.astype(np.float64).mean((2, 3))
    assert_close(means, given[f"{prefix}channel_mean"], "tap")
    if (full := f"a.full.{name}") in given:
      assert_close(got[:1], given[full], "tap")


@pytest.fixture(scope="module")
def protocol(arrays, features):
  """Features of both files of the protocol."""
  return {
    name: features.of(arrays[f"protocol_{name}_batch"]["arr_0"])
    for name in ("ref", "sample")
  }


@pytest.mark.parametrize("name", ["ref", "sample"])
def test_protocol_activations(name, protocol, arrays):
  got, given = protocol[name], arrays["protocol_activations"]
  assert_close(got.pool, given[f"{name}_pool3"], "pool3")
  spatial = got.spatial.astype(np.float64)
  computed = {
    "first8": spatial[:8],
    "mean": spatial.mean(0),
    "var": spatial.var(0, ddof=1),
  }
  for kind, array in computed.items():
    assert_close(array, given[f"{name}_spatial_{kind}"], "spatial")


def test_features_do_not_depend_on_the_batch(features, mini, protocol, arrays):
  images = arrays["protocol_ref_batch"]["arr_0"][:31]
  other = inception.Extractor(mini, batch_size=7)
  parts = list(other(iter([images[:2], images[2:13], images[13:]])))
  assert [len(part.pool) for part in parts] == [7, 7, 7, 7, 3]
  got = jax.tree.map(lambda *a: np.concatenate(a), *parts)
  for name, array in vars(got).items():
    want = getattr(protocol["ref"], name)[:31]
    np.testing.assert_allclose(array, want, rtol=1e-5, atol=2e-5)
