"""TensorAR on Janus-Pro-7B: janus_pro_1b.py with its size, in bfloat16.

  python -m tensorar_jax.main --config=configs/janus_pro_7b.py

Needs `weights/Janus-Pro-7B` with `pytorch_model.bin.index.json`, the files that
it names, and `tokenizer.json`. Weights in training are in float32 and split
over all devices; 8 of 80 GB hold them with their optimiser.
"""

from ml_collections import ConfigDict

from configs import janus_pro_1b


def get_config() -> ConfigDict:
  config = janus_pro_1b.variant("7B", "pytorch_model.bin.index.json")
  config.source_dtype = "bfloat16"  # that of the file
  config.backbone.dtype = "bfloat16"
  config.train.remat = "full"
  config.mesh = dict(data=1, fsdp=-1, tensor=1)
  return config
