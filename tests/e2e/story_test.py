"""The whole story in small: train, kill, resume, sample, measure, report."""

import json

import numpy as np
import pytest
from flax import nnx

import tensorar_jax as tj
from studies import fewer_steps, soak
from tensorar_jax.backbones import llamagen
from tensorar_jax.experiment import config_file
from tensorar_jax.tokenizers import pixels
from tests.e2e import commands

CONFIG = "tests/e2e/tiny_digits.py"


def run(workdir, *flags):
  return commands.run(f"--config={CONFIG}", f"--workdir={workdir}", *flags)


def trace(workdir, stage) -> str:
  return (workdir / stage / "log.jsonl").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A work directory after one uninterrupted run."""
  workdir = tmp_path_factory.mktemp("story") / "run"
  done = run(workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  return workdir, done


def test_everything_promised_is_there(finished):
  workdir, done = finished
  pictures = ("samples", "refinement", "diagnostics", "curves")
  files = ("report.html", "refinement.gif")
  for name in (*(f"{picture}.png" for picture in pictures), *files):
    assert (workdir / name).stat().st_size > 1000, name
  metrics = json.loads((workdir / "metrics.json").read_text())
  assert list(metrics["models"]) == ["base", "continued", "tensorar", "drafts"]
  for row in metrics["models"].values():
    assert len(row["frechet"]["values"]) == 2
    assert row["frechet"]["mean"] == pytest.approx(
      np.mean(row["frechet"]["values"])
    )
    assert row["entropy"] > 0
  assert list(metrics["diagnostics"]) == ["tensorar", "drafts"]
  for name, found in metrics["diagnostics"].items():
    assert len(found["cross_entropy"]["own_drafts"]) == found["window"] == 4
    assert found["base_entropy"] == metrics["models"]["base"]["entropy"]
    noise = found["cross_entropy"]["training_noise"]
    assert noise[0] == metrics["models"][name]["cross_entropy"]
  assert "Given its own drafts" in (workdir / "report.html").read_text()
  assert "continued" in done.stdout and "report.html" in done.stdout
  assert "ETA" in done.stderr and "tokens/s" in done.stderr
  assert list((workdir / "tensorar" / "tensorboard").iterdir())


def test_stages_go_on_from_the_base(finished):
  import tensorar_jax as tj

  workdir, _ = finished
  model = tj.load(workdir / "tensorar")
  assert model.window == 4
  with pytest.raises(ValueError, match="'continued'"):
    tj.load(workdir)


def test_fewer_steps_are_counted_on_a_trained_stage(finished, tmp_path):
  """By the marginals that evaluation wrote; one batch with refilled places."""
  workdir, _ = finished
  stage = config_file.load(CONFIG).stages["base"]
  study = fewer_steps.Study(stage, workdir / "base", tmp_path)
  study.steps(rows=[4], names=["marginals"], count=5, batch=2)
  study.times(rows=[4], guess="marginals", count=4, batch=2, rounds=1)
  record = json.loads((tmp_path / "fewer_steps.json").read_text())
  (counted,) = record["steps"].values()
  assert counted["different_tokens"] == 0
  tokens = record["tokens"]
  assert tokens / 4 <= counted["min"] <= counted["mean"] <= tokens
  commits = np.arange(1, len(counted["commits"]) + 1) * counted["commits"]
  assert commits.sum() == 5 * (tokens - 1)  # the first is the prefix's
  assert len(record["times"]["batch 2"]["seconds"]["m=4"]) == 1
  page = (tmp_path / "fewer_steps.md").read_text()
  assert "| marginals | 0." in page and "| m=4 |" in page


def test_a_second_run_computes_nothing(finished):
  workdir, _ = finished
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("log.jsonl")}
  done = run(workdir)
  assert done.returncode == 0
  assert "base: done, 4 steps" in done.stderr
  assert "drafts: evaluated before" in done.stderr
  after = {p: p.stat().st_mtime_ns for p in workdir.rglob("log.jsonl")}
  assert before == after


def test_sampling_writes_pictures(finished):
  workdir, _ = finished
  done = run(
    workdir,
    "--mode=sample",
    "--stage=tensorar",
    "--num_images=6",
    "--classes=3,5",
  )
  assert done.returncode == 0, done.stderr[-3000:]
  folder = workdir / "tensorar" / "samples" / "000"
  names = {p.name for p in folder.iterdir()}
  assert {"000000.png", "000005.png", "grid.png", "refinement.png"} <= names


@pytest.mark.torch  # the page reads a file that PyTorch wrote
def test_the_python_of_the_page_runs(finished, parity, monkeypatch):
  """With a tiny checkpoint and tokenizer of the published layout."""
  case = parity / "llamagen" / "gpt_c2i"
  tiny = llamagen.Config(
    vocab_size=96, grid=(4, 4), width=64, num_layers=3, num_heads=4,
    num_classes=10,
  )  # fmt: skip
  monkeypatch.setitem(llamagen.VARIANTS, "B", tiny)
  made = pixels.Model(
    pixels.Config(image_size=(4, 4), levels=96), rngs=nnx.Rngs(0)
  )
  monkeypatch.setattr(tj, "import_tokenizer", lambda *_, **__: made)
  page = (commands.ROOT / "README.md").read_text().split("## From Python")[1]
  code = page.split("```python\n")[1].split("```")[0]
  for name, here in (
    ("c2i_B_256.pt", str(case / "checkpoint.pt")),
    ("runs/digits/tensorar", str(finished[0] / "tensorar")),
    ("1000", "10"),
    ("[207, 360]", "[2, 3]"),
  ):
    assert name in code
    code = code.replace(name, here)
  found = {}
  exec(code, found)
  assert found["out"].drafts.shape == (2, 16, 4, 1)
  assert found["images"].shape == (2, 4, 4, 1)
  assert found["model"].window == 4


def test_a_killed_run_continues_bit_for_bit(finished, tmp_path):
  """A small soak: kill -9 into two saves, and once at any time."""
  workdir, _ = finished
  killed, log = tmp_path / "run", tmp_path / "log"
  train = soak.train_command(CONFIG, killed)
  moments = soak.draw_moments(3, 0, seed=0, most_saves=2)
  done = [soak.end_at(moment, train, killed, log) for moment in moments]
  soak.run_to_the_end(train, log)
  assert soak.differences(workdir, killed) == [], done


def test_another_config_is_refused_and_nothing_changes(finished):
  workdir, _ = finished
  before = trace(workdir, "base")
  done = run(workdir, "--config.backbone.width=32")
  assert done.returncode != 0
  assert "backbone.width: was 16, is 32" in done.stderr
  assert "--workdir" in done.stderr
  assert trace(workdir, "base") == before


@pytest.mark.parametrize(
  "flag, words",
  [
    ("--config.backbone.wdith=3", ["wdith"]),
    ("--config.tensorar.window=0", ["tensorar.window=0", "at least 1"]),
    ("--config.stages.tensorar.tensorar.window=65", ["window=65", "64"]),
    ("--config.noise.kind=salt", ["salt", "categorical"]),
    ("--config.train.batch_size=0", ["batch_size=0", "at least 1"]),
    ("--config.data.name=cats", ["cats", "digits"]),
  ],
)
def test_a_bad_value_ends_in_one_clear_line(tmp_path, flag, words):
  done = run(tmp_path / "run", flag)
  assert done.returncode != 0
  for word in words:
    assert word in done.stderr, done.stderr[-2000:]
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "run" / "base").exists()


@pytest.mark.parametrize("words", [[], ["--mode=sample"]])
def test_help_teaches(words):
  done = commands.succeed(*words, "--help")
  assert not done.stderr
  assert "--config=configs/digits.py --mode=sample" in done.stdout
  assert "--num_images" in done.stdout
