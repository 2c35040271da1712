"""TensorAR on LlamaGen-L: llamagen_b.py with its sizes and guidance 2.0.

python -m tensorar_jax.main --config=configs/llamagen_l.py:384
"""

from ml_collections import ConfigDict

from configs import llamagen_b


def get_config(size: str = "256") -> ConfigDict:
  return llamagen_b.variant("L", size, guidance=2.0)
