"""TensorAR on LlamaGen-XXL: llamagen_b.py with its sizes and guidance 1.75.

python -m tensorar_jax.main --config=configs/llamagen_xxl.py:384
"""

from ml_collections import ConfigDict

from configs import llamagen_b


def get_config(size: str = "256") -> ConfigDict:
  return llamagen_b.variant("XXL", size, guidance=1.75)
