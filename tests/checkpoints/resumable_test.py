"""Claims, shares and progress; `data/tokenize_test.py` kills real work."""

import json
import logging
import os
import threading
from concurrent import futures

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


def test_of_racing_claims_one_succeeds(tmp_path):
  """Each of eight has other settings for the folder."""
  gate = threading.Barrier(8)

  def claim(mine):
    entered = 0
    for i in range(25):
      gate.wait()
      try:
        resumable.claim_settings(tmp_path / str(i), {"of": mine}, "tokens")
        entered += 1
      except ValueError as error:
        assert "holds other tokens:\n  of: was" in str(error)
    return entered

  with futures.ThreadPoolExecutor(8) as pool:
    assert sum(pool.map(claim, range(8))) == 25


def test_racing_processes_get_folders_of_their_own(tmp_path):
  (tmp_path / "004").mkdir()
  with futures.ThreadPoolExecutor(8) as pool:
    made = {*pool.map(lambda _: resumable.new_folder(tmp_path), range(40))}
  assert {path.name for path in made} == {f"{i:03d}" for i in range(5, 45)}


def refused(folder, *worker, **options):
  words = f"in use by process {os.getpid()} on host .*, since"
  with (
    pytest.raises(ValueError, match=words),
    resumable.holding(folder, resumable.Worker(*worker), **options),
  ):
    pass


def test_a_folder_is_held_by_one_run(tmp_path):
  folder = tmp_path / "a" / "b"
  with resumable.holding(folder):
    refused(folder)
    with resumable.holding(folder, name="other"):
      pass
  assert list(tmp_path.iterdir()) == []  # nothing was written to it


def test_processes_of_one_run_hold_a_folder_together(tmp_path):
  share = lambda *worker: resumable.holding(tmp_path, resumable.Worker(*worker))
  with share(1, 2):
    with share(0, 2):
      refused(tmp_path)
      refused(tmp_path, 0, 2)
    # The first process has done its share; the second one works on.
    refused(tmp_path)
    refused(tmp_path, 0, 3)
    refused(tmp_path, 1, 2)
  with share(0, 1):
    pass


def test_processes_that_differ_are_named(monkeypatch):
  values = [{"a": {"seed": 0}, "b": [1]}] * 2 + [{"a": {"seed": 1}, "b": [1]}]
  monkeypatch.setattr(resumable.processes, "gather", lambda _: values)
  words = (
    "process 2 of 3 has another config than process 0:\n"
    "  a.seed: 0 in process 0, 1 in process 2\nStart all"
  )
  with pytest.raises(ValueError, match=words):
    resumable.check_same("config", values[0])
  values.pop()
  resumable.check_same("config", values[0])


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
