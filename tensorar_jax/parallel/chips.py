"""Peak rates of chips by their data sheets, for estimates and utilisation.

A chip here is one JAX device; a TPU7x counts as two, of half a chip each.
Sources: docs.cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x), and
NVIDIA's data sheets of the A100 80GB SXM and the H100 SXM, without sparsity.
"""

from __future__ import annotations

import dataclasses
from typing import Any

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """The peak rates of one JAX device.

  Attributes:
    name: as in CHIPS.
    peak_flops: bfloat16 FLOP/s, two for a multiply-add, float32 sums.
    hbm_bytes: memory, of which the runtime keeps a few percent.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s out over all links to the other chips of a slice or
      a host together; the other direction has as much again.
  """

  name: str
  peak_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float


CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", 275e12, 32 * GIB, 1228e9, 150e9),
    Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9),
    Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9),
    Chip("v6e", 918e12, 32 * GIB, 1638e9, 400e9),
    Chip("tpu7x", 2307e12 / 2, 96 * GIB, 7380e9 / 2, 600e9 / 2),
    Chip("a100", 312e12, 80 * GIB, 2039e9, 300e9),
    Chip("h100", 989e12, 80 * GIB, 3350e9, 450e9),
  )
}

# By `device_kind`, as the runtimes give it. Longer names are other chips: the
# PCIe card of a GPU, for example, has other rates.
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
}


def of(device: Any) -> Chip | None:
  """Returns the chip of a JAX device, or None if it is not in the table."""
  return CHIPS.get(KINDS.get(device.device_kind, ""))
