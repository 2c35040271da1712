"""TensorAR on LlamaGen-3B: llamagen_b.py with its sizes and guidance 1.65.

python -m tensorar_jax.main --config=configs/llamagen_3b.py:384
"""

from ml_collections import ConfigDict

from configs import llamagen_b


def get_config(size: str = "256") -> ConfigDict:
  return llamagen_b.variant("3B", size, guidance=1.65)
