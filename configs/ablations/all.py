"""Every axis; what they share is trained once.

python -m tensorar_jax.main --config=configs/ablations/all.py

:fashion_mnist or :llamagen_b after the file name picks another data set.
"""

import importlib

from configs.ablations import common

AXES = (
  "window",
  "depth",
  "residual",
  "noise",
  "schedule",
  "loss",
  "draft_temperature",
)


def get_config(data: str = "digits"):
  axes = {
    name: importlib.import_module(f"configs.ablations.{name}").AXIS
    for name in AXES
  }
  return common.get_config(data, **axes)
