"""Weights of the slots in the loss.

python -m tensorar_jax.main --config=configs/ablations/loss.py

:fashion_mnist or :llamagen_b after the file name picks another data set.
"""

from configs.ablations import common

AXIS = common.axis(
  "loss weights",
  variants={
    name: {"loss.weights": name} for name in ("rdm", "paper", "uniform")
  },
  papers={},
  source="",
)


def get_config(data: str = "digits"):
  return common.get_config(data, loss=AXIS)
