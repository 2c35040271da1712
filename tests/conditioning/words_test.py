"""Word vectors are fixed, apart from one another, and of known words alone."""

import numpy as np
import pytest

from tensorar_jax.conditioning import words
from tensorar_jax.conditioning.conditions import TextConditioning
from tensorar_jax.data import shapes
from tensorar_jax.experiment import build
from tensorar_jax.experiment.schema import ConditioningConfig, TextOptions

SECTION = ConditioningConfig(
  "text", TextOptions(width=64, length=8, encoder="words")
)


def test_vectors_are_the_same_on_every_machine():
  bits = "".join("01"[int(sign > 0)] for sign in words.signs("circle", 24))
  assert bits == "111110010001110100101000"
  longer = words.signs("circle", 29)
  np.testing.assert_array_equal(longer[:24], words.signs("circle", 24))
  assert set(longer) == {-1.0, 1.0}


def test_a_row_is_a_word_and_its_place():
  encode = build.text_encoder(SECTION)
  assert (encode.width, encode.length) == (64, 8)
  (one, other), mask = encode(["A red circle.", "a circle above a square"])
  np.testing.assert_array_equal(mask.sum(axis=1), [3, 5])
  np.testing.assert_array_equal(one[0], other[0])
  place = words.signs("place 2", 64) - words.signs("place 1", 64)
  np.testing.assert_array_equal(one[2] - other[1], place)
  assert not one[3:].any() and one.dtype == np.float32


def test_no_two_captions_look_alike():
  """Another order of the same words is another text."""
  encode = build.text_encoder(SECTION)
  rng = np.random.RandomState(0)
  captions = {
    shapes.draw_prompt(category, rng).caption
    for category in shapes.CATEGORIES
    for _ in range(100)
  }
  features, mask = encode(sorted(captions))
  assert len({text.tobytes() for text in features}) == len(captions)
  table = np.concatenate([[*encode.words.values()], encode.positions])
  gram = table @ table.T / 64
  assert abs(gram - np.eye(len(gram))).max() < 0.6
  TextConditioning(64, 8).encode((features, mask))


@pytest.mark.parametrize(
  ("caption", "words"),
  [
    ("a pink circle", "'pink' is unknown; known are a, above, and, "),
    ("", "0 words: expected 1 to 8"),
    ("a red circle and a blue square and a", "9 words: expected 1 to 8"),
  ],
)
def test_what_cannot_be_read_is_refused(caption, words):
  with pytest.raises(ValueError, match=words):
    build.text_encoder(SECTION)(["a circle", caption])
  with pytest.raises(ValueError, match=words):
    build.text_encoder(SECTION).check(caption)
  build.text_encoder(SECTION).check("a circle")


def test_a_list_of_texts_is_wanted():
  with pytest.raises(ValueError, match="expected a list"):
    words.WordEncoder(shapes.WORDS)("a circle")
  with pytest.raises(ValueError, match="width=4"):
    words.WordEncoder(shapes.WORDS, width=4)
