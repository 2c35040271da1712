"""TensorAR on Open-MAGVIT2-XL: open_magvit2_b.py with its size and settings.

python -m tensorar_jax.main --config=configs/open_magvit2_xl.py
"""

from ml_collections import ConfigDict

from configs import open_magvit2_b


def get_config() -> ConfigDict:
  return open_magvit2_b.variant(
    "XL",
    temperature=(1.1, 1.0),
    guidance=(1.75, 1.85),
    base_learning_rate=2.4e-4,
    base_epochs=350,
  )
