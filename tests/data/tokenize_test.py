"""Images -> shards: what is written, killed runs, sharing out, refusals."""

import dataclasses
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tensorar_jax.checkpoints import resumable
from tensorar_jax.data import images, shards, sources, tokenize
from tensorar_jax.data.sources import folder as folder_source
from tensorar_jax.data.sources import tokens as tokens_source
from tensorar_jax.nn import image_bytes
from tensorar_jax.tokenizers import pixels
from tests.tokenizers import vq_test

SIZE = 7
NUM_IMAGES = 23  # 3 classes of 8, 8 and 7, of which 4 are broken
BROKEN = {
  3: ("ant/3.png", b"not an image at all"),
  8: ("bee/0.png", b""),
  9: ("bee/1.png", None),  # cut short
  22: ("cat/6.png", b"GIF89a"),
}
OPTIONS = {"recipe": "flip", "image_size": SIZE}
OPTIONS |= {"batch_size": 6, "shard_size": 5}


def png(pixels_) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels_).save(file, "PNG")
  return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """PNGs of many sizes by class, four of them broken, and a text file."""
  root = tmp_path_factory.mktemp("images")
  draw = np.random.default_rng(0)
  for i in range(NUM_IMAGES):
    file = root / ("ant", "bee", "cat")[i // 8] / f"{i % 8}.png"
    file.parent.mkdir(exist_ok=True)
    shape = (*draw.integers(5, 40, 2), 3)
    data = png(draw.integers(0, 256, shape, dtype=np.uint8))
    if i in BROKEN:
      name, bad = BROKEN[i]
      assert name == f"{file.parent.name}/{file.name}"
      data = data[: len(data) // 2] if bad is None else bad
    file.write_bytes(data)
  (root / "bee" / "notes.txt").write_text("passed by, as it is no .png")
  return root


@pytest.fixture
def source(folder) -> folder_source.ImageFolder:
  return sources.load(f"folder:{folder}", "train")


@pytest.fixture(scope="module")
def tokenizer() -> pixels.Model:
  config = pixels.Config((SIZE, SIZE), image_channels=3, levels=19)
  return pixels.Model(config, rngs=nnx.Rngs(0))


def contents(folder: pathlib.Path) -> dict[str, str]:
  return {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(folder.iterdir())
  }


class Killed(Exception):
  pass


@dataclasses.dataclass
class Killing:
  """The same source, until it is asked for `at`."""

  source: folder_source.ImageFolder
  at: int

  def __getattr__(self, name):
    return getattr(self.source, name)

  def __len__(self):
    return len(self.source)

  def __getitem__(self, position):
    if position == self.at:
      raise Killed(position)
    return self.source[position]


@pytest.fixture(scope="module")
def whole(folder, tokenizer, tmp_path_factory) -> pathlib.Path:
  """The shards of an uninterrupted run of one process."""
  out = tmp_path_factory.mktemp("whole")
  source = sources.load(f"folder:{folder}", "train")
  tokenize.tokenize(source, tokenizer, out, **OPTIONS)
  return out


def test_every_image_is_there_in_order(source, tokenizer, whole):
  stored = sources.load(f"tokens:{whole}", "train")
  good = [i for i in range(NUM_IMAGES) if i not in BROKEN]
  assert (len(stored), stored.num_variants) == (len(good), 2)
  assert (stored.num_tokens, stored.grid) == (SIZE * SIZE, (SIZE, SIZE))
  assert stored.vocab_sizes == (19, 19, 19)
  assert stored.class_names == ("ant", "bee", "cat")
  for variant in (0, 1):
    positions = np.arange(len(good))
    batch = stored.fetch(positions, np.full(len(good), variant))
    crops = [images.center_crop(source[i]["image"], SIZE) for i in good]
    crops = np.stack(crops)[:, :, :: -1 if variant else 1]
    expected = tokenizer.encode(jnp.asarray(image_bytes.normalise(crops)))
    np.testing.assert_array_equal(batch["tokens"], expected)
    np.testing.assert_array_equal(batch["label"], np.array(good) // 8)
  stored.check()


def test_the_manifest_says_it_all(whole):
  manifest = shards.read_manifest(whole)
  assert manifest["num_images"] == NUM_IMAGES - len(BROKEN)
  assert manifest["num_skipped"] == len(BROKEN)
  skipped = [(one["position"], one["name"]) for one in manifest["skipped"]]
  assert skipped == [(i, name) for i, (name, _) in BROKEN.items()]
  assert "unknown format" in manifest["skipped"][0]["reason"]
  assert manifest["recipe"] == "flip" and manifest["crop_range"] is None
  assert manifest["image_size"] == SIZE
  assert manifest["class_names"] == ["ant", "bee", "cat"]
  assert manifest["num_classes"] == 3
  assert manifest["vocab_sizes"] == [19, 19, 19]
  assert manifest["grid"] == [SIZE, SIZE]
  assert manifest["code_type"] == "uint16"
  names = [f"tokens-{i:05d}-of-00005.array_record" for i in range(5)]
  assert manifest["shards"] == dict(zip(names, [4, 3, 5, 5, 2]))
  for name, count in manifest["shards"].items():
    assert shards.count_records(whole / name) == count
  assert not list(whole.glob("*.partial"))


def test_what_it_says_on_the_way(source, tokenizer, tmp_path, caplog):
  caplog.set_level(logging.INFO)
  tokenize.tokenize(source, tokenizer, tmp_path, **OPTIONS)
  lines = [record.getMessage() for record in caplog.records]
  broken = [line for line in lines if line.startswith("skipped: ")]
  assert len(broken) == len(BROKEN)
  for line, (name, _) in zip(broken, BROKEN.values()):
    assert f"{source.folder / name}: cannot be decoded" in line
  assert "19 images in 5 shards, 4 broken images skipped" in lines[-1]
  assert "images/s" in lines[-1]


@pytest.mark.parametrize("at", [0, 4, 6, 11, 22])
def test_a_killed_run_continues(source, tokenizer, whole, tmp_path, at):
  """Killed at the last of a shard, in the middle, and again and again."""
  if at == 22:  # which is broken, and never read as an image
    at = 21
  with pytest.raises(Killed):
    tokenize.tokenize(Killing(source, at), tokenizer, tmp_path, **OPTIONS)
  done = sorted(tmp_path.glob("*.array_record"))
  assert len(done) == at // OPTIONS["shard_size"]
  with pytest.raises(ValueError, match="manifest.json is missing"):
    tokens_source.open_shards(tmp_path)
  stamps = {file: file.stat().st_mtime_ns for file in done}
  (tmp_path / "tokens-00004-of-00005.array_record.partial").write_text("old")
  tokenize.tokenize(source, tokenizer, tmp_path, **OPTIONS)
  assert contents(tmp_path) == contents(whole)
  assert all(file.stat().st_mtime_ns == t for file, t in stamps.items())


def test_a_complete_folder_is_left_alone(source, tokenizer, whole, caplog):
  caplog.set_level(logging.INFO)
  before = contents(whole)
  manifest = tokenize.tokenize(Killing(source, 0), tokenizer, whole, **OPTIONS)
  assert manifest == shards.read_manifest(whole)
  assert contents(whole) == before
  assert "0 images in this run" in caplog.text


def test_a_lost_shard_is_made_again(source, tokenizer, tmp_path, whole):
  tokenize.tokenize(source, tokenizer, tmp_path, **OPTIONS)
  (tmp_path / "tokens-00001-of-00005.array_record").unlink()
  with pytest.raises(ValueError, match="tokens-00001.* is missing"):
    tokens_source.open_shards(tmp_path)
  tokenize.tokenize(source, tokenizer, tmp_path, **OPTIONS)
  assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("cut", ["empty", "short", "no report", "other report"])
def test_a_shard_that_is_not_whole_is_made_again(
  source, tokenizer, tmp_path, whole, cut
):
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  file = tmp_path / "tokens-00001-of-00005.array_record"
  report = file.with_suffix(".json")
  if cut == "no report":
    report.unlink()
  elif cut == "other report":
    report.write_text(report.read_text().replace("3", "4"))
  else:
    os.truncate(file, 0 if cut == "empty" else file.stat().st_size // 2)
  tokenize.tokenize(source, tokenizer, tmp_path, **OPTIONS)
  assert contents(tmp_path) == contents(whole)


def test_a_second_run_for_the_folder_is_refused(source, tokenizer, tmp_path):
  with resumable.holding(tmp_path):
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
      tokenize.tokenize(source, tokenizer, tmp_path, **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("process_count", [2, 3, 7])
def test_any_number_of_processes_writes_the_same(
  source, tokenizer, whole, tmp_path, process_count
):
  for process_index in range(process_count):
    manifest = tokenize.tokenize(
      source,
      tokenizer,
      tmp_path,
      worker=resumable.Worker(process_index, process_count),
      **OPTIONS,
    )
    last = process_index >= min(process_count, 5) - 1
    assert (manifest is not None) == last
    if process_index == 0:
      mine = [f.name[7:12] for f in tmp_path.glob("*.array_record")]
      expected = [f"{i:05d}" for i in range(0, 5, process_count)]
      assert sorted(mine) == expected
  assert contents(tmp_path) == contents(whole)


def test_the_batch_size_changes_nothing(source, tokenizer, whole, tmp_path):
  for batch_size in (1, 64):
    out = tmp_path / str(batch_size)
    options = OPTIONS | {"batch_size": batch_size}
    tokenize.tokenize(source, tokenizer, out, **options)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"recipe": "center"}, "recipe: was flip, is center"),
    ({"recipe": "ten_crop"}, "num_variants: was 2, is 10"),
    ({"shard_size": 6}, "shard_size: was 5, is 6"),
  ],
)
def test_a_folder_of_another_recipe_is_refused(
  source, tokenizer, whole, options, message
):
  before = contents(whole)
  with pytest.raises(ValueError, match=f"holds other tokens(?s:.)*{message}"):
    tokenize.tokenize(source, tokenizer, whole, **OPTIONS | options)
  assert contents(whole) == before


def test_a_folder_of_another_tokenizer_or_source_is_refused(
  source, tokenizer, whole, tmp_path
):
  other = pixels.Config((SIZE, SIZE), image_channels=3, levels=17)
  other = pixels.Model(other, rngs=nnx.Rngs(0))
  with pytest.raises(
    ValueError, match="tokenizer.config.levels: was 19, is 17"
  ):
    tokenize.tokenize(source, other, whole, **OPTIONS)
  fewer = dataclasses.replace(source, names=source.names[::-1])
  with pytest.raises(ValueError, match="source.sha256: was"):
    tokenize.tokenize(fewer, tokenizer, whole, **OPTIONS)
  # The same config with other weights.
  options = {"recipe": "center", "image_size": 12}
  config = dataclasses.replace(
    vq_test.TINY, image_channels=3, image_size=(12, 12)
  )
  model = vq_test.drawn(config)
  tokenize.tokenize(source, model, tmp_path, **options)
  model.quantizer.codebook[...] = -model.quantizer.codebook[...]
  with pytest.raises(ValueError, match="tokenizer.sha256: was"):
    tokenize.tokenize(source, model, tmp_path, **options)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"recipe": "nine_crop"}, "'nine_crop' is unknown.*center"),
    ({"image_size": 8}, r"8x8 give 64 tokens.*grid \(7, 7\)"),
    ({"recipe": "ten_crop", "crop_range": 0.5}, "at least 1"),
    ({"batch_size": 0}, "batch_size=0.*at least 1"),
    ({"shard_size": 0}, "shard_size=0.*at least 1"),
  ],
)
def test_bad_options_leave_nothing_behind(
  source, tokenizer, tmp_path, options, message
):
  out = tmp_path / "new"
  with pytest.raises(ValueError, match=message):
    tokenize.tokenize(source, tokenizer, out, **OPTIONS | options)
  assert not out.exists()


class Overflowing(pixels.Model):
  def encode(self, images):
    return super().encode(images) + 1


def test_codes_outside_the_vocabulary_are_refused(source, tokenizer, tmp_path):
  bad = Overflowing(tokenizer.config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="the tokenizer: code 19 .*0 to 18"):
    tokenize.tokenize(source, bad, tmp_path, **OPTIONS)
  assert not list(tmp_path.glob("*.array_record"))


def test_a_folder_without_any_image(tokenizer, tmp_path):
  (tmp_path / "in" / "a").mkdir(parents=True)
  (tmp_path / "in" / "a" / "1.png").write_text("no image")
  source = sources.load(f"folder:{tmp_path}/in", "")
  with pytest.raises(ValueError, match="none of the 1 images could be decoded"):
    tokenize.tokenize(source, tokenizer, tmp_path / "out", **OPTIONS)


def test_local_devices_share_the_batches(folder, whole, tmp_path):
  code = f"""
import jax
from flax import nnx
from tensorar_jax.data import sources, tokenize
from tensorar_jax.tokenizers import pixels
assert len(jax.local_devices()) == 4
config = pixels.Config(({SIZE}, {SIZE}), image_channels=3, levels=19)
tokenize.tokenize(
  sources.load("folder:{folder}", ""), pixels.Model(config, rngs=nnx.Rngs(0)),
  "{tmp_path}", **{OPTIONS}
)
"""
  flags = os.environ["XLA_FLAGS"]
  flags += " --xla_force_host_platform_device_count=4"
  env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  subprocess.run([sys.executable, "-c", code], env=env, check=True)
  assert contents(tmp_path) == contents(whole)


def test_files_are_plain_json(whole):
  for file in whole.glob("*.json"):
    assert str(whole) not in file.read_text()  # the folder may be moved
    json.loads(file.read_text())
