"""Rules, meshes and shares, without any device but one."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import processes, sharding, weights
from tests import tiny
from tests.contract import families

EIGHT = AbstractMesh((1, 8, 1), sharding.AXES)
CUBE = AbstractMesh((2, 2, 2), sharding.AXES)


@pytest.mark.parametrize("name", families.TOKENIZERS)
def test_every_weight_of_a_tokenizer_has_a_place(name):
  sharding.specs(families.tokenizer(name))


@pytest.mark.parametrize("name", families.BACKBONES)
def test_eight_devices_share_the_published_sizes_evenly(name):
  """By the rules alone: at most 1/8 of the bytes and 2 % a device."""
  module = families.module_of(name)
  for variant, config in families.published(name).items():

    def make(rngs, config=config):
      return TensorAR(module.Model(config, rngs=rngs), window=4, rngs=rngs)

    model = weights.abstract(make)
    shapes = {**weights.split(model)[1]}
    specs, here, total = sharding.specs(model), 0, 0
    for path, array in shapes.items():
      spec = sharding.fit(specs[path], array.shape, EIGHT)
      total += array.size
      here += array.size // (8 if any(spec) else 1)
    assert here <= 1.02 * total / 8, variant


def test_a_weight_without_a_rule_is_named():
  model = tiny.fresh(2)
  model.backbone.extra = nnx.Param(jax.numpy.zeros(3))
  with pytest.raises(ValueError, match="backbone/extra"):
    sharding.specs(model)


def test_axes_that_do_not_divide_are_left_out():
  spec = PartitionSpec("fsdp", ("tensor", "fsdp"))
  fit = lambda *shape: sharding.fit(
    PartitionSpec(*spec[-len(shape) :]), shape, CUBE
  )
  assert fit(3, 6) == PartitionSpec(None, ("tensor",))
  assert fit(3, 8) == PartitionSpec(None, ("tensor", "fsdp"))
  whole = sharding.fit(PartitionSpec("fsdp"), (2, 2, 7), CUBE)
  assert whole == PartitionSpec(None, None, None)


@pytest.mark.parametrize(
  "config, words",
  [
    (dict(data=-1, fsdp=-1), "one may be -1"),
    (dict(tensor=0), "'tensor': 0"),
    (dict(data=3), "does not fit 8 devices"),
    (dict(fsdp=3), "does not fit 8 devices"),
  ],
)
def test_a_bad_mesh_says_what_fits(config, words):
  with pytest.raises(ValueError, match=words):
    sharding.MeshConfig(**config).sizes(8)


def test_what_is_left_goes_to_the_axis_of_minus_one():
  assert sharding.MeshConfig().sizes(8) == (8, 1, 1)
  assert sharding.MeshConfig(1, -1, 2).sizes(8) == (1, 4, 2)


def test_a_batch_that_the_mesh_cannot_split_is_refused():
  with pytest.raises(ValueError, match="batch_size=6 .* data \\* fsdp = 4"):
    sharding.check_batch(CUBE, 6)


@pytest.mark.parametrize(
  "given",
  [("host:1", 2, None), ("host:1", None, 0), ("auto", 2, 0), (None, 2, 0)],
)
def test_half_a_cluster_is_refused(given):
  with pytest.raises(ValueError, match="expected all three"):
    processes.join_processes(*given)


def test_blocks_in_any_order_make_the_global_batch():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  assert sharding.share(mesh) == sharding.Share((0,), 1)
  batch = {"a": np.arange(6).reshape(3, 2)}
  got = sharding.global_batch(batch, mesh, sharding.share(mesh))
  np.testing.assert_array_equal(got["a"], batch["a"])
  with pytest.raises(ValueError, match="blocks=\\(2,\\) of count=2"):
    sharding.Share((2,), 2)
