"""Published weights: import, fine-tune on codes, sample, export."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project(parity, tmp_path_factory):
  """(run(*flags), work directory) with codes in the published layout."""
  root = tmp_path_factory.mktemp("published")
  for kind in ("codes", "labels"):
    (root / "data" / f"imagenet64_{kind}").mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(6):
    codes, label = rng.integers(0, 96, (1, 10, 16)), np.asarray([i])
    np.save(root / "data" / "imagenet64_codes" / f"{i}.npy", codes)
    np.save(root / "data" / "imagenet64_labels" / f"{i}.npy", label)

  def run(*flags):
    command = [
      *(sys.executable, "-m", "tensorar_jax.main"),
      f"--config=tests/e2e/tiny_published.py:{parity}",
      f"--config.data.name=codes:{root / 'data'}",
      f"--workdir={root / 'run'}",
    ]
    return subprocess.run(
      [*command, *flags], cwd=ROOT, capture_output=True, text=True
    )

  return run, root / "run"


def test_import_fine_tune_sample_and_export(project, parity):
  from tensorar_jax.checkpoints import torch_import

  run, workdir = project
  done = run("--mode=import")
  assert done.returncode == 0, done.stderr[-3000:]
  again = run("--mode=import")
  assert "imported before" in again.stderr

  done = run("--mode=train")
  assert done.returncode == 0, done.stderr[-3000:]
  rows = (workdir / "tensorar" / "log.jsonl").read_text().splitlines()
  assert len(rows) == 2 and np.isfinite(json.loads(rows[1])["loss"])

  done = run("--mode=sample", "--num_images=3")
  assert done.returncode == 0, done.stderr[-3000:]
  assert (workdir / "tensorar" / "samples" / "000" / "000002.png").exists()

  output = workdir / "out.pt"
  done = run("--mode=export", "--stage=base", f"--output={output}")
  assert done.returncode == 0, done.stderr[-3000:]
  source = parity / "llamagen" / "gpt_c2i" / "checkpoint.pt"
  got = torch_import.load_state_dict(output)
  want = torch_import.load_state_dict(source)
  assert set(got) == set(want)
  for name in want:
    np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(want[name]))


def test_the_manifest_traces_the_weights(project):
  import hashlib

  from tensorar_jax.checkpoints import orbax_io

  run, workdir = project
  assert run("--mode=import").returncode == 0
  meta = orbax_io.read_meta(orbax_io.find(workdir / "base"))
  source = pathlib.Path(meta["config"]["source"])
  digest = hashlib.sha256(source.read_bytes()).hexdigest()
  assert meta["source"]["sha256"] == digest


def test_a_missing_or_wrong_file_is_one_clear_line(project):
  run, workdir = project
  done = run(
    "--mode=import",
    "--config.stages.base.source=nowhere.pt",
    f"--workdir={workdir}2",
  )
  assert done.returncode != 0 and "nowhere.pt" in done.stderr
  assert "Traceback" not in done.stderr
  done = run(
    "--mode=import", "--config.backbone.width=32", f"--workdir={workdir}3"
  )
  assert done.returncode != 0 and "does not fit" in done.stderr
  assert not list(pathlib.Path(f"{workdir}3").rglob("checkpoints/[0-9]*"))
