"""One fixture folder of the family: arrays, settings, our model of it."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np

import tensorar_jax as tj
from tensorar_jax.conditioning import conditions
from tests import programs

# Settings that a fixture may leave to the reference's defaults -> fields.
_OPTIONAL = {
  "multiple_of": "mlp_multiple",
  "ffn_dim_multiplier": "mlp_scale",
  "rope_base": "rope_base",
  "norm_eps": "norm_eps",
  "n_kv_head": "num_kv_heads",
  "caption_dim": "text_width",
  "cls_token_num": "text_length",
}


def backbone_fields(folder) -> dict:
  """Reads the settings of a fixture's meta.json as fields of our Config."""
  c = json.loads((folder / "meta.json").read_text())["config"]
  side = math.isqrt(c["block_size"])
  fields = dict(
    vocab_size=c["vocab_size"],
    grid=(side, side),
    width=c["dim"],
    num_layers=c["n_layer"],
    num_heads=c["n_head"],
    num_classes=c["num_classes"],
  )
  for name, field in _OPTIONAL.items():
    if c.get(name) is not None:
      fields[field] = c[name]
  if "rope_base" in fields:
    fields["rope_base"] = float(fields["rope_base"])
  return fields


class Case:
  """Of classes or of text, by what the folder holds."""

  def __init__(self, folder, **options):
    self.file = folder / "checkpoint.pt"
    self.io = np.load(folder / "io.npz")
    self.meta = json.loads((folder / "meta.json").read_text())
    c = self.meta["config"]
    self.model = tj.import_backbone(
      "llamagen", str(self.file), **backbone_fields(folder), **options
    )
    self.tokens = jnp.asarray(self.io["token_ids"], jnp.int32)[..., None]
    if self.model.config.text_width:
      texts = tj.TextConditioning(c["caption_dim"], c["cls_token_num"])
      right = self.io["t5_feats_right"], self.io["t5_mask_right"]
      self.cond = texts.encode(right)
    else:
      classes = tj.ClassConditioning(c["num_classes"])
      self.cond = classes.encode(self.io["class_ids"])

  def logits(self, hidden):
    zeros = jnp.zeros((*hidden.shape[:-1], 1), jnp.int32)
    return programs.logits(self.model, hidden, zeros)[0]

  def teacher_forced(self, cond, count=None):
    x = self.model.embed(self.tokens[:, :count])
    return programs.states(self.model, cond, x)

  def decoded(self, cond):
    """Hidden states of prefill and of a decode for every token."""
    return programs.cached(self.model, cond, self.model.embed(self.tokens))

  def generate(self, name, cond):
    """Greedy samples by the settings of that name."""
    setting = self.meta["generation"][name]
    interval = None
    if setting.get("cfg_interval", -1) > -1:
      # Decode step i yields token i + 1 and is guided while i <= cfg_interval.
      interval = (0, setting["cfg_interval"] + 2)
    config = tj.SamplingConfig(
      temperature=0.0,
      guidance=setting["cfg_scale"],
      guidance_interval=interval,
      return_logits=True,
    )
    base = tj.TensorAR(self.model, window=1)
    null = conditions.null(cond)
    return tj.generate(base, cond, null, jax.random.key(0), config)


def close(got, want, atol):
  np.testing.assert_allclose(np.asarray(got), want, atol=atol, rtol=0)
