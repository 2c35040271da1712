"""The folder of a tiny chat model that draws, as far as its tokenizer goes."""

import pathlib

import tokenizers
from tokenizers import models, pre_tokenizers, processors

from tensorar_jax.conditioning import chat

WORDS = ("a", "cat", "red", "on", "mat", ":", "\n\n")
SPECIAL = (chat.BEGIN, chat.PAD, chat.IMAGE, "<|User|>", "<|Assistant|>")


def tokenizer(
  special=SPECIAL, words=WORDS, begins: bool = True
) -> tokenizers.Tokenizer:
  """Knows WORDS; `begins` is whether it adds the token of the beginning."""
  vocabulary = {"<unk>": 0}
  for word in words:
    vocabulary[word] = len(vocabulary)
  made = tokenizers.Tokenizer(models.WordLevel(vocabulary, "<unk>"))
  made.add_special_tokens(list(special))
  split = tokenizers.Regex(r"\n\n|:|\w+| ")
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(split, "isolated"),
      pre_tokenizers.Split(" ", "removed"),
    ]
  )
  if begins:
    made.post_processor = processors.TemplateProcessing(
      single=f"{chat.BEGIN} $A",
      special_tokens=[(chat.BEGIN, made.token_to_id(chat.BEGIN))],
    )
  return made


def folder(path: pathlib.Path, **options) -> pathlib.Path:
  path.mkdir()
  tokenizer(**options).save(str(path / "tokenizer.json"))
  return path
