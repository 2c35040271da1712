"""Prompts as a chat model that draws reads them: token ids in a template.

    <bos> <|User|>: {prompt} \\n\\n <|Assistant|>: <begin_of_image>

The image follows. In the null prompt, which guidance compares with, all tokens
but the first and the last are padding, and as many as in the prompt; the model
does see them. Template: that of DeepSeek's chat models (arXiv:2401.02954).
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from tensorar_jax.checkpoints import hub
from tensorar_jax.conditioning import captions, conditions

# Special tokens by their names; ids differ from model to model.
BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
IMAGE = "<begin_of_image>"
BEFORE, BEHIND = "<|User|>: ", f"\n\n<|Assistant|>:{IMAGE}"


class PromptEncoder:
  """What `PromptConditioning.encode` reads, by a model's own `tokenizer.json`.

  Whether that file adds the token of the beginning does not matter, it is put
  there once: a null prompt without it would keep a word of the prompt. What
  makes a prompt longer than `length` is cut off its text, and the log says so.

  Attributes:
    width: ids at each place, of the prompt and of its null prompt.
    length: ids of a prompt at most, the template's among them.
    dtype: of ids.
  """

  width, dtype = 2, "int32"

  def __init__(self, path: str | pathlib.Path, length: int = 256):
    self._tokens = captions.read_tokenizer(pathlib.Path(path))
    self._tokens.no_truncation()
    self._tokens.no_padding()
    self.length, self._log_cut = length, captions.CutLog(length)
    self.sha256 = hashlib.sha256(self._tokens.to_str().encode()).hexdigest()
    self.vocab_size = self._tokens.get_vocab_size()
    ids = {n: self._tokens.token_to_id(n) for n in (BEGIN, PAD, IMAGE)}
    if missing := [name for name, number in ids.items() if number is None]:
      raise ValueError(
        f"{path}: the tokenizer lacks {missing}, the special tokens of a model"
        " that makes images from prompts. Use the file of that model itself."
      )
    self._begin, self.pad, self._image = ids.values()
    if self._split("a")[0][-1] != self._image:
      raise ValueError(
        f"{path}: the tokenizer does not read {IMAGE!r} as one token. Use the"
        " file of the model itself, where it is a special token."
      )
    shortest = len(self._split("a")[0])
    if length < shortest:
      raise ValueError(
        f"length={length}: expected at least {shortest}, a word in its"
        " template. Raise the conditioning's length."
      )

  def __call__(
    self, prompts: Sequence
  ) -> tuple[Int[np.ndarray, "B P 2"], Bool[np.ndarray, "B P"]]:
    """(ids, mask, true at tokens); what is no prompt is a ValueError."""
    if isinstance(prompts, str) or not len(prompts):
      raise ValueError(f"prompts={prompts!r}: expected a list of texts.")
    rows = []
    for number, prompt in enumerate(prompts):
      if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
          f"prompt {number} is {prompt!r}: expected a text. For an image of no"
          " prompt use the null condition."
        )
      ids, behind = self._split(prompt)
      if len(ids) > self.length:
        self._log_cut(number, prompt)
        ids = ids[: self.length - behind] + ids[-behind:]
      rows.append(conditions.with_null(ids, self.pad))
    return conditions.pad_left(rows, self.length)

  def _split(self, prompt):
    """(ids of the prompt in its template, how many stand behind its text)."""
    text = BEFORE + prompt.strip()
    found = self._tokens.encode(text + BEHIND, add_special_tokens=False)
    behind = sum(end > len(text) for _, end in found.offsets)
    return [self._begin, *found.ids], behind


def import_prompt_encoder(
  folder: str | pathlib.Path, length: int = 256
) -> PromptEncoder:
  """The encoder of prompts for the model in a published folder, or its name."""
  return PromptEncoder(hub.find(folder) / "tokenizer.json", length)
