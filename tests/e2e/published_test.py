"""Published weights: import, fine-tune on codes, sample, export."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.e2e import commands


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
    return commands.run(
      f"--config=tests/e2e/tiny_published.py:{parity}",
      f"--config.data.name=codes:{root / 'data'}",
      f"--workdir={root / 'run'}",
      *flags,
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
  assert meta["source"]["file"] == "checkpoint.pt"
  assert meta["dtype"] == "float32" and meta["variant"] is None


def test_weights_can_be_kept_in_another_dtype(project):
  """Half the bytes to sample from; what is trained from them is float32."""
  import tensorar_jax as tj
  from tensorar_jax.parallel import weights

  run, workdir = project
  flags = ("--config.source_dtype=bfloat16", f"--workdir={workdir}_bf16")
  assert run("--mode=import", *flags).returncode == 0
  params = weights.split(tj.load(f"{workdir}_bf16/base"))[1]
  assert {str(p.dtype) for p in params.values()} == {"bfloat16"}
  assert run("--mode=train", *flags).returncode == 0
  params = weights.split(tj.load(f"{workdir}_bf16/tensorar"))[1]
  assert {str(p.dtype) for p in params.values()} == {"float32"}
  done = run("--mode=import", f"--workdir={workdir}_bf16")
  assert done.returncode != 0 and "source_dtype: was 'bfloat16'" in done.stderr
  done = run(
    "--mode=import", "--config.source_dtype=int8", "--workdir=/nowhere"
  )
  assert done.returncode != 0 and "int8" in done.stderr


# Dies when Orbax is about to give a checkpoint its final name.
KILLED = """
import os
from absl import app
from tensorar_jax import main

def dying(rename):
  def call(source, target, *args, **kwargs):
    if "orbax-checkpoint-tmp" in str(source):
      os._exit(9)
    return rename(source, target, *args, **kwargs)
  return call

os.rename, os.replace = dying(os.rename), dying(os.replace)
app.run(main.main, flags_parser=main.start)
"""


def test_an_interrupted_import_leaves_nothing_that_looks_complete(
  project, parity
):
  run, workdir = project
  workdir = pathlib.Path(f"{workdir}_killed")
  flags = [
    f"--config=tests/e2e/tiny_published.py:{parity}",
    f"--workdir={workdir}",
  ]
  done = subprocess.run(
    [sys.executable, "-c", KILLED, "--mode=import", *flags], cwd=commands.ROOT
  )
  assert done.returncode == 9
  written = [p.name for p in (workdir / "base" / "checkpoints").iterdir()]
  assert written and not any(name.isdigit() for name in written)
  done = run("--mode=sample", "--stage=base", f"--workdir={workdir}")
  assert done.returncode != 0 and "found no checkpoint" in done.stderr
  assert run("--mode=import", f"--workdir={workdir}").returncode == 0
  assert (workdir / "base" / "checkpoints" / "0").is_dir()


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
