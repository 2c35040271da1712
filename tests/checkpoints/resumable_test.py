"""Claims, shares and progress; `data/tokenize_test.py` kills real work."""

import json
import logging

import pytest

from tensorar_jax.checkpoints import resumable


def test_progress_shows_rate_and_time_to_go(monkeypatch, caplog):
  caplog.set_level(logging.INFO)
  clock = iter([100.0, 110.0, 110.0])
  monkeypatch.setattr(resumable.time, "monotonic", lambda: next(clock))
  monkeypatch.setattr(
    resumable.logging,
    "log_every_n_seconds",
    lambda level, message, seconds, *args: resumable.logging.log(
      level, message, *args
    ),
  )
  progress = resumable.Progress("tokenize", total=61)
  progress.add()
  progress.add(2)
  assert (
    "tokenize: 1 of 61 images, 0.1 images/s, 10.0 minutes to go" in caplog.text
  )
  assert "3 of 61 images, 0.3 images/s, 3.2 minutes to go" in caplog.text


def test_every_shard_is_one_process_s(tmp_path):
  files = resumable.shards(tmp_path, "a-{}.bin", 23, 5)
  assert [f.name for f in files][:2] == [
    "a-00000-of-00005.bin",
    "a-00001-of-00005.bin",
  ]
  assert [i for positions in files.values() for i in positions] == [*range(23)]
  for count in (1, 2, 3, 7):
    shares = [
      resumable.to_do(files, resumable.Worker(index, count))
      for index in range(count)
    ]
    assert sorted(f for share in shares for f in share) == sorted(files)
  next(iter(files)).touch()
  assert len(resumable.to_do(files, resumable.Worker())) == 4
  assert not resumable.all_there(tmp_path, list(files))
  with pytest.raises(ValueError, match="process 2 of 2: expected 0 to 1"):
    resumable.Worker(2, 2)


def test_a_claimed_folder_is_of_one_set_of_settings(tmp_path):
  folder = tmp_path / "new" / "folder"
  settings = {"a": [1, 2], "b": {"c": None}}
  resumable.claim_settings(folder, settings, "tokens")
  resumable.claim_settings(folder, settings, "tokens")
  with pytest.raises(ValueError, match="holds other tokens:\n  b.c: was None"):
    resumable.claim_settings(folder, {"a": [1, 2], "b": {"c": 3}}, "tokens")
  assert [p.name for p in folder.iterdir()] == [resumable.SETTINGS]


def test_a_lock_is_held_by_one(tmp_path):
  for path in (tmp_path, tmp_path / "new"):
    with resumable.lock(path) as mine:
      assert mine
      with resumable.lock(path, wait=False) as too:
        assert not too
    with resumable.lock(path, wait=False) as again:
      assert again
  with (
    pytest.raises(BlockingIOError, match="of the body"),
    resumable.lock(tmp_path),
  ):
    raise BlockingIOError("of the body")


def test_json_is_changed_as_a_whole(tmp_path):
  path = tmp_path / "new" / "results.json"
  assert resumable.update_json(path, lambda old: {**old, "a": 1}) == {"a": 1}
  resumable.update_json(path, lambda old: {**old, "b": 2})
  assert json.loads(path.read_text()) == {"a": 1, "b": 2}

  def fail(old):
    raise ValueError("no")

  with pytest.raises(ValueError, match="no"):
    resumable.update_json(path, fail)
  assert json.loads(path.read_text()) == {"a": 1, "b": 2}
  assert [p.name for p in path.parent.iterdir()] == ["results.json"]
