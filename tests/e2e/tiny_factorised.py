"""configs/open_magvit2_b.py on a tiny checkpoint: colour images from a file.

`:FOLDER` after the file name is the folder of parity fixtures.
"""

import pathlib

from ml_collections import ConfigDict

from tests.backbones import open_magvit2_case


def get_config(parity: str) -> ConfigDict:
  folder = pathlib.Path(parity, "open_magvit2", "gpt")
  backbone = open_magvit2_case.backbone_fields(folder)
  tokenizer = open_magvit2_case.tokenizer_fields(folder)
  source = str(folder / "model.ckpt")
  config = ConfigDict()
  config.data = dict(name="digits")
  config.tokenizer = dict(name="lfq", init="tokenizer", **tokenizer)
  config.conditioning = dict(name="class", num_classes=backbone["num_classes"])
  config.backbone = dict(name="open_magvit2", **backbone)
  config.optim = dict(learning_rate=1e-3)
  config.train = dict(batch_size=2, num_steps=2)
  config.stages = dict(
    tokenizer=dict(objective="tokenizer", source=source),
    base=dict(source=source),
  )
  return config
