"""Any mesh of eight devices computes what one device does."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
  """The results of `meshes.py` by (family, mesh)."""
  # Unoptimised programs: most of the time goes into compiling them.
  flags = (
    f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
  )
  done = subprocess.run(
    [sys.executable, "-m", "tests.e2e.meshes"],
    cwd=ROOT,
    env={**os.environ, "XLA_FLAGS": flags},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  return {
    (row["family"], row["mesh"] and tuple(row["mesh"])): row for row in rows
  }


def trained(rows):
  return [(key, row) for key, row in rows.items() if "train" in row]


def test_training_is_the_same_on_every_mesh(rows):
  for (family, mesh), row in trained(rows):
    got, want = row["train"], rows[family, None]["train"]
    np.testing.assert_allclose(got["losses"], want["losses"], rtol=1e-5)
    assert max(got["difference"].values()) < 1e-5, (family, mesh)
    assert got["stays"], (family, mesh)


def test_images_are_the_same_on_every_mesh(rows):
  for (_, mesh), row in rows.items():
    if sample := row.get("sample"):
      assert sample["difference"]["drafts"] == 0, mesh
      assert sample["difference"]["parallel"] == 0, mesh
      assert sample["difference"]["logits"] < 1e-4, mesh
      assert sample["devices"] == (8 if mesh else 1)


def test_a_device_holds_its_part_and_no_more_from_the_start(rows):
  whole, total = rows["llamagen", None]["train"], None
  for mesh, parts in {(1, 8, 1): 8, (2, 2, 2): 4}.items():
    here, total = rows["llamagen", mesh]["train"]["bytes"]
    assert here < 1.02 * total / parts
    largest = rows["llamagen", mesh]["train"]["largest_array"]
    assert largest <= whole["largest_array"] / parts
  assert total == whole["bytes"][0]


def test_a_mesh_splits_the_attention_kernel_of_tpus(rows):
  assert rows["kernel", None]["difference"] < 2e-5


def test_a_mesh_shares_the_text_encoder_and_its_captions(rows):
  assert rows["text", None]["difference"] < 2e-5
  assert rows["text", None]["share"] < 0.35  # of its weights, for 1/4


def test_devices_that_split_rows_alone_do_not_talk_while_they_sample(rows):
  assert not any(rows["llamagen", (8, 1, 1)]["sample"]["collectives"].values())
  assert rows["llamagen", (1, 8, 1)]["sample"]["collectives"]["all-gather"]
