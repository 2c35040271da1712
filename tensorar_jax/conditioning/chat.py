"""Prompts as token ids in the template of a chat model that draws images.

    <bos> <|User|>: {prompt} \\n\\n <|Assistant|>: <begin_of_image>

The image follows. The null prompt, with which guidance compares, is as long as
the prompt; all its tokens but the first and the last are padding, which the
model does see. Template: that of DeepSeek's chat models (arXiv:2401.02954).
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from tensorar_jax.checkpoints import hub
from tensorar_jax.conditioning import captions, conditions

# Special tokens by their names; ids differ from model to model.
BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
IMAGE = "<begin_of_image>"
BEFORE, AFTER = "<|User|>: ", f"\n\n<|Assistant|>:{IMAGE}"

_TOKEN = 128  # letters of the longest tokens: more of a prompt are not split


class PromptEncoder:
  """Turns prompts into the ids that `PromptConditioning.encode` reads.

  The ids come from the model's own `tokenizer.json`. The token of the beginning
  is there once, whether or not that file adds it: a null prompt without it
  would keep a word of the prompt. The text of a prompt with more than `length`
  ids is cut, and the log says so.

  Attributes:
    width: ids at each place, of the prompt and of its null prompt.
    length: the most ids of a prompt, those of the template included.
    dtype: of ids.
  """

  width, dtype = 2, "int32"

  def __init__(self, path: str | pathlib.Path, length: int = 256):
    self._tokens = captions.read_tokenizer(pathlib.Path(path))
    self._tokens.no_truncation()
    self._tokens.no_padding()
    self.length, self._log_cut = length, captions.CutLog(length)
    self._most = _TOKEN * length
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
      self._check(f"prompt {number}", prompt)
      text = prompt.strip()
      ids, num_after = self._split(text[: self._most])
      if len(ids) > self.length or len(text) > self._most:
        self._log_cut(number, prompt)
        ids = ids[: self.length - num_after] + ids[-num_after:]
      rows.append(ids)
    return conditions.prompt_rows(rows, self.pad, self.length)

  def check(self, caption: str) -> None:
    """ValueError if a caption cannot be encoded."""
    self._check("the caption", caption)

  def _check(self, where: str, prompt: Any) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
      raise ValueError(
        f"{where} is {captions.shown(prompt)}: expected a text. For an image"
        " of no prompt use the null condition."
      )
    if problem := captions.flaw(prompt):
      raise ValueError(f"{where} {problem}.")

  def _split(self, prompt: str) -> tuple[list[int], int]:
    """(ids of the prompt in its template, how many come after its text)."""
    text = BEFORE + prompt.strip()
    encoding = self._tokens.encode(text + AFTER, add_special_tokens=False)
    num_after = sum(end > len(text) for _, end in encoding.offsets)
    return [self._begin, *encoding.ids], num_after


def import_prompt_encoder(
  folder: str | pathlib.Path, length: int = 256
) -> PromptEncoder:
  """Opens the prompt encoder of a published folder, or of a name on the hub."""
  return PromptEncoder(hub.find(folder) / "tokenizer.json", length)
