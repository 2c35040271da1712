"""Noise schedule: how likely slot j of an input window is resampled.

python -m tensorar_jax.main --config=configs/ablations/schedule.py

:fashion_mnist or :llamagen_b after the file name picks another data set.
"""

from configs.ablations import common
from tensorar_jax.method import noising

AXIS = common.axis(
  "noise schedule",
  variants={name: {"noise.schedule": name} for name in noising.SCHEDULES},
  papers={"linear": 4.79, "sine": 4.75, "sqrt": 4.84, "exponential": 4.71},
  source="P2, LlamaGen-B",
)


def get_config(data: str = "digits"):
  return common.get_config(data, schedule=AXIS)
