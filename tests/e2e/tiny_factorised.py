"""configs/open_magvit2_b.py on a tiny checkpoint: colour images from a file.

`:FOLDER` after the file name is the folder of parity fixtures.
"""

import json
import math
import pathlib

from ml_collections import ConfigDict


def get_config(parity: str) -> ConfigDict:
  folder = pathlib.Path(parity, "open_magvit2", "gpt")
  meta = json.loads((folder / "config.json").read_text())
  gpt = meta["transformer_defaults_in_effect"]
  first = meta["model_init_args"]["first_stage_config"]["params"]
  network, side = first["ddconfig"], math.isqrt(gpt["block_size"])
  source = str(folder / "model.ckpt")
  config = ConfigDict()
  config.seed = 0
  config.data = dict(name="digits", train_split="train")
  config.tokenizer = dict(
    name="lfq",
    weights="first_stage",
    init="tokenizer",
    bits=tuple(first["factorized_bits"]),
    channels=network["ch"],
    channel_multipliers=tuple(network["ch_mult"]),
    num_res_blocks=network["num_res_blocks"],
    image_channels=network["in_channels"],
    image_size=(network["resolution"],) * 2,
  )
  config.conditioning = dict(name="class", num_classes=gpt["class_num"])
  config.backbone = dict(
    name="open_magvit2",
    vocab_sizes=tuple(2**bits for bits in gpt["factorized_bits"]),
    grid=(side, side),
    width=gpt["dim"],
    num_layers=gpt["spatial_n_layer"],
    num_inner_layers=gpt["factorized_n_layer"],
    num_heads=gpt["n_head"],
    num_kv_heads=gpt["n_kv_head"],
    num_classes=gpt["class_num"],
    mlp_multiple=gpt["multiple_of"],
    mlp_scale=gpt["ffn_dim_multiplier"],
    rope_base=gpt["rope_base"],
    norm_eps=gpt["norm_eps"],
  )
  config.tensorar = dict(window=1)
  config.noise = dict(kind="categorical")
  config.loss = dict(weights="rdm")
  config.optim = dict(learning_rate=1e-3)
  config.train = dict(batch_size=2, num_steps=2)
  config.sampling = dict(temperature=1.0, guidance=1.0)
  config.stages = dict(
    tokenizer=dict(objective="tokenizer", source=source),
    base=dict(source=source),
  )
  return config
