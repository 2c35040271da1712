"""Tests of the Inception network: its published file, devices and errors."""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx

from tensorar_jax.checkpoints import torch_export, torch_import
from tensorar_jax.evaluation import inception
from tensorar_jax.parallel import weights

TINY = inception.Config(width_divisor=16)


@pytest.fixture(scope="module")
def manifest(parity):
  file = parity / "evaluation" / "inception_checkpoint_manifest.json"
  return json.loads(file.read_text())


@functools.cache
def tiny() -> inception.Model:
  """A model with weights from NumPy: tracing the initialiser takes long."""
  model = weights.abstract(lambda rngs: inception.Model(TINY, rngs=rngs))
  skeleton, params, frozen = weights.split(model)
  rng = np.random.RandomState(0)
  for path, array in (values := {**params, **frozen}).items():
    fan_in = math.prod(array.shape[:-1]) or 1
    value = rng.normal(size=array.shape) * (2 / fan_in) ** 0.5
    if path.endswith(("scale", "var")):
      value = rng.uniform(0.5, 1.5, array.shape)
    values[path] = jnp.asarray(value, jnp.float32)
  return skeleton.merge(values)


def test_import_rules_cover_the_published_file(manifest):
  shapes = {name: tuple(shape) for name, (shape, _) in manifest["keys"].items()}
  assert len(shapes) == manifest["n_keys"] == 566
  assert set(inception.SOURCES) == set(manifest["file_names"].values())
  config = inception.Config()
  model = weights.abstract(lambda rngs: inception.Model(config, rngs=rngs))
  leaves = jax.tree.leaves(nnx.state(model))
  total = sum(math.prod(leaf.shape) for leaf in leaves)
  assert total == manifest["n_float_values"] == 23_885_392
  rules = inception.import_rules(config)
  torch_import.plan(model, rules, shapes)
  without = {n: s for n, s in shapes.items() if "num_batches" not in n}
  torch_import.plan(model, rules, without)
  missing = {
    n: s for n, s in shapes.items() if n != "Mixed_6a.branch3x3.bn.bias"
  }
  with pytest.raises(ValueError, match="nothing fills"):
    torch_import.plan(model, rules, missing)
  with pytest.raises(ValueError, match="no rule claims odd"):
    torch_import.plan(model, rules, {**shapes, "odd": (1,)})


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_load_takes_files_of_any_width(suffix, tmp_path):
  model = tiny()
  rules = inception.import_rules(model.config)
  tensors = torch_export.export_state_dict(model, rules)
  path = tmp_path / f"inception{suffix}"
  if suffix == ".safetensors":
    safetensors.numpy.save_file(tensors, path)
  else:
    torch.save({n: torch.tensor(a) for n, a in tensors.items()}, path)
  loaded = inception.load(path)
  assert loaded.config == model.config
  pairs = zip(*(jax.tree.leaves(nnx.state(m)) for m in (loaded, model)))
  assert all(np.array_equal(a, b) for a, b in pairs)
  images = np.zeros((1, 8, 8, 3), np.uint8)
  found = inception.Extractor(loaded, 1).of(images)
  shapes = {k: v.shape for k, v in vars(found).items()}
  assert shapes == {"pool": (1, 128), "spatial": (1, 2023), "logits": (1, 63)}
  assert all(v.dtype == np.float32 for v in vars(found).values())


def test_weights_of_another_network_are_refused(manifest, tmp_path):
  mini = torch_export.export_state_dict(tiny(), inception.import_rules(TINY))
  zero = np.zeros((), np.float32)
  whole = {
    name: np.broadcast_to(zero, shape)
    for name, (shape, _) in manifest["keys"].items()
  }
  image_net = {
    "fc.weight": np.broadcast_to(zero, (1000, 2048)),
    "fc.bias": np.broadcast_to(zero, (1000,)),
  }
  headless = {n: a for n, a in mini.items() if not n.startswith("fc.")}
  bare = {n: a for n, a in mini.items() if n != "Mixed_7c.branch1x1.bn.weight"}
  damaged = {**mini, "fc.bias": np.full(63, np.nan, np.float32)}
  for tensors, message in (
    ({**whole, **image_net}, r"fc.weight gives \(2048, 1000\)"),
    ({**mini, "AuxLogits.fc.bias": zero}, "no rule claims AuxLogits"),
    (headless, "fc.weight has shape None; expected"),
    ({**mini, "fc.weight": np.zeros((63, 100))}, r"shape \(63, 100\)"),
    (bare, "nothing fills parts/17/branches/0/0/scale"),
    (damaged, "fc.bias holds NaN"),
  ):
    with pytest.raises(ValueError, match=message) as error:
      inception.load(tensors)
    assert f"Download {inception.SOURCES[0]}" in str(error.value)
  with pytest.raises(ValueError, match="no such file. Download"):
    inception.load(tmp_path / inception.SOURCES[0])
  with pytest.raises(ValueError, match="width_divisor=3: expected one of"):
    inception.Config(width_divisor=3)


def test_errors_come_before_the_network_runs():
  features = inception.Extractor(tiny(), batch_size=2)
  with pytest.raises(ValueError, match="float32; expected uint8"):
    features(np.zeros((2, 8, 8, 3), np.float32))
  with pytest.raises(ValueError, match="no images"):
    features.of([])


SCRIPT = """
import jax, numpy as np
from tests.evaluation import inception_test
assert jax.local_device_count() == 4
found = inception_test.extract(batch_size=3)
assert next(found).pool.shape == (4, 128)
np.savez({path!r}, **vars(next(found)))
"""


def extract(batch_size):
  """Features of five images, a batch at a time."""
  images = np.random.RandomState(0).randint(0, 256, (5, 9, 11, 3))
  return inception.Extractor(tiny(), batch_size)(images.astype(np.uint8))


def test_devices_share_a_batch(tmp_path):
  path = tmp_path / "last.npz"
  flags = os.environ["XLA_FLAGS"]
  flags += " --xla_force_host_platform_device_count=4"
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT.format(path=str(path))],
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, "XLA_FLAGS": flags},
    capture_output=True,
    text=True,
  )
  assert not done.returncode, done.stderr[-3000:]
  *_, want = extract(batch_size=1)
  for name, array in np.load(path).items():
    assert array.shape == getattr(want, name).shape
    assert np.abs(array).max() > 0.1
    np.testing.assert_allclose(array, getattr(want, name), rtol=1e-5, atol=2e-5)
