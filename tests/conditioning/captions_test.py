"""Captions are cleaned as published, cut, padded, or refused."""

import numpy as np
import pytest
from absl import logging

from tensorar_jax.conditioning import captions
from tests.conditioning import tiny_text

# What the published cleaning makes of each.
CLEANED = {
  "A Portrait of a KANGAROO, smiling!": "a portrait of a kangaroo, smiling!",
  "a blue Porsche 356 parked.": "a blue porsche 356 parked.",
  "see https://example.com/a-b or www.shop.co/x!": "see or !",
  "<b>Bold</b> &amp; <i>italic</i>&nbsp;text": "bold italic text",
  "A%20cat+on%20a mat": "a cat on a mat",
  "this_is_my_cute_cat-photo": "this is my cute cat photo",
  "a-b and c_d": "a-b and c_d",
  "\u201cquoted\u201d \u2014 \u2018words\u2019": "quoted\" - 'words",
  "IMG_1234.jpg of @someone #123 #12345": "of",
  "jc6640 vase 20x30 cm, worldwide free shipping": "vase cm",
  "\u732b cat \u30ab\u30bf\u30ab\u30ca": "cat \u30ab\u30bf\u30ab\u30ca",
  "caf\u00c3\u00a9 & cr\u00e8me": "caf\u00e3 cr\u00e8me",
  "***SALE***...now": "sale now",
  "192.168.0.1 is home": "is home",
  '<person> walks , "alone"': 'person walks , "alone"',
}
EMPTY = "click for more, page 12, free download png images"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  tiny_text.tokenizer().save(str(path))
  return path


def test_cleaning_is_the_published_one():
  assert {raw: captions.clean(raw) for raw in CLEANED} == CLEANED


def test_ids_end_and_are_padded_on_the_right(path):
  ids, mask = captions.CaptionTokenizer(path, 6)(["A <b>red</b> cat", "mats"])
  assert ids.dtype == np.int32
  np.testing.assert_array_equal(ids, [[3, 5, 4, 1, 0, 0], [7, 8, 1, 0, 0, 0]])
  np.testing.assert_array_equal(mask, ids > 0)


def test_a_long_caption_is_cut_before_its_end_and_the_log_says_so(
  path, monkeypatch
):
  told = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *a: told.append(text % a)
  )
  tokenize = captions.CaptionTokenizer(path, 4)
  ids, mask = tokenize(["a red cat", "a red cat on a mat"])
  np.testing.assert_array_equal(ids, [[3, 5, 4, 1], [3, 5, 4, 1]])
  assert mask.all() and len(told) == 1
  assert told[0].startswith("caption 1 is longer than 4 tokens")


def test_cleaning_reads_a_bounded_length(path, monkeypatch):
  """It takes time in the square of the length: 20 MB would never end."""
  words = "a cat on a mat " * 200
  cut = captions.clean(words[: captions.MAX_LETTERS])
  assert captions.clean(words) == cut and len(cut) > 1990
  assert captions.clean("1" * 20_000_000) == ""
  told = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *a: told.append(text % a)
  )
  tokenize = captions.CaptionTokenizer(path, 9)
  markup = "<b>a cat</b>" + "<i></i>" * 10_000 + "a mat"
  ids, mask = tokenize([markup, "a cat"])
  np.testing.assert_array_equal(ids[0], ids[1])
  assert len(told) == 1 and "caption 0 is longer than" in told[0]
  assert len(told[0]) < 200
  # As many letters as can fill the tokens, where they are more.
  ids, mask = captions.CaptionTokenizer(path, 700)(["s " * 1000 + "cat"])
  assert mask.all()


def test_half_a_character_is_refused(path):
  tokenize = captions.CaptionTokenizer(path)
  with pytest.raises(ValueError, match=r"caption 1 'a \\ud83d' is no text in"):
    tokenize(["a cat", "a \ud83d"])


def test_what_an_encoder_cannot_read_it_says_beforehand(path):
  tokenize = captions.CaptionTokenizer(path)
  tokenize.check("a cat")
  for bad in ("", EMPTY, "\u732b", "a \ud83d"):
    with pytest.raises(ValueError, match="the caption"):
      tokenize.check(bad)
    with pytest.raises(ValueError, match="caption 0"):
      tokenize([bad])


@pytest.mark.parametrize(
  ("text", "words"),
  [
    (7, "7 is no text"),
    (None, "None is no text"),
    (" \n", r"' \\n' has no words"),
    ("a" * 9, "'aaaaaaaaa' has 9 letters, more than 8"),
    ("a\udce9", r"'a\\udce9' is no text in UTF-8: it holds '\\udce9'"),
  ],
)
def test_flaws_of_texts(text, words):
  assert words.replace("\\\\", "\\") == captions.flaw(text, 8)
  assert captions.flaw("\u732b") is None
  assert len(captions.flaw(["x" * 9999])) < 200


def test_captions_without_words_are_refused(path):
  tokenize = captions.CaptionTokenizer(path)
  for empty in ("", "  ", EMPTY):
    with pytest.raises(ValueError, match="caption 1, .* is empty once links"):
      tokenize(["a cat", empty])
  with pytest.raises(ValueError, match="caption 0 is 7: expected a text"):
    tokenize([7])
  for wrong in ("a cat", []):
    with pytest.raises(ValueError, match="expected a list of texts"):
      tokenize(wrong)


def test_bad_tokenizer_files_are_refused(path, tmp_path):
  with pytest.raises(ValueError, match="no such file. The text encoder's own"):
    captions.CaptionTokenizer(tmp_path / "tokenizer.json")
  broken = tmp_path / "broken.json"
  broken.write_text(path.read_text()[:-9])
  with pytest.raises(ValueError, match="broken.json: no readable tokenizer"):
    captions.CaptionTokenizer(broken)
  other = tmp_path / "other.json"
  tiny_text.tokenizer(end="<pad>").save(str(other))
  with pytest.raises(ValueError, match="ends every text with '</s>'"):
    captions.CaptionTokenizer(other)
  with pytest.raises(ValueError, match="length=1: expected at least 2"):
    captions.CaptionTokenizer(path, 1)
