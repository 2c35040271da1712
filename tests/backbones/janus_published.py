"""Writes Janus-Pro's fixture in the published layout from transformers' one.

The two layouts hold the same weights, so only one of them is stored. Names are
translated by the table of the fixture's README, by hand and not by the rules
of the code under test.
"""

import hashlib
import pathlib
import re
import shutil

import numpy as np
import safetensors.numpy

# Pattern in transformers' name -> what the published name has there.
RENAMES = (
  (r"^lm_head", "language_model.lm_head"),
  (r"^model\.language_model", "language_model.model"),
  (r"^model\.generation_embeddings", "gen_embed"),
  (r"^model\.generation_head\.proj_out", "gen_head.output_mlp_projector"),
  (r"^model\.generation_head", "gen_head"),
  (r"^model\.generation_aligner\.fc1", "gen_aligner.layers.0"),
  (r"^model\.generation_aligner\.hidden_layers\.0", "gen_aligner.layers.2"),
  (r"^model\.generation_aligner\.hidden_layers\.1", "gen_aligner.layers.4"),
  (r"^model\.vqmodel", "gen_vision_model"),
  (r"\.(?:down|up)\.(\d+)\.block\.", r".conv_blocks.\1.res."),
  (r"\.(?:down|up)\.(\d+)\.", r".conv_blocks.\1."),
  (r"\.mid\.block_1\.", ".mid.0."),
  (r"\.mid\.attn_1\.", ".mid.1."),
  (r"\.mid\.block_2\.", ".mid.2."),
)
# Parts that both models have in files, different ones, and image generation
# ignores; those of the published layout lie in ignored.safetensors.
IGNORED = ("model.vision_model.", "model.aligner.")
USAGE_COUNTER = "gen_vision_model.quantize.codebook_used"
# Of the file that the reference implementation wrote.
SHA256 = "bf9e9092e94ffd12eca86cbb092a5302074023e2e1e5361eaa346aca88460007"


def published_name(name: str) -> str:
  """Translates a name of transformers' layout."""
  for pattern, replacement in RENAMES:
    name = re.sub(pattern, replacement, name)
  return name


def write(gpt: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Copies the fixture `gpt` into `folder`, with both layouts' files.

  Raises:
    ValueError: if the file is not the reference's, byte for byte.
  """
  shutil.copytree(gpt, folder, dirs_exist_ok=True)
  ignored = folder / "published" / "ignored.safetensors"
  tensors = safetensors.numpy.load_file(ignored)
  ignored.unlink()
  halves = safetensors.numpy.load_file(folder / "hf" / "model.safetensors")
  for name, tensor in halves.items():
    if not name.startswith(IGNORED):
      tensors[published_name(name)] = tensor.astype(np.float32)
  tensors[USAGE_COUNTER] = np.zeros(65536, np.float32)
  path = folder / "published" / "model.safetensors"
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  if digest != SHA256:
    raise ValueError(f"{path} has the SHA-256 {digest}: expected {SHA256}")
  return folder
