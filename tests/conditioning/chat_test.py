"""Prompts in their template, as ids beside those of the null prompt."""

import logging

import jax
import numpy as np
import pytest

import tensorar_jax as tj
from tensorar_jax.conditioning import chat, conditions
from tensorar_jax.experiment import build
from tensorar_jax.experiment.schema import ConditioningConfig, PromptOptions
from tests.conditioning import tiny_chat
from tests.contract import families

PROMPTS = ["a cat", " a red cat on a mat\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny_chat.folder(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def encode(folder):
  return tj.import_prompt_encoder(folder, length=15)


def names(encode, ids):
  return [encode._tokens.id_to_token(int(number)) for number in ids]


def test_a_prompt_stands_in_its_template(encode):
  ids, mask = encode(PROMPTS)
  assert ids.dtype == np.int32 and ids.shape == (2, 15, 2)
  words = names(encode, ids[0, mask[0], 0])
  assert words == [
    chat.BEGIN,
    "<|User|>",
    ":",
    "a",
    "cat",
    "\n\n",
    "<|Assistant|>",
    ":",
    chat.IMAGE,
  ]
  null = names(encode, ids[0, mask[0], 1])
  assert null == [chat.BEGIN, *[chat.PAD] * 7, chat.IMAGE]
  assert mask.sum(axis=1).tolist() == [9, 13]
  assert mask[:, -1].all()  # the image follows at once
  alone, seen = encode([PROMPTS[1].strip()])
  np.testing.assert_array_equal(alone[0, seen[0]], ids[1, mask[1]])


@pytest.mark.parametrize("begins", [True, False])
def test_the_beginning_is_there_once(tmp_path, encode, begins):
  other = tiny_chat.folder(tmp_path / "model", begins=begins)
  ids, _ = tj.import_prompt_encoder(other, length=15)(PROMPTS)
  np.testing.assert_array_equal(ids, encode(PROMPTS)[0])


def test_what_is_too_long_is_cut_off_the_text(folder, caplog):
  encode = tj.import_prompt_encoder(folder, length=11)
  caplog.set_level(logging.WARNING)
  ids, mask = encode(["a cat", "a red cat on a mat"])
  assert mask.sum(axis=1).tolist() == [9, 11]
  assert names(encode, ids[1, :, 0])[3:-3] == ["a", "red", "cat", "on", "\n\n"]
  assert "caption 1 is longer than 11 tokens" in caplog.text
  assert "caption 0" not in caplog.text


def test_prompts_become_the_condition_of_a_backbone(encode):
  """A prompt alone, in a batch, and padded to another length are the same."""
  prompts = tj.PromptConditioning(length=15, vocab_size=13)
  cond = prompts.encode(encode(PROMPTS))
  model = families.backbone("janus")
  model.check(cond)
  config = tj.SamplingConfig(temperature=0.0, guidance=2.0)
  base, rng = tj.TensorAR(model, window=1), jax.random.key(0)
  out = tj.generate(base, cond, prompts.null(cond), rng, config)
  ids, mask = encode(PROMPTS)
  short = tj.PromptConditioning(length=13, vocab_size=13)
  own = [ids[1, mask[1], 0].tolist()]
  one = short.encode(conditions.prompt_rows(own, encode.pad, length=13))
  alone = tj.generate(base, one, short.null(one), rng, config)
  np.testing.assert_array_equal(alone.tokens[0], out.tokens[1])


def test_the_conditioning_finds_its_tokenizer(folder):
  def section(encoder=str(folder), vocab_size=13):
    options = PromptOptions(length=15, vocab_size=vocab_size, encoder=encoder)
    return ConditioningConfig("prompt", options)

  encode = build.text_encoder(section())
  assert isinstance(encode, chat.PromptEncoder)
  assert (encode.width, encode.length) == (2, 15)
  with pytest.raises(ValueError, match="knows 13 tokens, the conditioning 12"):
    build.text_encoder(section(vocab_size=12))
  with pytest.raises(ValueError, match="expected an `encoder`"):
    build.text_encoder(section(encoder=""))
  with pytest.raises(ValueError, match="nowhere: no such folder"):
    build.text_encoder(section(encoder="nowhere"))


@pytest.mark.parametrize("gone", [chat.BEGIN, chat.PAD, chat.IMAGE])
def test_a_tokenizer_without_a_special_token_is_refused(tmp_path, gone):
  special = [name for name in tiny_chat.SPECIAL if name != gone]
  folder = tiny_chat.folder(tmp_path / "m", special=special, begins=False)
  with pytest.raises(ValueError, match="the tokenizer lacks") as error:
    tj.import_prompt_encoder(folder)
  assert repr(gone) in str(error.value)


def test_bad_files_prompts_and_lengths_are_refused(encode, folder, tmp_path):
  with pytest.raises(ValueError, match="tokenizer.json: no such file"):
    tj.import_prompt_encoder(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="no readable tokenizer"):
    tj.import_prompt_encoder(tmp_path)
  words = (*tiny_chat.WORDS, chat.IMAGE)  # a word, which is not read whole
  special = [n for n in tiny_chat.SPECIAL if n != chat.IMAGE]
  other = tiny_chat.folder(tmp_path / "m", special=special, words=words)
  with pytest.raises(ValueError, match="does not read '<begin_of_image>' as"):
    tj.import_prompt_encoder(other)
  with pytest.raises(ValueError, match="length=7: expected at least 8"):
    tj.import_prompt_encoder(folder, length=7)
  for prompts, words in (
    ([], "expected a list"),
    ("a cat", "expected a list"),
    (["a", " \n"], r"prompt 1 is ' \\n': expected a text"),
    ([None], "prompt 0 is None"),
    (["a", "a \ud83d"], "prompt 1 .* is no text in UTF-8"),
  ):
    with pytest.raises(ValueError, match=words):
      encode(prompts)
  encode.check("a cat")
  for bad in (" \n", "a \ud83d"):
    with pytest.raises(ValueError, match="the caption"):
      encode.check(bad)


def test_a_prompt_without_end_is_cut_before_it_is_split(encode, monkeypatch):
  seen = []
  split = encode._split
  monkeypatch.setattr(
    encode, "_split", lambda text: seen.append(len(text)) or split(text)
  )
  ids, mask = encode(["  " + "a cat " * 10**6, "a cat on a mat " * 9])
  assert mask.all() and seen[0] == 128 * 15
  np.testing.assert_array_equal(ids[0, -4:], ids[1, -4:])
