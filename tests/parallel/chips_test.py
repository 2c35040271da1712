"""Which peak counts, and the one setting that decides it for float32."""

import jax
import pytest

from tensorar_jax.parallel import chips


@pytest.fixture
def no_setting():
  """JAX as it is without a setting; on a GPU, the tests have one."""
  setting = "jax_default_matmul_precision"
  before = jax.config.values[setting]
  jax.config.update(setting, None)
  yield
  jax.config.update(setting, before)


@pytest.mark.parametrize(
  "precision, platform, products",
  [
    (None, "gpu", "tensorfloat32"),
    ("tensorfloat32", "gpu", "tensorfloat32"),
    ("float32", "gpu", "float32"),
    (None, "tpu", "bfloat16"),
    ("tensorfloat32", "tpu", "bfloat16_3x"),
    ("float32", "tpu", "float32"),
    (None, "cpu", "float32"),
    ("tensorfloat32", "cpu", "float32"),
  ],
)
def test_one_setting_decides_what_products_of_float32_are(
  no_setting, precision, platform, products
):
  with chips.precision(precision):
    assert chips.products_of("float32", platform) == products
    assert chips.products_of("bfloat16", platform) == "bfloat16"


def test_the_setting_ends_with_its_block():
  """A command's precision is not that of the next one in the process."""
  setting = "jax_default_matmul_precision"
  before = jax.config.values[setting]
  with pytest.raises(ZeroDivisionError), chips.precision("float32"):
    assert jax.config.values[setting] == "highest"
    raise ZeroDivisionError
  assert jax.config.values[setting] == before


def test_each_kind_of_product_has_its_peak():
  gpu, tpu = chips.CHIPS["h100"], chips.CHIPS["v5e"]
  assert gpu.peak("bfloat16") == 989e12
  assert gpu.peak("tensorfloat32") == 494.5e12 and gpu.peak("float32") == 67e12
  assert tpu.peak("bfloat16") == 197e12
  assert tpu.peak("bfloat16_3x") == pytest.approx(197e12 / 3)
  assert tpu.peak("float32") == pytest.approx(197e12 / 6)


def test_the_setting_reaches_the_program():
  shape = jax.ShapeDtypeStruct((3, 3), "f4")
  with chips.precision("float32"):
    program = jax.jit(lambda a: a @ a).lower(shape)
  assert "HIGHEST" in program.as_text()
