"""Whole files, and JSON that says when it is damaged."""

import errno
import json
import os
from unittest import mock

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


LIKE = {
  "name": str,
  "sizes": [int],
  "rows": {...: {"value": float}},
  "any": None,
  "on": bool,
}
GOOD = {"name": "a", "sizes": [1], "rows": {"b": {"value": 2}}, "any": None}
GOOD |= {"on": True, "more": 1}


@pytest.mark.parametrize(
  "change, words",
  [
    ({"name": 3}, "name is '3'; expected a text"),
    ({"sizes": [1, True]}, r"sizes\[1\] is 'True'; expected an integer"),
    ({"sizes": [1, 2.5]}, r"sizes\[1\] is '2.5'; expected an integer"),
    ({"sizes": {}}, "sizes is '{}'; expected a list"),
    ({"rows": {"b": {}}}, "rows.b.value is missing; expected a number"),
    ({"rows": {"b": [1]}}, r"rows.b is '\[1\]'; expected an object"),
    ({"on": 1}, "on is '1'; expected true or false"),
  ],
)
def test_json_of_another_shape_is_named(tmp_path, change, words):
  path = tmp_path / "a.json"
  files.write_json(path, GOOD)
  assert files.read_json(path, LIKE) == GOOD
  files.write_json(path, GOOD | change)
  with pytest.raises(ValueError, match=f"a.json: {words}.* Copy it again."):
    files.read_json(path, LIKE, remedy="Copy it again.")
  files.write_json(path, [GOOD])
  with pytest.raises(ValueError, match="a.json: the content is .* an object"):
    files.read_json(path, LIKE)


def test_damaged_arrays_are_named(tmp_path):
  path = tmp_path / "a.npz"
  files.write_arrays(path, x=np.arange(100))
  assert files.read_arrays(path, ["x"])["x"].tolist() == [*range(100)]
  content = bytearray(path.read_bytes())
  for damaged in (content[:300], content[:-1], b"", b"PK"):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="a.npz: cannot be read as arrays"):
      files.read_arrays(path, ["x"])
  content[400] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match="a.npz: cannot be read as arrays"):
    files.read_arrays(path, ["x"])


def test_json_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
  path, synced = tmp_path / "a.json", []
  sync = os.fsync

  def spy(handle):
    synced.append((os.fstat(handle).st_size, path.exists()))
    sync(handle)

  monkeypatch.setattr(os, "fsync", spy)
  files.write_json(path, [1])
  assert synced == [(path.stat().st_size, False)]


@pytest.mark.parametrize("links", [True, False])
def test_the_first_of_several_writers_keeps_a_new_file(
  tmp_path, monkeypatch, links
):
  if not links:  # as on some network file systems
    refuse = OSError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=refuse))
  path = tmp_path / "a.json"
  with pytest.raises(FileExistsError), files.replacing(path, new=True) as mine:
    mine.write_text("mine")
    files.write_json(path, "theirs", new=True)
  assert files.read_json(path) == "theirs"
  assert list(tmp_path.iterdir()) == [path]


def test_json_that_is_missing(tmp_path):
  path = tmp_path / "a.json"
  assert files.read_json(path, default=None) is None
  with pytest.raises(ValueError, match="a.json: no such file. Restore"):
    files.read_json(path)
  path.write_text(json.dumps(1))
  assert files.read_json(path, default=None) == 1
