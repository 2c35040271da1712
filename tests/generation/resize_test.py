"""The evaluation resize against PyTorch's, and the bytes that follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensorar_jax.generation import resize
from tensorar_jax.generation.batches import to_uint8


@pytest.mark.parametrize("case", [0, 1, 2])
def test_parity(parity, case):
  """Smaller by two rates, and larger."""
  io = np.load(parity / "llamagen" / "postprocess" / "io.npz")
  images = jnp.asarray(io[f"resize_in_{case}"].transpose(0, 2, 3, 1))
  expected = io[f"resize_out_{case}"].transpose(0, 2, 3, 1)
  out = jax.jit(resize.resize_bicubic, static_argnums=1)(
    images, expected.shape[1:3]
  )
  assert out.shape == expected.shape and out.dtype == jnp.float32
  print(np.abs(out - expected).max())
  np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
  sure = io[f"uint8_frac_margin_{case}"] > 1e-3
  assert sure.mean() > 0.8  # what is clipped lies on an integer
  pixels = np.asarray(to_uint8(out, 128.0))
  np.testing.assert_array_equal(pixels[sure], io[f"uint8_{case}"][sure])
  np.testing.assert_array_equal(
    to_uint8(images, 128.0), io[f"uint8_direct_{case}"]
  )


def test_parity_leaves_no_array_out(parity):
  io = np.load(parity / "llamagen" / "postprocess" / "io.npz")
  tested = {
    f"{name}_{case}"
    for case in range(3)
    for name in ("resize_in", "resize_out", "uint8", "uint8_direct")
  } | {f"uint8_frac_margin_{case}" for case in range(3)}
  assert {n for n in io if n.startswith(("resize_", "uint8"))} == tested


def test_oblong_images_and_one_side_only():
  images = jax.random.normal(jax.random.key(0), (2, 7, 5, 3))
  out = resize.resize_bicubic(images, (3, 11))
  assert out.shape == (2, 3, 11, 3)
  rows = resize.resize_bicubic(images, (3, 5))
  np.testing.assert_allclose(
    out, resize.resize_bicubic(rows, (3, 11)), atol=1e-5
  )
  np.testing.assert_array_equal(resize.resize_bicubic(images, (7, 5)), images)
  flat = resize.resize_bicubic(jnp.full((1, 13, 11, 1), 0.3), (5, 17))
  np.testing.assert_allclose(flat, 0.3, atol=1e-6)  # edges included


def test_bad_sizes_are_errors():
  with pytest.raises(ValueError, match=r"\(0, 4\); expected positive"):
    resize.resize_bicubic(jnp.zeros((1, 3, 3, 1)), (0, 4))
