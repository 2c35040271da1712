"""Which images are asked for: prompts from files and flags, their rows."""

import numpy as np
import pytest

from tensorar_jax.conditioning import conditions
from tensorar_jax.experiment.schema import (
  ClassOptions,
  ConditioningConfig,
  Stage,
  TextOptions,
)
from tensorar_jax.generation import requests
from tests import tiny


def test_a_line_is_a_prompt(tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_bytes("\ufeffa red cat\r\ntwo\tdogs\n\u2028 sun\n".encode())
  prompts = ("a red cat", "two\tdogs", "\u2028 sun")
  assert requests.read_prompts(file) == (prompts, None)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"\x89PNG\r\n\x1a\n\xff", "is not text in UTF-8"),
    (b"a cat\n\0\0\1", r"line 2 holds the control character '\\x00'.*binary"),
    (b"", "is empty"),
    (b"\n \n", "is empty"),
    (b"a cat\n\na dog\n", "line 2 is empty"),
    (b"a cat\n\n", "line 2 is empty"),
  ],
)
def test_prompt_files_that_are_refused(tmp_path, content, message):
  (tmp_path / "p").write_bytes(content)
  with pytest.raises(ValueError, match=message):
    requests.read_prompts(tmp_path / "p")
  with pytest.raises(ValueError, match="there is no such file"):
    requests.read_prompts(tmp_path / "q")


def test_images_of_a_prompt_stand_in_a_row():
  asked = requests.Request(3, prompts=("a", "b " * 40))
  labels = asked.labels(2)
  np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1])
  names = [asked.names(range(i, i + 1)) for i in (0, 5)]
  assert names == [["prompt_000_image_00.png"], ["prompt_001_image_02.png"]]
  pictures = np.zeros((6, 1, 1, 1), np.uint8)
  pictures[:, 0, 0, 0] = np.arange(6)
  grid, titles = asked.grid(pictures)
  np.testing.assert_array_equal(grid[..., 0, 0, 0], [[0, 1, 2], [3, 4, 5]])
  assert titles[0] == "a" and len(titles[1]) <= requests.TITLE
  many = requests.Request(14, prompts=tuple("abcdefghijklmno"))
  pictures = np.arange(14 * 15).astype(np.uint8).reshape(-1, 1, 1, 1)
  grid, titles = many.grid(pictures)
  assert grid.shape[:2] == (10, 10) and titles == list("abcdefghij")
  np.testing.assert_array_equal(grid[:3, 0, 0, 0, 0], [0, 14, 28])
  # Fewer than a row: a shard ends within the first prompt.
  assert many.grid(pictures[:12])[0].shape[:2] == (1, 10)
  classes = requests.Request(23).grid(pictures[:23])[0]
  assert classes.shape[:2] == (2, 10)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(prompts=()), "at least one"),
    (dict(prompts=("a", " ")), "prompt 1 is empty"),
    (dict(prompts=("a",), classes=(1,)), "one or the other"),
    (dict(prompts=("a", "b \ud83d")), "prompt 1: .* is no text in UTF-8"),
  ],
)
def test_bad_requests_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    requests.Request(3, **options)


def stage(name, options):
  return Stage(conditioning=ConditioningConfig(name, options))


def test_a_stage_is_asked_for_what_it_reads():
  prompts = requests.Request(3, prompts=("a",))
  classes = stage("class", ClassOptions(num_classes=3))
  with pytest.raises(ValueError, match="'s' makes .*'class', not from prompts"):
    requests.condition(prompts, "s", classes, None)
  text = stage("text", TextOptions())
  with pytest.raises(ValueError, match="there are no classes.*--prompts=FILE"):
    requests.condition(requests.Request(3), "s", text, None)
  with pytest.raises(ValueError, match="expected an `encoder`"):
    requests.condition(prompts, "s", text, None)
  text = stage("text", TextOptions(encoder="/nowhere/t5"))
  with pytest.raises(ValueError, match="/nowhere/t5: no such folder"):
    requests.condition(prompts, "s", text, None)


def test_numbers_of_prompts_stand_for_their_features():
  shape = (4, tiny.TEXTS.length, tiny.TEXTS.width)
  features = np.random.default_rng(0).standard_normal(shape, np.float32)
  mask = np.arange(shape[1]) < np.array([[1], [5], [3], [2]])
  rows = conditions.real_rows(features, mask)
  prompts = requests.Prompts(tiny.TEXTS, rows)
  assert prompts.num_classes == 4
  cond = prompts.encode(np.array([2, 2, 0]))
  want = tiny.TEXTS.encode((features, mask))
  for name in want:
    np.testing.assert_array_equal(cond[name], want[name][[2, 2, 0]])
