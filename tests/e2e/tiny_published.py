"""The path of configs/llamagen_b.py on a tiny checkpoint in the same layout.

`:FOLDER` after the file name is the folder of parity fixtures.
"""

from ml_collections import ConfigDict

BACKBONE = dict(
  vocab_size=96,
  grid=(4, 4),
  width=64,
  num_layers=3,
  num_heads=4,
  num_classes=10,
)


def get_config(parity: str) -> ConfigDict:
  config = ConfigDict()
  config.data = dict(name="digits")
  config.tokenizer = dict(name="pixels", image_size=(4, 4), levels=96)
  config.conditioning = dict(name="class", num_classes=10)
  config.backbone = dict(name="llamagen", **BACKBONE)
  config.optim = dict(learning_rate=1e-3, backbone_learning_rate=1e-4)
  config.train = dict(
    batch_size=2, num_steps=2, log_every=1, checkpoint_every=2
  )
  config.sampling = dict(guidance=2.0)
  config.stages = dict(
    base=dict(source=f"{parity}/llamagen/gpt_c2i/checkpoint.pt"),
    tensorar=dict(init="base", tensorar=dict(window=4)),
  )
  return config
