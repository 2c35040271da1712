"""Peak rates of chips from their data sheets, for estimates and utilisation.

A chip here is one JAX device; a TPU7x counts as two devices of half a chip.
Sources: docs.cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), and
NVIDIA's data sheets for the A100 80GB SXM, the H100 SXM and the H200 SXM,
without sparsity.

The peak depends on how matrix products are computed. For float32 arrays that is
one setting, --precision, which sets the model's dtype and
`jax_default_matmul_precision`:

| --precision   | backbone.dtype | NVIDIA GPUs   | TPUs           | CPUs     |
| ------------- | -------------- | ------------- | -------------- | -------- |
| not given     | the config's   | float32: TF32 | bfloat16       | float32  |
| float32       | float32        | float32       | float32        | float32  |
| tensorfloat32 | float32        | TF32          | three bfloat16 | float32  |
| bfloat16      | bfloat16       | bfloat16      | bfloat16       | bfloat16 |

TF32 keeps 10 bits of a factor's fraction, where float32 has 23. Results that
must agree in the last digits need --precision=float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

PRECISIONS = {  # --precision: `jax_default_matmul_precision`
  "float32": "highest",
  "tensorfloat32": "tensorfloat32",
  "bfloat16": None,
}
# Passes in bfloat16 that a TPU makes for a product of float32 arrays.
PASSES = {"bfloat16": 1, "bfloat16_3x": 3, "float32": 6}
GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """The peak rates of one JAX device.

  Attributes:
    name: the key in CHIPS.
    peak_flops: bfloat16 FLOP/s with float32 sums; a multiply-add counts as two.
    hbm_bytes: bytes of memory; the runtime reserves a few percent of it.
    hbm_bandwidth: bytes/s to and from memory.
    link_bandwidth: bytes/s sent over all links to the other chips of a slice or
      host together. The other direction has the same bandwidth.
    tf32_flops: FLOP/s of float32 arrays in TF32; None if the chip has no TF32.
    float32_flops: FLOP/s of exact products of float32 arrays; None where each
      takes several bfloat16 products, as on TPUs.
  """

  name: str
  peak_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  tf32_flops: float | None = None
  float32_flops: float | None = None

  def peak(self, products: str) -> float:
    """Returns the FLOP/s of matrix products, named as by `products_of`."""
    rates = {"tensorfloat32": self.tf32_flops, "float32": self.float32_flops}
    return rates.get(products) or self.peak_flops / PASSES.get(products, 1)


CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", 275e12, 32 * GIB, 1228e9, 150e9),
    Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9),
    Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9),
    Chip("v6e", 918e12, 32 * GIB, 1638e9, 400e9),
    Chip("tpu7x", 2307e12 / 2, 96 * GIB, 7380e9 / 2, 600e9 / 2),
    Chip("a100", 312e12, 80 * GIB, 2039e9, 300e9, 156e12, 19.5e12),
    Chip("h100", 989e12, 80 * GIB, 3350e9, 450e9, 494.5e12, 67e12),
    Chip("h200", 989e12, 141 * GIB, 4800e9, 450e9, 494.5e12, 67e12),
  )
}

# Chips by the runtime's `device_kind`. Names must match in full: the PCIe card
# of a GPU, for example, has other rates.
KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "tpu7x",
  "NVIDIA A100-SXM4-80GB": "a100",
  "NVIDIA H100 80GB HBM3": "h100",
  "NVIDIA H200": "h200",
}


def of(device: Any) -> Chip | None:
  """Returns the chip of a JAX device, or None if it is not in the table."""
  return CHIPS.get(KINDS.get(device.device_kind, ""))


@contextlib.contextmanager
def precision(name: str | None) -> Iterator[None]:
  """Makes --precision=`name` the precision of JAX's products inside a block.

  None changes nothing. `experiment.stages` sets the models' dtype to match.
  It holds for all threads, unlike `jax.default_matmul_precision`: the demo's
  server and the readers of data have threads of their own.
  """
  if name is None:
    yield
    return
  setting = "jax_default_matmul_precision"
  before = jax.config.values[setting]
  jax.config.update(setting, PRECISIONS[name])
  try:
    yield
  finally:
    jax.config.update(setting, before)


def products_of(dtype: str, platform: str) -> str:
  """Returns how JAX, as set now, multiplies arrays of `dtype`.

  Args:
    dtype: dtype of the arrays.
    platform: "cpu", "gpu" or "tpu".

  Returns:
    "bfloat16" (for float16 too), "tensorfloat32", "bfloat16_3x" or "float32".
  """
  setting = jax.config.values["jax_default_matmul_precision"]
  if np.dtype(jax.numpy.dtype(dtype)).itemsize == 2:
    return "bfloat16"
  if platform == "cpu" or setting in ("highest", "float32"):
    return "float32"
  if platform == "gpu":
    return "tensorfloat32"
  high = ("high", "tensorfloat32", "bfloat16_3x")
  return "bfloat16_3x" if setting in high else "bfloat16"
