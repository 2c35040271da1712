"""--mode=evaluate on the command line: a trained stage, and a file."""

import json

import numpy as np
import pytest
import torch

from tests.e2e import commands


@pytest.fixture(scope="module")
def run(parity, tmp_path_factory):
  """run(*flags) with a narrow network and a reference; `run.root`."""
  root = tmp_path_factory.mktemp("evaluate")
  arrays = np.load(parity / "evaluation" / "inception_mini_weights.npz")
  tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
  torch.save(tensors, root / "inception.pth")

  def run(*flags, reference="real.npz"):
    if "--mode=evaluate" in flags:
      flags += (
        f"--inception={root / 'inception.pth'}",
        f"--reference={root / reference}",
      )
    return commands.run(*flags)

  run.root = root
  return run


def test_a_stage_is_sampled_and_measured(run, parity):
  root = run.root
  flags = (
    f"--config=tests/e2e/tiny_factorised.py:{parity}",
    f"--workdir={root / 'run'}",
  )
  done = run("--mode=import", *flags)
  assert done.returncode == 0, done.stderr[-3000:]
  base = root / "run" / "base"
  # Its own images are the reference: the first scale must come out perfect.
  sample = ("--mode=sample", "--num_images=12", f"--output={root / 'real.npz'}")
  done = run(*flags, *sample)
  assert done.returncode == 0, done.stderr[-3000:]
  evaluate = (
    "--mode=evaluate",
    "--num_images=12",
    "--guidance=1,3:9",
    "--bootstrap=0",
  )
  done = run(*flags, *evaluate)
  assert done.returncode == 0, done.stderr[-3000:]
  records = json.loads((base / "against-real.json").read_text())
  assert list(records) == ["guidance 1", "guidance 3:9"]
  same, other = (row["metrics"] for row in records.values())
  for name in ("fid", "sfid"):
    scale = other[name]["value"]
    assert abs(same[name]["value"]) < 1e-6 * scale < scale
  assert same["precision"]["value"] == same["recall"]["value"] == 1
  manifest = records["guidance 3:9"]["manifest"]
  assert manifest["sampling"]["guidance"] == [3.0, 9.0]
  assert manifest["checkpoint"]["source"]["file"] == "model.ckpt"
  assert (base / "against-real.png").exists()
  assert "| guidance 3:9 | 12 |" in done.stdout
  # The samples as a file of their own, without a config.
  samples = base / "samples" / "001" / "samples.npz"
  file = ("--mode=evaluate", f"--samples={samples}", "--bootstrap=0")
  done = run(*file)
  assert done.returncode == 0 and "measured before" in done.stderr
  done = run(*file, reference="none.npz")
  assert done.returncode != 0 and "none.npz" in done.stderr
  assert "Traceback" not in done.stderr
