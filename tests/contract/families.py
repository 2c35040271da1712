"""A tiny model of every file in backbones/ and tokenizers/, found by name.

A new family needs one entry here; the contract tests then run over it. A family
that also makes images from text has a second one, "<name>:text"; one that does
from prompts alone is in PROMPTED.
"""

import dataclasses
import json
import pathlib
import pkgutil

import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from flax import nnx

from tensorar_jax import backbones, tokenizers
from tensorar_jax.backbones import janus, open_magvit2, rar
from tensorar_jax.experiment.families import family
from tensorar_jax.parallel import weights
from tests import tiny


def names(package) -> list[str]:
  return [module.name for module in pkgutil.iter_modules(package.__path__)]


BACKBONES = [*names(backbones), "llamagen:text"]
TOKENIZERS = names(tokenizers)
PROMPTED = ("janus",)
FOLDERS = {"janus": "janus_pro"}  # of the fixtures, if not the family's name

_TINY_BACKBONES = {
  "janus": janus.Config(
    text_vocab_size=tiny.PROMPTS.vocab_size,
    vocab_size=11,
    grid=(3, 3),
    width=16,
    num_layers=3,
    num_heads=2,
    mlp_width=24,
    code_dim=4,
    token_dropout=0.0,
  ),
  "llamagen": tiny.CONFIG,
  "llamagen:text": dataclasses.replace(
    tiny.CONFIG, text_width=tiny.TEXTS.width, text_length=tiny.TEXTS.length
  ),
  "open_magvit2": open_magvit2.Config(
    vocab_sizes=(4, 8),
    grid=(3, 3),
    width=16,
    num_layers=3,
    num_inner_layers=2,
    num_heads=2,
    num_classes=5,
    mlp_multiple=8,
    token_dropout=0.0,
    residual_dropout=0.0,
    mlp_dropout=0.0,
  ),
  "rar": rar.Config(
    vocab_size=11,
    grid=(3, 3),
    width=16,
    num_layers=3,
    num_heads=2,
    num_classes=5,
    attention_dropout=0.0,
    residual_dropout=0.0,
    mlp_dropout=0.0,
  ),
}
# The tokenizer that each family's images go through.
TOKENIZER_OF = {
  "janus": "vq",
  "llamagen": "vq",
  "open_magvit2": "lfq",
  "rar": "maskgit_vq",
}
TOKENIZER_OF["llamagen:text"] = TOKENIZER_OF["llamagen"]
_TINY_TOKENIZERS = {
  "lfq": dict(
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    bits=(2, 3),
    norm_groups=4,
    image_size=(6, 6),
  ),
  "maskgit_vq": dict(
    channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    code_dim=4,
    codebook_size=11,
    norm_groups=4,
    image_size=(6, 6),
  ),
  "pixels": dict(image_size=(3, 3), levels=11),
  "vq": tiny.VQ,
}


def module_of(name: str):
  """Returns the family's module of an entry of BACKBONES."""
  return family("backbones", name.split(":")[0])


def is_text(name: str) -> bool:
  return name.endswith(":text") or name in PROMPTED


def published(name: str) -> dict:
  """Returns the VARIANTS that make images from what the entry does."""
  variants = module_of(name).VARIANTS.items()
  if name in PROMPTED:
    return dict(variants)
  reads_text = lambda config: getattr(config, "text_width", None) is not None
  return {n: c for n, c in variants if reads_text(c) == is_text(name)}


def cond(name: str, numbers=(0, 1)) -> dict:
  """Makes a condition of each of these classes, or of as many texts."""
  if name in PROMPTED:
    return tiny.prompts(numbers)
  if not is_text(name):
    return tiny.CLASSES.encode(np.asarray(numbers) % 5)
  return tiny.texts(numbers)


def manifest(parity: pathlib.Path, name: str, file: str) -> dict[str, tuple]:
  """Reads the manifest of a published file: tensor name -> shape.

  The manifest of a file in a folder is named after the folder, as Python would
  write it, with "_hf" for the conversion for transformers, in safetensors.
  """
  folder = FOLDERS.get(name, name.split(":")[0])
  folder = parity / folder / "real_checkpoint_manifest"
  if "/" in file:
    repository, file = file.split("/")
    layout = "_hf" if ".safetensors" in file else ""
    file = f"{repository.lower().replace('-', '_')}{layout}.json"
  content = json.loads((folder / file).with_suffix(".json").read_text())
  keys = content.get("keys") or content.get("state_dict") or content
  return {key: tuple(shape) for key, (shape, _) in keys.items()}


def count(model: nnx.Module) -> int:
  """Counts the trained numbers of a model, which may be abstract."""
  return parameter_overview.count_parameters(weights.split(model)[1])


def backbone(
  name: str, seed: int = 0, dropout: bool = False, dtype: str = "float32"
) -> nnx.Module:
  """Makes a random tiny backbone; `dropout` keeps the family's own rates."""
  module = module_of(name)
  config = dataclasses.replace(_TINY_BACKBONES[name], dtype=dtype)
  if dropout:
    rates = {
      field.name: field.default
      for field in dataclasses.fields(config)
      if field.name.endswith("dropout")
    }
    config = dataclasses.replace(config, **rates)
  make = lambda rngs: module.Model(config, rngs=rngs)
  return tiny.redraw(weights.abstract(make), seed)


def tokenizer(name: str) -> nnx.Module:
  """Makes a tiny tokenizer of the family on a 3 x 3 grid."""
  module = family("tokenizers", name)
  config = module.Config(**_TINY_TOKENIZERS[name])
  make = lambda rngs: module.Model(config, rngs=rngs)
  return tiny.redraw(weights.abstract(make), 0)


def tokens(vocab_sizes, batch=2, length=9, seed=0):
  rng = np.random.RandomState(seed)
  parts = [rng.randint(0, size, (batch, length)) for size in vocab_sizes]
  return jnp.asarray(np.stack(parts, axis=-1), jnp.int32)
