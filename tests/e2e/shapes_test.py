"""Text to image in small: the command of configs/shapes_t2i.py."""

import json

import numpy as np
import pytest

from tensorar_jax.data import shapes
from tensorar_jax.data.sources.shapes import open_shapes
from tests.e2e import commands


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("shapes") / "run"
  done = commands.succeed(
    "--config=tests/e2e/tiny_shapes.py", f"--workdir={workdir}"
  )
  return workdir, done


def test_every_model_is_scored_by_category(finished):
  workdir, done = finished
  metrics = json.loads((workdir / "metrics.json").read_text())
  assert list(metrics["models"]) == ["base", "continued", "tensorar"]
  for row in metrics["models"].values():
    means = [row[name]["mean"] for name in shapes.CATEGORIES]
    assert row["overall"]["mean"] == pytest.approx(np.mean(means))
    assert len(row["overall"]["values"]) == 2
    low, high = row["overall"]["interval"]
    assert low <= row["overall"]["mean"] <= high
  through, drawings = metrics["reference"].values()
  assert drawings["overall"]["mean"] == 1.0
  assert through["overall"]["mean"] < 0.5  # after two steps
  assert "color attribution" in done.stdout


def test_the_report_shows_captions_and_looks(finished):
  workdir, _ = finished
  pictures = ("samples", "refinement", "diagnostics", "curves")
  for name in (*(f"{picture}.png" for picture in pictures), "report.html"):
    assert (workdir / name).stat().st_size > 1000, name
  stored = np.load(workdir / "tensorar" / "samples.npz")
  assert stored["images"].shape == (2 * 12, 32, 32, 3)
  test = open_shapes("test")
  labels = map(int, stored["labels"])
  names = [test.scene(label).prompt.caption for label in labels]
  assert stored["names"][stored["labels"]].tolist() == names
