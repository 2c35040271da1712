import json
import logging as py_logging
import os
import pathlib
import re
import shutil
import signal
import time

import chex
import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging

import tensorar_jax as tj
from tensorar_jax.checkpoints import orbax_io, resumable
from tensorar_jax.data import pipeline
from tensorar_jax.experiment import build, published
from tensorar_jax.experiment import saved as saved_lib
from tensorar_jax.parallel import preemption, sharding, weights
from tensorar_jax.training import logs, loop, train_step
from tests.tiny_configs import stage


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("train") / "stage"
  loop.fit(stage(), folder)
  return folder


def layout(config):
  """Shapes and places of the state of a stage's training, on one device."""
  model = build.abstract_model(config)
  return loop.make_layout(config, model, sharding.make_mesh())[1]


def assert_same(folder, trained):
  """Parameters, EMA, optimiser, key and data position; and the log."""
  texts = [(path / "log.jsonl").read_text() for path in (folder, trained)]
  assert texts[0] == texts[1]
  (a, *rest), (b, *_) = [
    orbax_io.Checkpoints(path / "checkpoints").restore(layout(stage()))
    for path in (folder, trained)
  ]
  keys = [jax.random.key_data(state.rng) for state in (a, b)]
  chex.assert_trees_all_equal(*keys)
  chex.assert_trees_all_equal(a.replace(rng=0), b.replace(rng=0))
  assert a.ema and rest[0] == {"next_index": 6}


def saved(folder):
  return {path.name for path in (folder / "checkpoints").iterdir()}


def test_sigterm_saves_after_any_step_and_the_rest_is_the_same(
  trained, tmp_path, monkeypatch
):
  """The checkpoint of step 3 cuts a row of the log in two."""
  folder, steps, place = tmp_path / "stage", [], sharding.global_batch
  partial = folder / "checkpoints" / "1.orbax-checkpoint-tmp"
  partial.mkdir(parents=True)

  def signalled(*args):
    steps.append(len(steps) + 1)
    if steps[-1] == 3:
      os.kill(os.getpid(), signal.SIGTERM)
      os.kill(os.getpid(), signal.SIGTERM)
    return place(*args)

  before = signal.getsignal(signal.SIGTERM)
  often = stage(train=dict(checkpoint_every=1, keep=1, keep_every=2))
  with monkeypatch.context() as patch:
    patch.setattr(sharding, "global_batch", signalled)
    with pytest.raises(SystemExit) as stopped:
      loop.fit(often, folder)
  assert stopped.value.code == preemption.EXIT_CODE == 75
  assert steps == [1, 2, 3]
  assert signal.getsignal(signal.SIGTERM) == before
  assert saved(folder) == {"2", "3"}
  loop.fit(often, folder)
  assert saved(folder) == {"2", "4", "6"}
  assert_same(folder, trained)


def test_the_step_compiles_once_from_fresh_and_from_given_weights(
  trained, tmp_path, monkeypatch
):
  steps, make = [], train_step.make_train_step

  def spy(*args, **options):
    steps.append(make(*args, **options))
    return steps[-1]

  monkeypatch.setattr(train_step, "make_train_step", spy)
  loop.fit(stage(2, optim=dict(ema_decay=0.0)), tmp_path / "fresh")
  loop.fit(stage(2, init=str(trained)), tmp_path / "given")
  assert [step._cache_size() for step in steps] == [1, 1]


def test_a_slow_input_is_seen_and_steps_are_traced(tmp_path, monkeypatch):
  make, lines = pipeline.train_iterator, []

  class Slow(grain.DatasetIterator):
    def __init__(self, *args, **options):
      super().__init__()
      self.data = make(*args, **options)

    def __next__(self):
      time.sleep(0.55)
      return next(self.data)

    def get_state(self):
      return self.data.get_state()

    def set_state(self, state):
      self.data.set_state(state)

  monkeypatch.setattr(pipeline, "train_iterator", Slow)
  write = lambda text, *args: lines.append(text % args if args else text)
  for level in ("info", "warning"):
    monkeypatch.setattr(loop.logging, level, write)
  loop.fit(stage(4), tmp_path / "stage", profile=(2, 3))
  assert list((tmp_path / "stage" / "profile").rglob("*.trace.json.gz"))
  slow = [line for line in lines if "input is too slow" in line]
  assert slow and "had no batch for" in slow[0]
  (row,) = [line for line in lines if " 2/4 " in line]
  speeds = r"ms/step, .* tokens/s, .* images/s, .* TFLOP/s, waiting .*%, ETA"
  assert re.search(speeds, row)
  # The trace of an interrupted run has nothing that a clock decides.
  assert "speed" not in (tmp_path / "stage" / "log.jsonl").read_text()


def test_load_gives_the_trained_model_and_its_average(trained):
  model, average = tj.load(trained), tj.load(trained, ema=True)
  assert model.window == 3
  a, b = (weights.split(m)[1] for m in (model, average))
  path = "backbone/head/kernel"
  assert (np.asarray(a[path]) != np.asarray(b[path])).any()


def test_training_lowers_the_loss(tmp_path):
  longer = stage(
    60, train=dict(batch_size=32, log_every=10, checkpoint_every=60)
  )
  loop.fit(longer, tmp_path / "stage")
  rows = (tmp_path / "stage" / "log.jsonl").read_text().splitlines()
  rows = [json.loads(row) for row in rows]
  assert rows[-1]["ce/0"] < 0.8 * rows[0]["ce/0"]
  assert rows[-1]["ce/2"] < 0.9 * rows[0]["ce/2"]


def truncate(folder):
  """Half of every file of arrays is lost (of some, nothing is read)."""
  for file in folder.glob("state/**/d/*"):
    os.truncate(file, file.stat().st_size // 2)


def fill(folder):
  for file in (folder / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"junk")


def flip(pattern):
  """Flips a bit in the middle of the largest file of those."""

  def damage(folder):
    path = max(folder.glob(pattern), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)

  return damage


DAMAGE = {
  "a bit of the arrays": flip("state/**/d/*"),
  "a bit of the data position": flip("data/metadata"),
  "a bit of the metadata": flip("meta/metadata"),
  "truncated": truncate,
  "junk": fill,
  "no state": lambda folder: shutil.rmtree(folder / "state"),
  "no data": lambda folder: shutil.rmtree(folder / "data"),
  "no file of arrays": lambda folder: shutil.rmtree(folder / "state" / "d"),
  "no names": lambda folder: (folder / "state" / "_METADATA").unlink(),
  "an empty file": lambda folder: os.truncate(folder / "data" / "metadata", 0),
  "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_taken(
  trained, tmp_path, caplog, damage
):
  folder = tmp_path / "checkpoints"
  shutil.copytree(trained / "checkpoints", folder)
  (folder / "6.damaged").mkdir()
  damage(folder / "6")
  state, position, meta = orbax_io.Checkpoints(folder).restore(layout(stage()))
  assert state.step == 4 and position == {"next_index": 4}
  assert meta["id"].endswith("-4")
  assert saved(tmp_path) == {"4", "6.damaged", "6.damaged1"}
  assert "DAMAGED" in caplog.text
  for words in ("6 cannot be read", "continues from the one before", "/4"):
    assert words in caplog.text


def test_the_console_shows_what_this_project_says_of_checkpoints():
  logs.log_to_console()
  handler = logging.get_absl_handler()
  shown = {
    module.__name__: handler.filter(
      py_logging.LogRecord("", 30, module.__file__, 1, "DAMAGED", (), None)
    )
    for module in (orbax_io, ocp.checkpoint_manager)
  }
  handler.removeFilter(handler.filters[-1])
  assert list(map(bool, shown.values())) == [True, False]


def test_weights_with_a_flipped_bit_are_refused(trained, tmp_path):
  folder = tmp_path / "stage"
  shutil.copytree(trained, folder)
  flip("state/**/d/*")(folder / "checkpoints" / "6")
  with pytest.raises(ValueError, match="/6: .*cannot be read.*has changed"):
    tj.load(folder)
  with pytest.raises(ValueError, match="/6: .*cannot be read.*has changed"):
    loop.fit(stage(2, init=str(folder)), tmp_path / "other")


def test_a_second_run_in_the_folder_is_refused(trained, tmp_path):
  folder = tmp_path / "stage"
  shutil.copytree(trained, folder)
  partial = folder / "log.jsonl.00.partial"
  partial.touch()
  before = (folder / "log.jsonl").read_bytes()
  with (
    resumable.holding(folder, name="train.lock"),
    pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"),
  ):
    loop.fit(stage(8), folder)
  assert (folder / "log.jsonl").read_bytes() == before and partial.exists()
  assert saved(folder) == saved(trained)
  loop.fit(stage(), folder)
  assert {p.name for p in folder.iterdir()} == {
    p.name for p in trained.iterdir()
  }


def test_a_run_after_a_damaged_checkpoint_ends_as_a_sound_one(
  trained, tmp_path
):
  """It was complete; what refers to its last checkpoint still finds it."""
  folder = tmp_path / "stage"
  shutil.copytree(trained, folder)
  shutil.rmtree(folder / "checkpoints" / "6" / "meta")
  loop.fit(stage(), folder)
  assert saved(folder) == {"4", "6", "6.damaged"}
  assert_same(folder, trained)
  metas = [orbax_io.run_meta(path) for path in (folder, trained)]
  assert metas[0]["id"] == metas[1]["id"]


def test_without_a_sound_checkpoint_nothing_is_renamed(trained, tmp_path):
  folder = tmp_path / "stage"
  shutil.copytree(trained, folder)
  for step in ("4", "6"):
    fill(folder / "checkpoints" / step)
  with pytest.raises(ValueError, match="/6: .* cannot be read.*damaged"):
    loop.fit(stage(), folder)
  with pytest.raises(ValueError, match="/6: .* cannot be read"):
    tj.load(folder)
  assert saved(folder) == {"4", "6"}


def test_another_model_is_not_damage(trained, tmp_path):
  folder = tmp_path / "checkpoints"
  shutil.copytree(trained / "checkpoints", folder)
  wider = layout(stage(backbone=dict(width=32)))
  with pytest.raises(ValueError, match="not damaged.*\n.*was .*is "):
    orbax_io.Checkpoints(folder).restore(wider)
  fewer = layout(stage(tensorar=dict(window=1)))
  with pytest.raises(ValueError, match="was .*, is None"):
    orbax_io.Checkpoints(folder).restore(fewer)
  assert saved(tmp_path) == {"4", "6"}


def test_a_missing_checkpoint_is_named(tmp_path):
  with pytest.raises(ValueError, match="no such checkpoint"):
    tj.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="found no checkpoint"):
    tj.load(tmp_path)
  with pytest.raises(ValueError, match="train that stage first"):
    loop.fit(stage(init="nowhere"), tmp_path / "stage")


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(tmp_path):
  bad = stage(8, optim=dict(learning_rate=1e30, clip_norm=0.0))
  with pytest.raises(
    ValueError, match="loss of step .* expected finite numbers"
  ):
    loop.fit(bad, tmp_path / "stage")
  assert not saved(tmp_path / "stage") & {"4", "6", "8"}


def test_a_gradient_that_is_not_finite_stops_under_a_finite_loss(tmp_path):
  rows = [{"loss": 1.0, "grad_norm": 2.0}, {"loss": 1.0, "grad_norm": np.nan}]
  with pytest.raises(
    ValueError, match="step 7 is 1.0, its gradient's norm nan"
  ):
    logs.floats(rows, 7, tmp_path)


def test_another_config_in_the_folder_is_refused(trained):
  other = stage(noise=dict(kind="gaussian"))
  with pytest.raises(ValueError, match="noise.kind: was 'categorical'"):
    loop.fit(other, trained)
  # What is written how often may change.
  loop.fit(stage(train=dict(log_every=1)), trained)


def test_weights_of_another_model_are_refused(trained, tmp_path):
  wider = stage(init=str(trained), backbone=dict(width=32))
  with pytest.raises(ValueError, match="does not fit"):
    loop.fit(wider, tmp_path / "a")
  base = stage(init=str(trained), tensorar=dict(window=1))
  with pytest.raises(ValueError, match="encoder/gain|is not in this model"):
    loop.fit(base, tmp_path / "b")


@pytest.mark.parametrize(
  "section, value, words",
  [
    ("train", dict(keep_every=3), "keep_every=3 is no multiple"),
    ("train", dict(keep=0), "keep=0: expected at least 1"),
    ("train", dict(nmu_steps=3), "Did you mean 'num_steps'"),
    ("optim", dict(schedule="steep"), "steep"),
    ("optim", dict(learning_rate="high"), "learning_rate='high'"),
    ("backbone", dict(name="lamagen"), "Did you mean 'llamagen'"),
    ("backbone", dict(variant="XS"), "XXL"),
    ("backbone", dict(num_heads=3), "num_heads=3"),
    ("tokenizer", dict(name="vqq"), "Did you mean 'vq'"),
    ("conditioning", dict(name="sound"), "class"),
    ("loss", dict(condition_dropout=2.0), "condition_dropout=2.0"),
    ("noise", dict(schedule=[0.0, 0.5]), "3 slots"),
    ("tensorar", dict(windows=3), "Did you mean 'window'"),
    ("loss", dict(random_order=(5, 5)), "random_order=\\(5, 5\\)"),
    ("loss", dict(random_order=(0, 5)), "neighbours in raster order"),
  ],
)
def test_bad_settings_say_what_was_expected(section, value, words):
  with pytest.raises(ValueError, match=words):
    loop.check(stage(**{section: value}))


def test_an_export_says_what_it_leaves_out(trained, tmp_path, caplog):
  with caplog.at_level("INFO"):
    published.export_stage(trained, tmp_path / "a.safetensors")
  said = caplog.text
  assert "the 18 tensors of the backbone llamagen" in said  # 2 x 7 + 4
  assert "encoder and decoder, are left out" in said
  assert "trained, not averaged" in said and "--ema writes the average" in said
  published.export_stage(trained, tmp_path / "b.safetensors", ema=True)
  a, b = (
    (tmp_path / n).read_bytes() for n in ("a.safetensors", "b.safetensors")
  )
  assert len(a) == len(b) and a != b


def write_codes(root, numbers):
  """Published codes of 8 x 8 tokens, a file for each number."""
  for kind in ("codes", "labels"):
    (root / f"imagenet8_{kind}").mkdir(parents=True, exist_ok=True)
  for number in numbers:
    codes = np.random.default_rng(number).integers(0, 17, (1, 1, 64))
    np.save(root / "imagenet8_codes" / f"{number}.npy", codes)
    np.save(root / "imagenet8_labels" / f"{number}.npy", [number % 10])


def test_a_training_goes_on_with_the_data_it_began_with(tmp_path, caplog):
  folder, root = tmp_path / "stage", tmp_path / "data"
  write_codes(root, range(9))
  sections = dict(data=dict(name=f"codes:{root}"))
  loop.fit(stage(4, **sections), folder)
  meta = orbax_io.run_meta(folder)
  assert meta["trained_on"]["images"] == 9
  shutil.rmtree(folder / "checkpoints" / "4")
  write_codes(root, [9])  # grown
  words = "other data than codes:.*'images': 9.*'images': 10.*accept_changed"
  with pytest.raises(ValueError, match=words):
    loop.fit(stage(4, **sections), folder)
  accepted = dict(data=dict(sections["data"], accept_changed=True))
  loop.fit(stage(4, **accepted), folder)
  assert "It goes on" in caplog.text
  assert orbax_io.run_meta(folder)["trained_on"]["images"] == 10


def test_a_checkpoint_that_does_not_say_what_it_was_trained_on_goes_on():
  now = {"images": 1, "sha256": "a"}
  for before in (None, now):
    assert saved_lib.check_data(stage(), pathlib.Path("x"), before, now) == now


@pytest.mark.parametrize("objective", ["classifier", "tokenizer"])
def test_what_trains_on_images_refuses_tokens(tmp_path, objective):
  for kind, value in (("codes", np.zeros((1, 1, 64), int)), ("labels", [0])):
    (tmp_path / f"imagenet8_{kind}").mkdir()
    np.save(tmp_path / f"imagenet8_{kind}" / "0.npy", value)
  data = dict(name=f"codes:{tmp_path}")
  # The pixels have no weights; any tokenizer with some will do.
  tokenizer = dict(
    name="vq",
    image_size=(8, 8),
    channels=8,
    channel_multipliers=(1, 2),
    norm_groups=4,
    code_dim=2,
    codebook_size=17,
  )
  wrong = stage(objective=objective, data=data, tokenizer=tokenizer)
  with pytest.raises(ValueError, match=f"tokens: a {objective} is trained on"):
    loop.fit(wrong, tmp_path / "stage")
