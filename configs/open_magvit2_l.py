"""TensorAR on Open-MAGVIT2-L: open_magvit2_b.py with its size and settings.

python -m tensorar_jax.main --config=configs/open_magvit2_l.py
"""

from ml_collections import ConfigDict

from configs import open_magvit2_b


def get_config() -> ConfigDict:
  return open_magvit2_b.variant(
    "L", temperature=(1.1, 1.0), guidance=(1.9, 1.9)
  )
