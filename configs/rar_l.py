"""TensorAR on RAR-L: rar_b.py with its size and sampling settings.

python -m tensorar_jax.main --config=configs/rar_l.py
"""

from ml_collections import ConfigDict

from configs import rar_b


def get_config(size: str = "256") -> ConfigDict:
  return rar_b.variant("L", size, guidance=15.5, power=2.5, temperature=1.02)
