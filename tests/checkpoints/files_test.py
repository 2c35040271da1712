"""Whole files, and JSON that says when it is damaged."""

import json

import numpy as np
import pytest

from tensorar_jax.checkpoints import files


def test_a_file_is_replaced_as_a_whole(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("old")
  with files.replacing(path, sync=True) as partial:
    partial.write_text("new")
    assert path.read_text() == "old"
    assert partial.parent == tmp_path and partial.name.startswith("a.txt.")
  assert path.read_text() == "new"
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_the_old_file_alone(tmp_path, written):
  path = tmp_path / "a.txt"
  path.write_text("old")
  with (
    pytest.raises(KeyboardInterrupt),
    files.replacing(path) as partial,
  ):
    if written:
      partial.write_text("half")
    raise KeyboardInterrupt
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_meet(tmp_path):
  path = tmp_path / "a.txt"
  with files.replacing(path) as first, files.replacing(path) as second:
    assert first != second
    first.write_text("1")
    second.write_text("2")
  assert path.read_text() == "1"


def test_json_and_arrays_come_back(tmp_path):
  value = {"a": (1, 2), "b": None}
  files.write_json(tmp_path / "a.json", value)
  again = files.read_json(tmp_path / "a.json")
  assert again == files.as_json(value) == {"a": [1, 2], "b": None}
  files.write_arrays(tmp_path / "a.npz", x=np.arange(3))
  assert np.load(tmp_path / "a.npz")["x"].tolist() == [0, 1, 2]
  assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
  "content", ["", '{"a": 1', "[" * 100_000, b"\xff\xfe{"]
)
def test_damaged_json_says_what_to_do(tmp_path, content):
  path = tmp_path / "a.json"
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError, match="a.json: cannot be read .* Restore the"):
    files.read_json(path)
  # A default is for a file that is not there, not for a damaged one.
  with pytest.raises(ValueError, match="Copy it again."):
    files.read_json(path, default={}, remedy="Copy it again.")


def test_json_that_is_missing(tmp_path):
  path = tmp_path / "a.json"
  assert files.read_json(path, default=None) is None
  with pytest.raises(ValueError, match="a.json: no such file. Restore"):
    files.read_json(path)
  path.write_text(json.dumps(1))
  assert files.read_json(path, default=None) == 1
