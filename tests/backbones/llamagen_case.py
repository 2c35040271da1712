"""One fixture folder of the family: arrays, settings, our model of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np

import tensorar_jax as tj
from tensorar_jax.conditioning import conditions
from tests import programs


class Case:
  """Of classes or of text, by what the folder holds."""

  def __init__(self, folder, **options):
    self.file = folder / "checkpoint.pt"
    self.io = np.load(folder / "io.npz")
    self.meta = json.loads((folder / "meta.json").read_text())
    c = self.meta["config"]
    fields = {
      "mlp_multiple": c.get("multiple_of"),
      "mlp_scale": c.get("ffn_dim_multiplier"),
      "rope_base": c.get("rope_base"),
      "norm_eps": c.get("norm_eps"),
      "num_kv_heads": c.get("n_kv_head"),
      "text_width": c.get("caption_dim"),
    }
    fields = {k: type(v)(v) for k, v in fields.items() if v is not None}
    if "rope_base" in fields:
      fields["rope_base"] = float(fields["rope_base"])
    self.model = tj.import_backbone(
      "llamagen",
      str(self.file),
      vocab_size=c["vocab_size"],
      grid=(self.meta["grid"],) * 2,
      width=c["dim"],
      num_layers=c["n_layer"],
      num_heads=c["n_head"],
      num_classes=c["num_classes"],
      text_length=c["cls_token_num"],
      **fields,
      **options,
    )
    self.tokens = jnp.asarray(self.io["token_ids"], jnp.int32)[..., None]
    if "text_width" in fields:
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
