"""Samples in files: what is written, killed runs, sharing out, refusals."""

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tensorar_jax.checkpoints import orbax_io, resumable
from tensorar_jax.generation import batches, npz, sample_files
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.tokenizers import pixels
from tensorar_jax.training import loop
from tests import tiny, tiny_configs

NUM_IMAGES, SHARD_SIZE, BATCH_SIZE = 13, 4, 3
SETTINGS = {"shard_size": SHARD_SIZE, "seed": 3}
LABELS = np.arange(NUM_IMAGES) % 5


@functools.cache
def parts():
  config = pixels.Config(image_size=(3, 3), levels=11)
  tokenizer = pixels.Model(config, rngs=nnx.Rngs(0))
  sampling = SamplingConfig(guidance=1.5)
  return batches.Sampler(tiny.wrapped(2), tiny.CLASSES, sampling, 3), tokenizer


class Killed(Exception):
  pass


def draw(labels, first, batch_size=BATCH_SIZE, die_at=None, size=None):
  """The batches of a shard; dies before the one that holds image `die_at`."""
  sampler, tokenizer = parts()
  for batch in sampler.images(tokenizer, labels, batch_size, first, size):
    if die_at is not None and first <= die_at < first + len(batch[0]):
      raise Killed
    yield batch
    first += len(batch[0])


def never(labels, first):
  raise AssertionError("nothing is left to draw")


def write(folder, how=draw, **options) -> bool:
  target = sample_files.choose_target(folder, folder, SETTINGS)
  show = functools.partial(
    sample_files._save_overview,
    folder,
    parts()[1],
    sample_files.Request(NUM_IMAGES),
  )
  return sample_files.write(
    how, LABELS, target, SETTINGS, overview=show, **options
  )


def contents(folder) -> dict[str, str]:
  return {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(folder.iterdir())
  }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The folder of an uninterrupted run of one process."""
  folder = tmp_path_factory.mktemp("whole")
  assert write(folder)
  return folder


def test_every_image_is_there_in_order(whole):
  stored = np.load(whole / "samples.npz")
  assert sorted(stored) == ["arr_0", "arr_1"]
  assert stored["arr_1"].dtype == np.int64
  np.testing.assert_array_equal(stored["arr_1"], LABELS)
  sampler, tokenizer = parts()
  (out,) = batches.generate(
    sampler.model, tiny.CLASSES, LABELS, 3, sampler.config, NUM_IMAGES
  )
  assert stored["arr_0"].dtype == np.uint8
  expected = batches.decode(tokenizer, out.tokens)
  assert expected.shape == (NUM_IMAGES, 3, 3, 1)
  np.testing.assert_array_equal(stored["arr_0"], expected)
  pictures = ("grid.png", "refinement.png", "refinement.gif")
  names = ("settings.json", "manifest.json", *pictures)
  assert contents(whole).keys() == {"samples.npz", *names}


@pytest.mark.parametrize("die_at", [0, 4, 5, 12])
def test_a_killed_run_continues(whole, tmp_path, die_at):
  with pytest.raises(Killed):
    write(tmp_path, functools.partial(draw, die_at=die_at))
  done = sorted(tmp_path.glob("images-*.npy"))
  assert len(done) == die_at // SHARD_SIZE
  assert not list(tmp_path.glob("*.partial"))
  stamps = {file: file.stat().st_mtime_ns for file in done}
  drawn = []

  def counting(labels, first):
    assert all(f.stat().st_mtime_ns == t for f, t in stamps.items())
    drawn.append(first)
    return draw(labels, first, batch_size=2)

  assert write(tmp_path, counting)
  assert drawn == list(range(len(done) * SHARD_SIZE, NUM_IMAGES, SHARD_SIZE))
  assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("step", ["join_shards", "write_json"])
def test_killed_while_it_is_put_together(whole, tmp_path, monkeypatch, step):
  def die(*args):
    raise Killed

  target = sample_files.choose_target(tmp_path, tmp_path, SETTINGS)
  with monkeypatch.context() as patch:
    where = {"join_shards": npz, "write_json": sample_files.files}[step]
    patch.setattr(where, step, die)
    with pytest.raises(Killed):
      write(tmp_path)
  assert len(list(tmp_path.glob("images-*.npy"))) == 4 and not target.complete
  # Nothing is left to draw, and one process only does the rest.
  assert not write(tmp_path, never, worker=resumable.Worker(1, 2))
  assert write(tmp_path, never, worker=resumable.Worker(0, 2))
  assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_any_number_of_processes_writes_the_same(whole, tmp_path, count):
  for index in range(count):
    done = write(tmp_path, worker=resumable.Worker(index, count))
    assert done == (index == min(count, 4) - 1)
  assert contents(tmp_path) == contents(whole)


def test_two_processes_may_finish_at_the_same_moment(
  whole, tmp_path, monkeypatch
):
  """The other one completes the run, shards gone, while this one copies."""
  join_shards = npz.join_shards

  def overtaken(path, shards, labels):
    monkeypatch.setattr(npz, "join_shards", join_shards)
    assert write(tmp_path)
    return join_shards(path, shards, labels)

  monkeypatch.setattr(npz, "join_shards", overtaken)
  write(tmp_path)
  np.load(tmp_path / "samples.npz")
  names = contents(tmp_path).keys() - contents(whole).keys()
  assert all(name.endswith(".partial") for name in names)


@pytest.mark.parametrize("name", ["x**", "**", "a[b]?{c}%s"])
def test_a_name_is_no_pattern(tmp_path, name):
  other = tmp_path / "xy.npz.123.partial"
  other.touch()
  output = tmp_path / f"{name}.npz"
  target = sample_files.choose_target(output, tmp_path, SETTINGS)
  images = lambda labels, first: iter(
    [(np.full((len(labels), 3, 3, 1), first, np.uint8), None)]
  )
  assert sample_files.write(images, LABELS, target, SETTINGS)
  assert target.npz == output and len(np.load(output)["arr_0"]) == NUM_IMAGES
  assert sample_files.choose_target(output, tmp_path, SETTINGS).complete
  assert other.exists()


def test_a_complete_folder_is_left_alone(whole):
  before = {file: file.stat().st_mtime_ns for file in whole.iterdir()}
  assert write(whole, never)
  assert not write(whole, never, worker=resumable.Worker(1, 2))
  assert before == {file: file.stat().st_mtime_ns for file in whole.iterdir()}


# Eight devices draw all but the end; then the process dies at once.
KILLED = """
import os, pathlib, sys, jax
from tests.generation import sample_files_test as test
assert jax.local_device_count() == 8
def dying(labels, first):
  for batch in test.draw(labels, first):
    if first == 12:
      os._exit(9)
    yield batch
test.write(pathlib.Path(sys.argv[1]), dying)
"""


def test_eight_devices_and_one_draw_the_same_after_a_real_kill(whole, tmp_path):
  flags = os.environ["XLA_FLAGS"]
  flags += " --xla_force_host_platform_device_count=8"
  env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], env=env)
  assert done.returncode == 9
  assert len(list(tmp_path.glob("images-*.npy"))) == 3
  assert len(list(tmp_path.glob("images-*.partial"))) == 1
  assert write(tmp_path)
  assert contents(tmp_path) == contents(whole)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
  labels, size = np.arange(3000) % 5, (128, 128)
  target = sample_files.choose_target(tmp_path, tmp_path, SETTINGS)
  settings = {"shard_size": 500}
  how = functools.partial(draw, batch_size=100, size=size)
  list(how(labels[:100], 0))  # compiles
  tracemalloc.start()
  sample_files.write(how, labels, target, settings)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert target.npz.stat().st_size > 3000 * 128 * 128
  assert peak < 12e6  # of 49e6; two batches, 3.2e6, and a block of 4.2e6


@pytest.mark.parametrize("num_images", [10, 13, 3])
def test_classes_are_balanced(num_images):
  request = sample_files.Request(num_images)
  labels = request.labels(5)
  assert labels.dtype == np.int64 and labels.shape == (num_images,)
  counts = np.bincount(labels, minlength=5)
  assert counts.max() - counts.min() <= (num_images % 5 > 0)
  chosen = sample_files.Request(num_images, classes=(4, 2)).labels(5)
  np.testing.assert_array_equal(chosen[:3], [4, 2, 4])
  assert abs((chosen == 4).sum() - (chosen == 2).sum()) <= 1


def test_what_is_not_of_a_run_is_never_touched(tmp_path):
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "grid.png").write_text("mine")
  (tmp_path / "a.npz").write_text("mine")
  for output in ("folder", "a.npz"):
    with pytest.raises(ValueError, match="is there already, and not from"):
      sample_files.choose_target(tmp_path / output, tmp_path, SETTINGS)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "folder"]
  with pytest.raises(ValueError, match="2 processes.*--output"):
    sample_files.choose_target(None, tmp_path, SETTINGS, process_count=2)


@pytest.mark.parametrize(
  "options", [dict(num_images=0), dict(resize=0), dict(classes=())]
)
def test_bad_requests_are_refused(options):
  with pytest.raises(ValueError, match="expected at least|expected 1 to 4096"):
    sample_files.Request(**options)


# --- from a trained stage ---------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(stages, work directory) of a stage on the digits."""
  workdir = tmp_path_factory.mktemp("run")
  stage = tiny_configs.stage(2, sampling=dict(guidance=1.5, top_k=7))
  loop.fit(stage, workdir / "wrapped")
  return {"wrapped": stage}, workdir


def test_the_same_command_finds_its_folder_again(trained):
  stages, workdir = trained
  request = sample_files.Request(11, classes=(3, 5), resize=9)
  target = sample_files.sample(stages, workdir, request)
  assert target.folder == workdir / "wrapped" / "samples" / "000"
  images = np.load(target.npz)["arr_0"]
  assert images.shape == (11, 9, 9, 1)
  np.testing.assert_array_equal(
    np.load(target.npz)["arr_1"], np.resize([3, 5], 11)
  )
  for i in range(11):
    with Image.open(target.folder / f"{i:06d}.png") as picture:
      np.testing.assert_array_equal(np.asarray(picture), images[i, ..., 0])
  before = contents(target.folder)
  assert {"grid.png", "refinement.png"} < before.keys()
  (target.folder / "000007.png").unlink()
  assert sample_files.sample(stages, workdir, request) == target
  assert contents(target.folder) == before
  other = sample_files.Request(11, classes=(3, 5), resize=9, seed=1)
  other = sample_files.sample(stages, workdir, other, pngs=False)
  assert other.folder.name == "001"
  assert not (other.folder / "000000.png").exists()
  assert (np.load(other.npz)["arr_0"] != images).any()


def test_the_manifest_traces_every_image(trained, tmp_path):
  stages, workdir = trained
  output = tmp_path / "new" / "a.npz"
  request = sample_files.Request(13)
  target = sample_files.sample(stages, workdir, request, output=output)
  assert (target.npz, target.folder) == (output, output.with_suffix(""))
  manifest = json.loads((target.folder / "manifest.json").read_text())
  settings = json.loads((target.folder / "settings.json").read_text())
  assert settings.items() <= manifest.items()
  digest = hashlib.sha256(output.read_bytes()).hexdigest()
  assert (manifest["npz"], manifest["sha256"]) == ("a.npz", digest)
  assert manifest["shape"] == [13, 8, 8, 1]
  assert manifest["images_per_class"] == [1, 2]
  assert (manifest["stage"], manifest["num_images"]) == ("wrapped", 13)
  assert (manifest["seed"], manifest["resize"]) == (0, None)
  assert (manifest["classes"], manifest["num_classes"]) == (None, 10)
  assert manifest["sampling"]["guidance"] == 1.5
  assert manifest["sampling"]["top_k"] == 7
  meta = orbax_io.read_meta(orbax_io.find(workdir / "wrapped"))
  assert manifest["checkpoint"]["id"] == meta["id"]
  assert manifest["checkpoint"]["config"] == meta["config"]
  assert manifest["checkpoint"]["step"] == 2 and manifest["checkpoint"]["ema"]
  assert manifest["tokenizer"]["config"]["levels"] == 17
  assert {"jax", "jaxlib", "flax", "device"} <= manifest["software"].keys()


def test_a_finished_file_that_has_changed_is_not_taken_for_one(
  trained, tmp_path
):
  stages, workdir = trained
  request = sample_files.Request(3)
  draw = lambda: sample_files.sample(stages, workdir, request, output=tmp_path)
  target = draw()
  before = contents(tmp_path)
  content = bytearray(target.npz.read_bytes())
  content[len(content) // 3] ^= 16
  target.npz.write_bytes(content)
  with pytest.raises(ValueError, match="samples.npz is damaged: its sha256 is"):
    draw()
  target.npz.unlink()
  draw()
  assert contents(tmp_path) == before
  manifest = tmp_path / "manifest.json"
  text = manifest.read_text()
  for cut in (text[:100], "[]", text.replace('"sha256": "', '"sha": "')):
    manifest.write_text(cut)
    with pytest.raises(ValueError, match="manifest.json: .* Remove it to have"):
      draw()


def test_a_second_run_for_the_folder_is_refused(trained, tmp_path):
  stages, workdir = trained
  request = sample_files.Request(3)
  draw = lambda: sample_files.sample(stages, workdir, request, output=tmp_path)
  with resumable.holding(tmp_path):
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
      draw()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
  draw()
  before = contents(tmp_path)
  # What killed runs have left goes when the command is given again.
  (tmp_path / "00000" / "samples").mkdir(parents=True)
  for name in ("000001.png.00.partial", f"00000/samples/.{'ab' * 16}.png"):
    (tmp_path / name).touch()
  draw()
  assert list((tmp_path / "00000" / "samples").iterdir()) == []
  (tmp_path / "00000" / "samples").rmdir()
  (tmp_path / "00000").rmdir()
  assert contents(tmp_path) == before


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(seed=1), "seed: was 0, is 1"),
    (dict(num_images=14), "num_images: was 13, is 14"),
    (dict(classes=(1,)), r"classes: was None, is \[1\]"),
    (dict(resize=7), "resize: was None, is 7"),
  ],
)
def test_a_folder_of_other_samples_is_refused(trained, tmp_path, change, words):
  stages, workdir = trained
  options = dict(num_images=13)
  target = sample_files.sample(
    stages, workdir, sample_files.Request(**options), output=tmp_path
  )
  before = contents(tmp_path)
  with pytest.raises(ValueError, match=f"holds other samples(?s:.)*{words}"):
    other = sample_files.Request(**options | change)
    sample_files.sample(stages, workdir, other, output=tmp_path)
  hotter = dataclasses.replace(
    stages["wrapped"], sampling=SamplingConfig(temperature=2.0)
  )
  hotter = {"wrapped": hotter}
  with pytest.raises(ValueError, match="sampling.guidance: was 1.5, is 1.0"):
    request = sample_files.Request(**options)
    sample_files.sample(hotter, workdir, request, output=tmp_path)
  assert contents(tmp_path) == before and target.complete


def test_an_unknown_class_leaves_nothing_behind(trained, tmp_path):
  stages, workdir = trained
  request = sample_files.Request(3, classes=(2, 10))
  with pytest.raises(ValueError, match="class id 10 is out of range"):
    sample_files.sample(stages, workdir, request, output=tmp_path / "new")
  assert not (tmp_path / "new").exists()
