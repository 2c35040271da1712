"""The path of configs/llamagen_b.py on a tiny checkpoint in the same layout.

`:FOLDER` after the file name is the folder of parity fixtures.
"""

from ml_collections import ConfigDict


def get_config(parity: str) -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.source_dtype = "float32"
  config.data = dict(name="digits", train_split="train", test_split="test")
  config.tokenizer = dict(name="pixels", image_size=(4, 4), levels=96)
  config.conditioning = dict(name="class", num_classes=10)
  config.backbone = dict(
    name="llamagen",
    vocab_size=96,
    grid=(4, 4),
    width=64,
    num_layers=3,
    num_heads=4,
    num_classes=10,
  )
  config.tensorar = dict(window=1)
  config.noise = dict(kind="categorical")
  config.loss = dict(weights="rdm")
  config.optim = dict(learning_rate=1e-3, backbone_learning_rate=1e-4)
  config.train = dict(
    batch_size=2, num_steps=2, log_every=1, checkpoint_every=2
  )
  config.sampling = dict(temperature=1.0, guidance=2.0)
  config.stages = dict(
    base=dict(source=f"{parity}/llamagen/gpt_c2i/checkpoint.pt"),
    tensorar=dict(init="base", tensorar=dict(window=4)),
  )
  return config
