"""A TFDS set, built here, some of whose images cannot be decoded."""

import io
import logging
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import nnx
from PIL import Image

from tensorar_jax.data import images, pipeline, sources, tokenize
from tensorar_jax.data.sources import tfds as tfds_source
from tensorar_jax.nn import image_bytes
from tensorar_jax.tokenizers import pixels

NUM_IMAGES, SIZE = 11, 7
BROKEN = {2: b"no image at all", 7: None}  # None is cut short
FILE_NAMES = [f"n{i:03d}.PNG" for i in range(NUM_IMAGES)]


def picture(position: int) -> np.ndarray:
  draw = np.random.default_rng(position)
  return draw.integers(0, 256, (13, 17, 3), dtype=np.uint8)


def encoded(position: int) -> bytes:
  file = io.BytesIO()
  Image.fromarray(picture(position)).save(file, "PNG")
  data = file.getvalue()
  return BROKEN.get(position, data) or data[: len(data) // 2]


class BrokenPictures(tfds.core.GeneratorBasedBuilder):
  """Pictures of one size, whether or not the set's shape says so."""

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name="any_size"),
    tfds.core.BuilderConfig(name="one_size"),
    tfds.core.BuilderConfig(name="any_channels"),
  ]

  def _info(self):
    shape = {
      "any_size": (None, None, 3),
      "one_size": (13, 17, 3),
      "any_channels": (None, None, None),
    }[self.builder_config.name]
    features = {
      "image": tfds.features.Image(shape=shape),
      "label": tfds.features.ClassLabel(names=["ant", "bee"]),
      "file_name": tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i, name in enumerate(FILE_NAMES):
      example = {"image": io.BytesIO(encoded(i)), "label": i % 2}
      yield i, example | {"file_name": name}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
  return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(params=["any_size", "one_size"])
def source(request, data_dir) -> tfds_source.LazySource:
  name = f"tfds:broken_pictures/{request.param}"
  return sources.load(name, "train", data_dir=data_dir)


def test_broken_examples_are_named(source):
  assert isinstance(source, tfds_source.LazySource)
  assert isinstance(source, sources.Source)
  for i, name in enumerate(FILE_NAMES):
    if i not in BROKEN:
      np.testing.assert_array_equal(source[i]["image"], picture(i))
      assert source[i]["label"] == i % 2
      continue
    where = rf"broken_pictures/\w+_size/1.0.0 train, example {i} \({name}\)"
    with pytest.raises(
      images.BrokenImageError, match=f"{where}: cannot be "
    ) as found:
      source[i]
    # For the same bytes as of a file, the same words.
    with pytest.raises(images.BrokenImageError) as of_bytes:
      images.decode_image(encoded(i))
    assert found.value.reason == of_bytes.value.reason
  pickle.loads(pickle.dumps(source))[0]


def test_tokenize_skips_and_lists_them(source, tmp_path, caplog):
  caplog.set_level(logging.INFO)
  config = pixels.Config((SIZE, SIZE), image_channels=3, levels=19)
  tokenizer = pixels.Model(config, rngs=nnx.Rngs(0))
  manifest = tokenize.tokenize(
    source, tokenizer, tmp_path, recipe="flip", image_size=SIZE, shard_size=4
  )
  assert manifest["num_images"] == NUM_IMAGES - len(BROKEN)
  skipped = {one["position"]: one for one in manifest["skipped"]}
  assert list(skipped) == list(BROKEN)
  for i, one in skipped.items():
    assert one["name"].endswith(f"train, example {i} ({FILE_NAMES[i]})")
    assert f"skipped: {one['name']}: cannot be decoded" in caplog.text
  assert "unknown format" in skipped[2]["reason"]
  stored = sources.load(f"tokens:{tmp_path}", "train")
  good = [i for i in range(NUM_IMAGES) if i not in BROKEN]
  batch = stored.fetch(np.arange(len(good)), np.zeros(len(good), int))
  np.testing.assert_array_equal(batch["label"], np.array(good) % 2)
  crops = np.stack([images.center_crop(picture(i), SIZE) for i in good])
  expected = tokenizer.encode(jnp.asarray(image_bytes.normalise(crops)))
  np.testing.assert_array_equal(batch["tokens"], expected)


def test_training_stops_at_them(data_dir, caplog):
  name = "tfds:broken_pictures/one_size"
  source = sources.load(name, "train", data_dir=data_dir)
  assert "decoded only when asked for" in caplog.text
  iterator = pipeline.train_iterator(source, batch_size=NUM_IMAGES, seed=0)
  with pytest.raises(ValueError, match="example [27] .*cannot be decoded"):
    next(iterator)
  good = sources.load(name, "train[:2]", data_dir=data_dir)
  assert isinstance(good, sources.ArraySource)
  np.testing.assert_array_equal(good.images, [picture(0), picture(1)])


def test_the_number_of_channels_has_to_be_known(tmp_path):
  name = "tfds:broken_pictures/any_channels"
  with pytest.raises(ValueError, match="cannot be used: .*1 to 4 channels"):
    sources.load(name, "train", data_dir=str(tmp_path))


class Examples:
  """What is no fault of an image passes through; names are not required."""

  def __len__(self):
    return 2

  def __getitem__(self, position):
    if position == 1:
      raise OSError("disk failure")
    return {"image": b"nothing", "label": 3}


def test_a_failing_disk_is_no_broken_image():
  source = tfds_source.LazySource(Examples(), (None, None, 3), num_classes=5)
  with pytest.raises(
    images.BrokenImageError, match="images, example 0: cannot"
  ):
    source[0]
  with pytest.raises(OSError, match="disk failure"):
    source[1]
