"""Cleans captions and turns them into tokens, as published models read them.

The cleaning is that of the training data of DeepFloyd IF and PixArt, which
LAION's captions needed: no links, markup, file names, ids or shop words, one
kind of dash and of quote, all lower case. The models have seen no other text.
"""

from __future__ import annotations

import hashlib
import html
import pathlib
import re
import urllib.parse
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Int

_DOMAINS = r"[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILES = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
# (pattern, replacement), applied to the whole text in this order.
_LINKS = (
  ("<person>", "person"),
  (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_DOMAINS})", ""),
  (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_DOMAINS})", ""),
)
_SYMBOLS = (
  (r"@\w+\b", ""),  # user names
  (r"[\u31c0-\u9fff]+", ""),  # Chinese and Japanese characters
  (
    r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+",
    "-",
  ),
  ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
  ("[\u2018\u2019]", "'"),
  ("&quot;?", ""),
  ("&amp", ""),
  (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # network addresses
  (r"\d:\d\d\s+$", ""),
  (r"\\n", " "),  # a line break that is written out
  (r"#\d{1,3}\b", ""),
  (r"#\d{5,}\b", ""),
  (r"\b\d{6,}\b", ""),
  (rf"\S+\.{_FILES}", ""),
  (r"[\"']{2,}", '"'),
  (r"\.{2,}", " "),
  (
    "[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~"
    r"()\[\]{}|\\/*]+",
    " ",
  ),
  (r"\s+\.\s+", " "),
)
_WORDS = (
  (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers of every kind
  (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
  (r"\b\d+[a-zA-Z]+\d+\b", ""),
  (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
  (r"(?:free\s)?download(?:\sfree)?", ""),
  (r"\bclick\b\s(?:for|on)\s\w+", ""),
  (rf"\b{_FILES}(?:\simages?)?", ""),
  (r"\bpage\s+\d+\b", ""),
  (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
  (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # sizes such as 20x30
  (r"\b\s+:\s+", ": "),
  (r"(\D[,./])\b", r"\1 "),
  (r"\s+", " "),
  (r"^[\"']([\w\W]+)[\"']$", r"\1"),
  (r"^['_,\-:;]", ""),
  (r"['_,\-:+]$", ""),
  (r"^\.\S+$", ""),
)


# A caption is cut here before it is cleaned, which takes time in the square of
# the length. It is four times what fills the 120 tokens that models read.
MAX_LETTERS = 2000
_TOKEN = 16  # letters of the longest tokens of T5


def flaw(text: Any, most: int | None = None) -> str | None:
  """What is wrong with a text for every encoder, or None.

  It is no text, has no words, more than `most` letters, or half a character,
  which no file in UTF-8 can hold.
  """
  if not isinstance(text, str):
    return f"{shown(text)} is no text"
  if not text.strip():
    return f"{shown(text)} has no words"
  if most and len(text) > most:
    return f"{shown(text)} has {len(text):,} letters, more than {most:,}"
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    half = text[error.start]
    return f"{shown(text)} is no text in UTF-8: it holds {half!r}"
  return None


def shown(text: Any) -> str:
  """The beginning of a text, for messages."""
  return repr(text[:60] if isinstance(text, str) else text)[:120]


def clean(caption: str, most: int = MAX_LETTERS) -> str:
  """Cleans a caption as the models' training data are: twice, as published.

  Of a longer one only the first `most` letters are read.
  """
  return _clean_once(_clean_once(caption[:most]))


def _clean_once(text):
  import bs4
  import ftfy

  text = urllib.parse.unquote_plus(text).strip().lower()
  text = _replace(text, _LINKS)
  with warnings.catch_warnings():  # a caption may look like a file name
    warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
    text = bs4.BeautifulSoup(text, features="html.parser").text
  text = _replace(text, _SYMBOLS)
  if len(re.findall("[-_]", text)) > 3:  # words-held-together-like-this
    text = re.sub("[-_]", " ", text)
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return _replace(text, _WORDS).strip()


def _replace(text, table):
  for pattern, replacement in table:
    text = re.sub(pattern, replacement, text)
  return text


NAMED = 100  # cut captions that the log shows; a data set has millions


class CutLog:
  """Names the first captions that are cut off after `length` tokens."""

  def __init__(self, length: int):
    self._length, self._count = length, 0

  def __call__(self, number: int, caption: str) -> None:
    self._count += 1
    if self._count <= NAMED:
      message = (
        "caption %d is longer than %d tokens; the rest of it is not read"
      )
      logging.warning(f"{message}: %s", number, self._length, shown(caption))
    if self._count == NAMED:
      logging.warning("further captions that are cut are not named")


class CaptionTokenizer:
  """Turns captions into ids of equal length, by a model's `tokenizer.json`.

  A caption is cleaned, ends with the end-of-sentence token and is padded on the
  right. One with more than `length` ids is cut before the end token; the log
  names the first `NAMED` of these.
  """

  END, PAD = "</s>", "<pad>"

  def __init__(self, path: str | pathlib.Path, length: int = 120):
    if length < 2:
      raise ValueError(
        f"length={length}: expected at least 2, a token and end."
      )
    self.length, self._log_cut = length, CutLog(length)
    self._most = max(MAX_LETTERS, _TOKEN * length)
    self._tokens = read_tokenizer(pathlib.Path(path))
    self.sha256 = hashlib.sha256(self._tokens.to_str().encode()).hexdigest()
    self.vocab_size = self._tokens.get_vocab_size()
    pad = self._tokens.token_to_id(self.PAD)
    if pad is None or self._tokens.encode("a").tokens[-1] != self.END:
      raise ValueError(
        f"{path}: expected a tokenizer with {self.PAD!r} that ends every text"
        f" with {self.END!r}. Use the file of the text encoder itself."
      )
    self._tokens.enable_truncation(length)
    self._tokens.enable_padding(
      length=length, pad_id=pad, pad_token=self.PAD, direction="right"
    )

  def __call__(
    self, captions: Sequence
  ) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """(ids int32, mask, true at tokens); what is no text is a ValueError."""
    if isinstance(captions, str) or not len(captions):
      raise ValueError(f"captions={captions!r}: expected a list of texts.")
    cleaned = [self._cleaned(f"caption {i}", c) for i, c in enumerate(captions)]
    encodings = self._tokens.encode_batch(cleaned)
    for number, encoding in enumerate(encodings):
      if encoding.overflowing or len(captions[number]) > self._most:
        self._log_cut(number, captions[number])
    ids = np.asarray([encoding.ids for encoding in encodings], np.int32)
    mask = [encoding.attention_mask for encoding in encodings]
    return ids, np.asarray(mask, bool)

  def check(self, caption: str) -> None:
    """ValueError if a caption cannot be encoded."""
    self._cleaned("the caption", caption)

  def _cleaned(self, where: str, caption: Any) -> str:
    """The cleaned caption; ValueError if it is no text or nothing is left."""
    if not isinstance(caption, str):
      raise ValueError(f"{where} is {shown(caption)}: expected a text.")
    if caption.strip() and (problem := flaw(caption)):
      raise ValueError(f"{where} {problem}.")
    if not (cleaned := clean(caption, self._most)):
      raise ValueError(
        f"{where}, {shown(caption)}, is empty once links, markup and symbols"
        " are removed. Describe the image in words, or use the null condition."
      )
    return cleaned


def read_tokenizer(path: pathlib.Path) -> Any:
  """Reads a `tokenizers.Tokenizer` from its file; ValueError if it is none."""
  import tokenizers

  if not path.is_file():
    raise ValueError(
      f"{path}: no such file. The text encoder's own tokenizer.json belongs"
      " there; download it with the weights."
    )
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises nothing more special
    raise ValueError(
      f"{path}: no readable tokenizer ({error}). Download it again."
    ) from error
