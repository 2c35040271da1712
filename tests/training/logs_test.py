"""The log of training: rows, TensorBoard and the console's line."""

import json

import pytest
from tensorboard.backend.event_processing import event_accumulator

from tensorar_jax.training import logs


def test_tensorboard_has_what_is_logged_and_what_it_took(tmp_path):
  log = logs.TrainLog(tmp_path / "base", num_steps=300)
  log.resume(0)
  log.write(10, {"loss": 1.5}, {"step_seconds": 0.25})
  log.write(300, {"loss": 0.5}, {"step_seconds": 0.125})
  log.close()
  rows = (tmp_path / "base" / "log.jsonl").read_text().splitlines()
  assert [json.loads(row) for row in rows] == [
    {"step": 10, "loss": 1.5},
    {"step": 300, "loss": 0.5},
  ]
  folder = str(tmp_path / "base" / "tensorboard")
  events = event_accumulator.EventAccumulator(folder).Reload()
  found = {
    name: [(event.step, event.value) for event in events.Scalars(name)]
    for name in events.Tags()["scalars"]
  }
  assert found == {
    "loss": [(10, 1.5), (300, 0.5)],
    "speed/step_seconds": [(10, 0.25), (300, 0.125)],
    "speed/eta_seconds": [(10, 72.5), (300, 0.0)],
  }


@pytest.mark.parametrize("line", ['{"st', "\0\0", "[]", '{"step": "3"}'])
def test_a_damaged_line_is_named(tmp_path, line):
  path = tmp_path / "log.jsonl"
  path.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"st')
  with pytest.raises(ValueError, match="log.jsonl, line 2: .*Remove this line"):
    logs.read_trace(path)
  path.write_text('{"step": 1, "loss": 2.0}\n{"st')  # torn by a kill
  assert logs.read_trace(path) == [{"step": 1, "loss": 2.0}]


def test_a_line_of_the_console():
  scalars = {"loss": 1.23456, "accuracy/0": 0.5, "speed/step_seconds": 0.1}
  line = logs.console_line("base", 5, 20, scalars)
  assert line == "base 5/20 (25%) loss=1.235 | 100.0 ms/step"
