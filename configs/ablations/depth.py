"""Depth of the two query transformers.

python -m tensorar_jax.main --config=configs/ablations/depth.py

:fashion_mnist or :llamagen_b after the file name picks another data set.
"""

from configs.ablations import common

AXIS = common.axis(
  "depth of the new modules",
  variants={f"depth {depth}": {"tensorar.depth": depth} for depth in (1, 2, 4)},
  papers={"depth 1": 4.71, "depth 2": 4.79, "depth 4": 4.90},
  source="P2, LlamaGen-B",
  paper_seconds={"depth 1": 0.12, "depth 2": 0.14, "depth 4": 0.15},
)


def get_config(data: str = "digits"):
  return common.get_config(data, depth=AXIS)
