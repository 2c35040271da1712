"""The fixture of the family in one of its two layouts, and our model of it."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import tensorar_jax as tj
from tensorar_jax.checkpoints import torch_export
from tensorar_jax.conditioning import conditions
from tensorar_jax.method import drawing
from tensorar_jax.nn import image_bytes
from tests import programs

# Fields of a language model's config.json -> ours, with upstream's defaults.
_LANGUAGE = {
  "hidden_size": ("width", 4096),
  "num_hidden_layers": ("num_layers", 32),
  "num_attention_heads": ("num_heads", 32),
  "num_key_value_heads": ("num_kv_heads", None),
  "head_dim": ("head_dim", None),
  "intermediate_size": ("mlp_width", 11008),
  "vocab_size": ("text_vocab_size", 32000),
  "rms_norm_eps": ("norm_eps", 1e-6),
  "rope_theta": ("rope_base", 10000.0),
}


def sizes(folder):
  """Reads a config.json as fields of our backbone, and of our tokenizer."""
  content = json.loads((folder / "config.json").read_text())
  language = content.get("language_config") or content["text_config"]
  language = {**language, **language.get("rope_parameters", {})}
  fields = {our: language.get(k, d) for k, (our, d) in _LANGUAGE.items()}
  if "vq_config" in content:
    vq = content["vq_config"]
    ends = {
      "aligner_depth": vq["num_hidden_layers"],
      "head_width": vq["image_token_embed_dim"],
      "code_dim": vq["embed_dim"],
      "vocab_size": vq["num_embeddings"],
    }
    network = {
      "channels": vq["base_channels"],
      "channel_multipliers": tuple(vq["channel_multiplier"]),
      "num_res_blocks": vq["num_res_blocks"],
      "latent_channels": vq["latent_channels"],
    }
  else:
    part = lambda name: content[f"gen_{name}_config"]["params"]
    ends = {
      "aligner_depth": part("aligner")["depth"],
      "head_width": part("head")["image_token_embed"],
      "code_dim": part("vision")["n_embed"],
      "vocab_size": part("vision")["image_token_size"],
    }
    vq = content["gen_vision_config"]["fixture_params"]
    network = {
      "channels": vq["ch"],
      "channel_multipliers": tuple(vq["ch_mult"]),
      "num_res_blocks": vq["num_res_blocks"],
      "latent_channels": vq["z_channels"],
    }
  code = {"code_dim": ends["code_dim"], "codebook_size": ends["vocab_size"]}
  return fields | ends, network | code


_decode = jax.jit(lambda tokenizer, tokens: tokenizer.decode(tokens))


class Case:
  def __init__(self, folder, layout):
    self.io = np.load(folder / "io.npz")
    self.tolerances = json.loads((folder / "tolerances.json").read_text())
    self.file = folder / layout / "model.safetensors"
    self.fields, network = sizes(folder / layout)
    pixels = self.io["a_tf_pixels"].shape[2:]
    network["image_size"] = pixels
    self.tokenizer_fields = network
    self.fields["grid"] = tuple(side // 16 for side in pixels)
    self.model = tj.import_backbone("janus", str(self.file), **self.fields)
    self.tokenizer = tj.import_tokenizer(
      "vq", str(self.file), "janus", **network
    )

  def condition(self, *prompts, rows=1):
    """The condition of prompts by name, of each as many rows."""
    ids = [self.io[f"{name}_prompt_ids"] for name in prompts]
    reads = tj.PromptConditioning(
      length=max(map(len, ids)), vocab_size=self.fields["text_vocab_size"]
    )
    ids = [one for one in ids for _ in range(rows)]
    pad = int(self.io["pad_id"])
    return reads.encode(conditions.prompt_rows(ids, pad, reads.length))

  def logits(self, hidden):
    zeros = jnp.zeros((*hidden.shape[:-1], 1), jnp.int32)
    return programs.logits(self.model, hidden, zeros)[0]

  def guided(self, cond, uncond):
    both = jnp.concatenate([cond, uncond])
    return drawing.guide(both, jnp.asarray(self.io["cfg_weight"]))

  def generate(self, cond):
    """Greedy samples with guidance, and their guided logits."""
    config = tj.SamplingConfig(
      temperature=0.0,
      guidance=float(self.io["cfg_weight"]),
      return_logits=True,
    )
    base, null = tj.TensorAR(self.model, window=1), conditions.null(cond)
    out = tj.generate(base, cond, null, jax.random.key(0), config)
    return np.asarray(out.tokens[..., 0]), np.asarray(out.logits[0][:, :, 0])

  def pixels(self, codes):
    """Images as upstream has them, channels first."""
    codes = jnp.asarray(codes, jnp.int32)[..., None]
    images = _decode(self.tokenizer, codes)
    return np.asarray(images).transpose(0, 3, 1, 2)

  def bytes(self, pixels):
    images = jnp.asarray(pixels.transpose(0, 2, 3, 1))
    return np.asarray(image_bytes.to_uint8(images, self.tokenizer.uint8_offset))


def compare(got, want, tolerance, name):
  """Raises unless an array is within its entry of tolerances.json."""
  got = np.asarray(got)
  assert got.shape == want.shape, name
  if tolerance == "exact":
    np.testing.assert_array_equal(got, want, name)
  elif "max_abs" in tolerance:
    off = np.abs(got.astype(int) - want)
    assert off.max() <= tolerance["max_abs"], name
    assert (off > 0).mean() <= tolerance["fraction_off"], name
  else:
    np.testing.assert_allclose(got, want, **tolerance, err_msg=name)
  return float(np.abs(got.astype(np.float64) - want).max())


def divide(tensors: dict, path: pathlib.Path, suffix: str) -> pathlib.Path:
  """Writes tensors in two files and their index; returns the index's path."""
  stem = "model" if suffix == "safetensors" else "pytorch_model"
  names, files = sorted(tensors), {}
  for number in (0, 1):
    file = f"{stem}-0000{number + 1}-of-00002.{suffix}"
    part = {name: tensors[name] for name in names[number::2]}
    torch_export.save(path / file, part)
    files |= dict.fromkeys(part, file)
  index = path / f"{stem}.{suffix}.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
  return index
