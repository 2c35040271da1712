"""TensorAR on LlamaGen-XL: llamagen_b.py with its sizes and guidance 1.75.

python -m tensorar_jax.main --config=configs/llamagen_xl.py:384
"""

from ml_collections import ConfigDict

from configs import llamagen_b


def get_config(size: str = "256") -> ConfigDict:
  return llamagen_b.variant("XL", size, guidance=1.75)
