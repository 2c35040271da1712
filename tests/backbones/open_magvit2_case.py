"""The tiny Open-MAGVIT2 checkpoint: its arrays, settings and our model."""

import json
import math

import jax.numpy as jnp
import numpy as np

import tensorar_jax as tj
from tests import programs


def settings(folder):
  """Reads what the reference says of its model."""
  return json.loads((folder / "config.json").read_text())


def backbone_fields(folder) -> dict:
  """Returns the fixture's settings as fields of our Config."""
  c = settings(folder)["transformer_defaults_in_effect"]
  side = math.isqrt(c["block_size"])
  return dict(
    vocab_sizes=tuple(2**bits for bits in c["factorized_bits"]),
    grid=(side, side),
    width=c["dim"],
    num_layers=c["spatial_n_layer"],
    num_inner_layers=c["factorized_n_layer"],
    num_heads=c["n_head"],
    num_kv_heads=c["n_kv_head"],
    num_classes=c["class_num"],
    mlp_multiple=c["multiple_of"],
    mlp_scale=c["ffn_dim_multiplier"],
    rope_base=c["rope_base"],
    norm_eps=c["norm_eps"],
  )


def tokenizer_fields(folder) -> dict:
  """Returns those of the tokenizer in the same file, as fields of `lfq`."""
  c = settings(folder)["model_init_args"]["first_stage_config"]["params"]
  network = c["ddconfig"]
  return dict(
    weights="first_stage",
    bits=tuple(c["factorized_bits"]),
    channels=network["ch"],
    channel_multipliers=tuple(network["ch_mult"]),
    num_res_blocks=network["num_res_blocks"],
    image_channels=network["in_channels"],
    image_size=(network["resolution"],) * 2,
  )


class Case:
  """The fixture's arrays and settings, and our model with its weights."""

  def __init__(self, folder):
    self.folder = folder
    self.io = np.load(folder / "io.npz")
    self.meta = settings(folder)
    self.read = set()  # inputs that some group has used
    self.fields = backbone_fields(folder)
    self.model = self.load(folder / "model.ckpt")
    self.classes = tj.ClassConditioning(self.fields["num_classes"])
    self.cond = self.classes.encode(self.input("class_ids"))
    self.null = self.classes.null(self.cond)
    self.tokens = self.pair("in/tokens")

  def load(self, path):
    return tj.import_backbone("open_magvit2", str(path), **self.fields)

  def input(self, name):
    self.read.add(name)
    return self.io[f"in/{name}"]

  def pair(self, prefix):
    if prefix.startswith("in/"):
      self.read |= {prefix[3:] + "_pre", prefix[3:] + "_post"}
    pair = [self.io[f"{prefix}_{half}"] for half in ("pre", "post")]
    return jnp.asarray(np.stack(pair, axis=-1), jnp.int32)

  def logits(self, cond, tokens):
    x = self.model.embed(tokens[:, :-1])
    hidden = programs.forward(self.model, cond, x)
    return programs.logits(self.model, hidden, tokens)

  def full(self, tokens):
    """Both sub-tokens as the index of one vocabulary."""
    return tokens[..., 0] + tokens[..., 1] * self.model.vocab_sizes[0]
