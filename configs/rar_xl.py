"""TensorAR on RAR-XL: rar_b.py with its size and sampling settings.

python -m tensorar_jax.main --config=configs/rar_xl.py
"""

from ml_collections import ConfigDict

from configs import rar_b


def get_config(size: str = "256") -> ConfigDict:
  return rar_b.variant("XL", size, guidance=6.9, power=1.5, temperature=1.02)
