"""A folder with a tiny text encoder, as published ones are laid out."""

import pathlib
import shutil

import tokenizers
from tokenizers import models, pre_tokenizers, processors

WORDS = ("\u2581a", "\u2581cat", "\u2581red", "\u2581on", "\u2581mat", "s")


def tokenizer(end: str = "</s>") -> tokenizers.Tokenizer:
  """Knows WORDS and single letters; texts end with `end`."""
  letters = ["\u2581", *map(chr, range(ord("a"), ord("z") + 1))]
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
  pieces += [(word, -1.0) for word in WORDS]
  pieces += [(one, -5.0) for one in letters if one not in WORDS]
  made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
  made.pre_tokenizer = pre_tokenizers.Metaspace()
  made.post_processor = processors.TemplateProcessing(
    single=f"$A {end}", special_tokens=[(end, made.token_to_id(end))]
  )
  return made


def folder(parity: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
  """Weights and sizes of the fixture, and the tokenizer, in a new folder."""
  path.mkdir()
  for name in ("model.safetensors", "config.json"):
    shutil.copyfile(parity / "t5" / "t5_encoder" / name, path / name)
  tokenizer().save(str(path / "tokenizer.json"))
  return path
