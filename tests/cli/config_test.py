"""What the processes of a run compare before they begin."""

import dataclasses

import jax
import numpy as np

from tensorar_jax.checkpoints import resumable
from tensorar_jax.cli import config, training
from tensorar_jax.data import fingerprints, sources


def test_processes_compare_command_config_and_packages(monkeypatch):
  seen = {}
  monkeypatch.setattr(
    resumable, "check_same", lambda what, value: seen.update(value)
  )
  experiment = config.read("tests/e2e/tiny_digits.py", {})
  options = training.Train(workdir="a", process_id=1, num_processes=2)
  config.check_processes("train", options, experiment)
  assert (seen["--mode"], seen["--workdir"]) == ("train", "a")
  assert seen["packages"]["jax"] == jax.__version__
  assert seen["packages"]["python"] and len(seen["code"]) == 16
  assert seen["config"]["stages"]["base"]["seed"] == 0
  assert "--process_id" not in seen
  before = dict(seen)
  config.check_processes(
    "train", dataclasses.replace(options, process_id=0), experiment
  )
  assert seen == before


def test_the_code_is_compared(tmp_path, monkeypatch):
  (tmp_path / "cli").mkdir()
  module = tmp_path / "cli" / "config.py"
  monkeypatch.setattr(config, "__file__", str(module))
  digests = set()
  for text in ("a", "b"):
    module.write_text(text)
    digests.add(config.code_digest())
  assert len(digests) == 2


def test_the_data_are_compared():
  images = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
  labels = np.arange(5, dtype=np.int32)
  made = lambda images, labels: fingerprints.of(
    sources.ArraySource(images, labels, num_classes=5)
  )
  one = made(images, labels)
  assert one == made(images.copy(), labels) and one["images"] == 5
  others = [made(images[::-1], labels), made(images, labels[::-1])]
  others.append(made(images[:4], labels[:4]))
  assert one not in others
