"""Fixed vectors of words: a text encoder without weights, for tiny data sets.

A word is a vector of signs made from its hash, the same in every process and on
every machine, and so is each position in the caption. A row is the sum of the
two, so the prefix of a backbone needs no positions of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Bool, Float

from tensorar_jax.conditioning import captions as captions_lib


def signs(text: str, width: int) -> Float[np.ndarray, "E"]:
  """`width` signs, +1 or -1, that are bits of the hash of the text."""
  digest = hashlib.shake_256(text.encode()).digest(-(-width // 8))
  bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=width)
  return 2.0 * bits.astype(np.float32) - 1.0


class WordEncoder:
  """Turns captions of known words into what `TextConditioning.encode` reads.

  Attributes:
    words: the vector of every word that a caption may hold.
    width: features of a word.
    length: the most words of a caption.
  """

  def __init__(
    self,
    words: Collection[str],
    width: int = 64,
    length: int = 8,
  ):
    if width < 8 or length < 1:
      raise ValueError(
        f"width={width}, length={length}: expected at least 8 features, in"
        " which words can differ, and at least one word."
      )
    self.width, self.length = width, length
    self.words = {word: signs(word, width) for word in sorted(words)}
    # The hashed text has a space, which no word has.
    self.positions = np.stack(
      [signs(f"place {i}", width) for i in range(length)]
    )

  def __call__(
    self, captions: Sequence[str]
  ) -> tuple[Float[np.ndarray, "B P E"], Bool[np.ndarray, "B P"]]:
    """(features, mask, true at words), the words first in each row.

    ValueError for an unknown word, no word, or more than `length` words.
    """
    if isinstance(captions, str) or not len(captions):
      raise ValueError(f"captions={captions!r}: expected a list of texts.")
    shape = (len(captions), self.length, self.width)
    features, mask = np.zeros(shape, np.float32), np.zeros(shape[:2], bool)
    for i, caption in enumerate(captions):
      words = self._split(caption)
      rows = np.stack([self.words[word] for word in words])
      features[i, : len(words)] = rows + self.positions[: len(words)]
      mask[i, : len(words)] = True
    return features, mask

  def check(self, caption: str) -> None:
    """ValueError if a caption has other words, none, or too many."""
    self._split(caption)

  def _split(self, caption: str) -> list[str]:
    shown = captions_lib.shown(caption)
    words = re.findall(r"[^\s.,]+", caption.lower())
    for word in words:
      if word not in self.words:
        raise ValueError(
          f"caption {shown}: the word {word[:60]!r} is unknown; known are"
          f" {', '.join(self.words)}."
        )
    if not 1 <= len(words) <= self.length:
      raise ValueError(
        f"caption {shown} has {len(words)} words: expected 1 to {self.length}."
      )
    return words
