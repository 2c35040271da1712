"""A tar of captioned images -> tokens -> training -> images of prompts."""

import json
import logging

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tensorar_jax import main
from tensorar_jax.generation import pictures
from tests import tiny, tiny_configs
from tests.conditioning import tiny_text
from tests.e2e import in_process


def config(text, tokens) -> ConfigDict:
  return ConfigDict(
    dict(
      data=dict(name=f"tokens:{tokens}"),
      tokenizer=dict(name="vq", **tiny.VQ),
      conditioning=dict(name="text", width=64, length=7, encoder=str(text)),
      backbone=dict(
        name="llamagen",
        vocab_size=11,
        grid=(3, 3),
        text_width=64,
        text_length=7,
        **tiny_configs.SIZES,
      ),
      tensorar=dict(window=2),
      optim=dict(learning_rate=1e-3),
      train=dict(batch_size=2, num_steps=2, log_every=1, checkpoint_every=2),
      sampling=dict(guidance=2.0),
      stages=dict(tensorar=dict(source=None)),
    )
  )


@pytest.fixture(scope="module")
def project(parity, tmp_path_factory):
  """A tokenized and trained project."""
  root = tmp_path_factory.mktemp("text_to_image")
  text = tiny_text.folder(parity, root / "t5")
  made = in_process.CaptionedProject(
    root,
    # Nothing is left of the last one.
    captions=3 * ["A red cat on a mat"] + ["A cat", "(###)"],
    config=config(text, root / "tokens"),
  )
  made.tokenize(recipe="flip")
  made.run("train")
  return made


def test_captions_become_features_and_are_trained_on(project):
  manifest = json.loads((project.root / "tokens" / "manifest.json").read_text())
  assert manifest["num_images"] == 4
  assert "the caption, '(###)', is empty" in manifest["skipped"][0]["reason"]
  assert manifest["text"]["dtype"] == "bfloat16"
  encoder = manifest["text"]["encoder"]
  assert len(encoder["weights"]["sha256"]) == len(encoder["tokenizer"]) == 64
  rows = (project.workdir / "tensorar" / "log.jsonl").read_text().splitlines()
  assert len(rows) == 2 and np.isfinite(json.loads(rows[1])["loss"])


def test_prompts_become_images(project, caplog):
  run, workdir, root = project.run, project.workdir, project.root
  (root / "prompts.txt").write_text("A cat\na red cat on a red mat on a cat\n")
  asked = dict(
    mode="sample", prompts=str(root / "prompts.txt"), num_images=2, seed=3
  )
  run(**asked)
  assert "caption 1 is longer than 7 tokens" in caplog.text
  folder = workdir / "tensorar" / "samples" / "000"
  names = sorted(file.name for file in folder.iterdir())
  pngs = [f"prompt_00{p}_image_0{i}.png" for p in (0, 1) for i in (0, 1)]
  assert names == sorted(
    [*pngs, "grid.png", "refinement.gif", "refinement.png", "samples.npz"]
    + ["manifest.json", "settings.json"]
  )
  stored = np.load(folder / "samples.npz")
  assert stored["arr_0"].shape == (4, 6, 6, 3)
  np.testing.assert_array_equal(stored["arr_1"], [0, 0, 1, 1])
  for name, image in zip(pngs, stored["arr_0"]):
    with Image.open(folder / name) as picture:
      np.testing.assert_array_equal(np.asarray(picture), image)
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["prompts"] == ["A cat", "a red cat on a red mat on a cat"]
  assert (manifest["num_images"], manifest["seed"]) == (2, 3)
  assert len(manifest["text_encoder"]["weights"]["sha256"]) == 64
  (folder / pngs[1]).unlink()
  caplog.set_level(logging.INFO)
  run(**asked)  # the same again: nothing is drawn, what is missing written
  assert (folder / pngs[1]).exists() and not (folder.parent / "001").exists()
  # The image depends on its prompt, seed and number alone.
  run(mode="sample", prompt=("A cat", "A cat", "a mat"), num_images=1, seed=3)
  other = np.load(folder.parent / "001" / "samples.npz")["arr_0"]
  np.testing.assert_array_equal(other[:2], stored["arr_0"][:2])


def test_what_cannot_be_drawn_is_refused(project, tmp_path):
  run, workdir, root = project.run, project.workdir, project.root
  before = sorted(workdir.rglob("*"))
  for given, words in (
    (dict(), "images from text, there are no classes.*--prompts=FILE"),
    (dict(classes=(1,)), "images from text, there are no classes"),
    (dict(prompt=("a", "#")), "caption 1, '#', is empty once"),
    (dict(prompt=("",)), "prompt 0 is empty"),
    (dict(prompt=("a",), prompts="b"), "one or the other"),
    (dict(prompts=str(root / "tars" / "000.tar")), "not text in UTF-8|control"),
    (
      dict(mode="evaluate", reference="r.npz"),
      "there are no classes.*measures",
    ),
  ):
    with pytest.raises(ValueError, match=words):
      run(**{"mode": "sample", **given})
  tokenizer = root / "t5" / "tokenizer.json"
  content = tokenizer.read_bytes()
  tokenizer.unlink()
  try:
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
      run(mode="sample", prompt=("a",))
  finally:
    tokenizer.write_bytes(content)
  assert sorted(workdir.rglob("*")) == before


def tree(folder) -> dict[str, bytes]:
  return {
    str(file.relative_to(folder)): file.read_bytes()
    for file in folder.rglob("*")
    if file.is_file() and not file.name.startswith(".")
  }


class Killed(BaseException):
  pass


@pytest.mark.parametrize("layout", ["geneval", "dpg"])
def test_prompts_of_a_benchmark_become_its_folders(
  project, tmp_path, monkeypatch, layout
):
  run = project.run
  lines = [
    json.dumps({"tag": "colors", "include": [], "prompt": prompt})
    for prompt in ("A cat", "a red mat", "a red cat")
  ]
  prompts = tmp_path / "prompts"
  if layout == "geneval":
    prompts.write_text("\n".join(lines) + "\n")
  else:
    prompts.mkdir()
    for item, line in zip("abc", lines):
      (prompts / f"{item}.txt").write_text(json.loads(line)["prompt"])
  asked = dict(mode="sample", layout=layout, prompts=str(prompts), seed=3)
  asked["batch_size"] = 4  # as in the test above: compiled already
  written, save = [], pictures.save_image

  def save_two(path, image):
    if len(written) == 2:
      raise Killed
    written.append(path)
    save(path, image)

  killed = str(tmp_path / "killed")
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(pictures, "save_image", save_two)
    run(**asked, output=killed)
  before = tree(tmp_path / "killed")
  run(**asked, output=killed)
  found = tree(tmp_path / "killed")
  assert before.items() < found.items()
  assert found.keys() - {"settings.json", "manifest.json", "samples.npz"} == (
    {"a.png", "b.png", "c.png"}
    if layout == "dpg"
    else {
      f"0000{prompt}/{name}"
      for prompt in range(3)
      for name in ("metadata.jsonl", "grid.png")
      + tuple(f"samples/000{image}.png" for image in range(4))
    }
  )
  images = np.load(tmp_path / "killed" / "samples.npz")["arr_0"]
  shown = "c.png" if layout == "dpg" else "00002/samples/0003.png"
  with Image.open(tmp_path / "killed" / shown) as picture:
    last = np.asarray(picture)[-6:, -6:]
  np.testing.assert_array_equal(last, images[11])
  if layout == "geneval":
    assert found["00001/metadata.jsonl"].decode() == lines[1]
  manifest = json.loads(found["manifest.json"])
  assert (manifest["layout"], manifest["num_images"]) == (layout, 4)
  # Nothing is drawn or written for a second time, and nothing overwritten.
  with monkeypatch.context() as patch:
    patch.setattr(pictures, "save_image", None)
    run(**asked, output=killed)
    for other in (dict(seed=4), dict(num_images=1)):
      with pytest.raises(ValueError, match="holds other samples"):
        run(**{**asked, **other}, output=killed)
    with pytest.raises(ValueError, match="a layout is of PNGs"):
      run(**asked, output=killed, pngs=False)
  assert tree(tmp_path / "killed") == found


def test_a_scorer_s_file_becomes_a_table(parity, tmp_path, capsys):
  scores = parity / "evaluation" / "layouts" / "geneval_toy_results.jsonl"
  words = [f"--scores={scores}", f"--output={tmp_path / 'out'}"]
  main.main(["main", "--mode=evaluate", *words])
  assert "| geneval_toy_results (incomplete) | 18 | 72 |" in (
    capsys.readouterr().out
  )
  assert {p.name for p in (tmp_path / "out").iterdir()} == {
    "settings.json",
    "metrics.json",
    "metrics.md",
  }
  with pytest.raises(SystemExit, match="it belongs to --mode=evaluate"):
    main.main(["main", "--mode=sample", *words])
