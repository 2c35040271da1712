"""TensorAR on RAR-XXL: rar_b.py with its size and sampling settings.

python -m tensorar_jax.main --config=configs/rar_xxl.py
"""

from ml_collections import ConfigDict

from configs import rar_b


def get_config(size: str = "256") -> ConfigDict:
  return rar_b.variant("XXL", size, guidance=8.0, power=1.2, temperature=1.02)
