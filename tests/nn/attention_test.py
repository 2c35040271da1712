"""Every kernel gives what plain operations give, where both run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tensorar_jax.nn import attention

ROWS = 150  # no whole blocks: the TPU kernel has to fill up


def draw(*shapes, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def heads(groups, rows=ROWS, dtype=jnp.float32):
  """q of 4 heads, k and v of `groups`, and a cotangent."""
  shape, kv = (2, 4, rows, 8), (2, groups, rows, 8)
  return draw(shape, kv, kv, shape, dtype=dtype)


def mask(padded, rows=ROWS):
  is_padding = jnp.arange(7) < jnp.asarray([[5], [0]]) if padded else None
  return attention.causal_mask(jnp.arange(rows), rows, is_padding)


def results(kernel, q, k, v, g, how):
  """What comes out at rows that are no padding, and the gradients."""
  keep = jnp.ones(q.shape[2])
  if how.is_padding is not None:
    keep = 1 - jnp.pad(how.is_padding, ((0, 0), (0, q.shape[2] - 7)))
    keep = keep[:, None, :, None]
  else:
    keep = keep[:, None]
  out, back = jax.vjp(lambda q, k, v: kernel(q, k, v, how) * keep, q, k, v)
  return (out, *back(g * keep))


@functools.partial(jax.jit, static_argnames=("kernel",))
def compiled(kernel, arrays, how):
  return results(kernel, *arrays, how)


def via_jax_nn(q, k, v, how):
  return attention.cudnn(q, k, v, how, implementation="xla")


@pytest.mark.parametrize("rows", [ROWS, ROWS + 1])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernel", [via_jax_nn, attention.flash])
def test_kernels_equal_plain_attention(kernel, padded, rows):
  """Two query heads for each key head; outputs and all three gradients."""
  arrays, how = heads(groups=2, rows=rows), mask(padded, rows)
  want = compiled(attention.plain, arrays, how)
  with pltpu.force_tpu_interpret_mode():
    got = compiled(kernel, arrays, how)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


class Seen(Exception):
  pass


def chosen(monkeypatch, platform, how, dtype=jnp.bfloat16, rate=0.0):
  """The kernel that a program for `platform` would use."""
  for name in ("plain", "cudnn", "flash"):

    def spy(*args, name=name):
      raise Seen(name)

    monkeypatch.setattr(attention, name, spy)
  device = jax.sharding.AbstractDevice("some", None, platform)
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  q, k, v, _ = heads(4, dtype=dtype)
  rng = jax.random.key(0)  # no array can be made where nothing can run
  with jax.sharding.use_abstract_mesh(mesh), pytest.raises(Seen) as seen:
    attention.attention(q, k, v, how, rate, rng)
  return str(seen.value)


def test_each_platform_has_its_kernel(monkeypatch):
  found = functools.partial(chosen, monkeypatch)
  assert found("cpu", mask(False)) == "plain"
  assert found("gpu", mask(False)) == "plain"  # cuDNN is not here to be asked
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert found("cuda", mask(False)) == found("gpu", mask(True)) == "cudnn"
  assert found("tpu", mask(False)) == found("tpu", mask(True)) == "flash"


def test_what_the_kernels_cannot_do_stays_plain(monkeypatch):
  found = functools.partial(chosen, monkeypatch)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert found("tpu", mask(False), dtype=jnp.float32) == "plain"
  assert found("gpu", mask(False), rate=0.1) == "plain"
  rows = jnp.arange(3, 3 + ROWS)  # behind a cache of three rows
  later = attention.causal_mask(rows, ROWS + 3, None)
  assert found("tpu", later) == "plain"


@pytest.fixture
def hopper(monkeypatch):
  """What cuDNN's checks ask for, and a mesh of one such device."""
  from jax._src.cudnn import fused_attention_stablehlo as checks

  monkeypatch.setattr(checks, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(checks, "check_compute_capability", lambda least: True)
  equal = "is_cuda_compute_capability_equal"
  monkeypatch.setattr(checks, equal, lambda wanted: wanted == "9.0")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  device = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
  return jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [375, 376])
def test_cudnn_takes_every_length_that_is_trained_on(hopper, padded, rows):
  """375 are the 120 of a caption and 255 tokens before the last."""
  q, k, v, _ = heads(4, rows=rows, dtype=jnp.bfloat16)
  how = mask(padded, rows)

  def loss(q, k, v):
    return attention.attention(q, k, v, how).astype(jnp.float32).sum()

  with jax.sharding.use_abstract_mesh(hopper):
    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
  assert "dot_product_attention_bwd" in str(program)
  assert [a.shape for a in program.out_avals] == [q.shape, k.shape, v.shape]


def test_blocks_divide_the_length():
  assert attention._block(256) == 256
  assert attention._block(640) == 640
  assert attention._block(1024) == 512
  assert attention._block(1152) == 384


@pytest.mark.parametrize("groups", [4, 2])
def test_a_single_row_of_bfloat16_is_that_of_float32(groups):
  """A CPU multiplies it as two rows."""
  q, k, v, _ = heads(groups, dtype=jnp.bfloat16)
  q, row = q[:, :, 40:41], jnp.asarray([40])
  how = attention.causal_mask(row, ROWS, None)
  got = attention.attention(q, k, v, how)
  wide = (a.astype(jnp.float32) for a in (q, k, v))
  want = attention.plain(*wide, how)
  assert got.shape == q.shape and got.dtype == q.dtype
  np.testing.assert_allclose(got, want, atol=0.02)
