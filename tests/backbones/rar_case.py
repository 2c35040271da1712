"""The settings of a fixture of the family, in our names."""

import json
import math
import pathlib

from flax import nnx

import tensorar_jax as tj


def settings(path: pathlib.Path) -> dict:
  """Reads config.json beside a checkpoint."""
  return json.loads(path.with_name("config.json").read_text())


def load(path: pathlib.Path) -> nnx.Module:
  """Imports a checkpoint, with the sizes and dropout rates beside it."""
  c = settings(path)
  side = math.isqrt(c["image_seq_len"])
  return tj.import_backbone(
    "rar",
    str(path),
    vocab_size=c["codebook_size"],
    grid=(side, side),
    width=c["hidden_size"],
    num_layers=c["num_hidden_layers"],
    num_heads=c["num_attention_heads"],
    num_classes=c["condition_num_classes"],
    mlp_width=c["intermediate_size"],
    attention_dropout=c["attn_drop"],
    residual_dropout=c["dropout"],
    mlp_dropout=c["dropout"],
  )
