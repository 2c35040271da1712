"""Digits, Fashion-MNIST prepared for real, and the errors of both."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn import datasets

from tensorar_jax.data import sources
from tensorar_jax.data.sources import tfds as tfds_source

FASHION_MNIST = "tfds:fashion_mnist"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
  """Fashion-MNIST, prepared once; it takes a network or Debian's package."""
  folder = str(tmp_path_factory.mktemp("tfds"))
  sources.load(FASHION_MNIST, "test", data_dir=folder)
  return folder


@pytest.fixture
def no_network(monkeypatch):
  """Every request goes to a port where nothing listens."""
  for scheme in ("http", "https"):
    monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
  for name in ("no_proxy", "NO_PROXY"):
    monkeypatch.delenv(name, raising=False)


def builder_in(data_dir):
  return tfds.builder(
    "fashion_mnist", data_dir=data_dir, file_format="array_record"
  )


def test_to_prepare_without_tensorflow_says_what_to_install(
  tmp_path, monkeypatch
):
  builder = builder_in(str(tmp_path))
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  with pytest.raises(ValueError, match=r"pip install 'tensorar_jax\[tfds\]'"):
    tfds_source._prepare(builder)


def test_digits_are_split_evenly_and_completely():
  train, test = (sources.load("digits", split) for split in ("train", "test"))
  assert (len(train), len(test)) == (1500, 297)
  everything = datasets.load_digits()
  expected = np.array([round(level * 255 / 16) for level in range(17)])
  images = expected[everything.images.astype(int)].astype(np.uint8)
  together = np.concatenate([train.images, test.images])
  assert sorted(image.tobytes() for image in together) == sorted(
    image.tobytes() for image in images
  )
  share = np.bincount(test.labels) / np.bincount(everything.target)
  np.testing.assert_allclose(share, 297 / 1797, atol=0.006)


def test_digits_are_a_source():
  source = sources.load("digits", "test")
  assert isinstance(source, sources.Source)
  assert source.image_shape == (8, 8, 1)
  assert source.num_classes == 10
  example = source[3]
  assert example["image"].shape == (8, 8, 1)
  assert example["image"].dtype == np.uint8
  assert example["label"].dtype == np.int32
  again = sources.load("digits", "test")
  np.testing.assert_array_equal(again.images, source.images)
  assert source.images.max() == 255 and source.images.min() == 0


def test_fashion_mnist_is_complete(data_dir):
  test = sources.load(FASHION_MNIST, "test", data_dir=data_dir)
  assert isinstance(test, sources.Source)
  assert test.images.shape == (10000, 28, 28, 1)
  assert test.images.dtype == np.uint8
  assert test.image_shape == (28, 28, 1)
  assert test.num_classes == 10
  np.testing.assert_array_equal(np.bincount(test.labels), [1000] * 10)
  examples = builder_in(data_dir).as_data_source("test")
  for position in (0, 4999, 9999):
    np.testing.assert_array_equal(
      test[position]["image"], examples[position]["image"]
    )
    assert test[position]["label"] == examples[position]["label"]


def test_slices_of_a_split(data_dir):
  whole = sources.load(FASHION_MNIST, "test", data_dir=data_dir)
  for split, expected in (
    ("test[:1000]", whole.labels[:1000]),
    ("test[99%:]+test[:7]", np.r_[whole.labels[9900:], whole.labels[:7]]),
  ):
    part = sources.load(FASHION_MNIST, split, data_dir=data_dir)
    np.testing.assert_array_equal(part.labels, expected)
  train = sources.load(FASHION_MNIST, "train[:1000]", data_dir=data_dir)
  assert train.images.shape == (1000, 28, 28, 1)


def test_the_decoded_split_is_read_back(data_dir):
  split = "test[:11]"
  first = sources.load(FASHION_MNIST, split, data_dir=data_dir)
  folder = builder_in(data_dir).data_path
  cache = folder / "decoded-test%5B%3A11%5D.npz"
  assert cache.exists()
  assert not list(folder.glob("*.partial"))
  marked = first.images.copy()
  marked[0] = 7  # so that a second decoding would be noticed
  with cache.open("wb") as file:
    np.savez(file, images=marked, labels=first.labels)
  second = sources.load(FASHION_MNIST, split, data_dir=data_dir)
  np.testing.assert_array_equal(second.images, marked)
  np.testing.assert_array_equal(second.labels, first.labels)

  with cache.open("wb") as file:
    np.savez(file, images=marked[:5], labels=first.labels[:5])
  with pytest.raises(ValueError, match="5 images.*expected 11.*delete it"):
    sources.load(FASHION_MNIST, split, data_dir=data_dir)


def test_a_split_too_large_for_memory_stays_lazy(data_dir, monkeypatch):
  eager = sources.load(FASHION_MNIST, "test[:13]", data_dir=data_dir)
  monkeypatch.setattr(tfds_source, "IN_MEMORY_BYTES", 13 * 28 * 28 - 1)
  lazy = sources.load(FASHION_MNIST, "test[:13]", data_dir=data_dir)
  assert isinstance(lazy, tfds_source.LazySource)
  assert isinstance(lazy, sources.Source)
  assert len(lazy) == 13
  assert lazy.image_shape == (28, 28, 1)
  assert lazy.num_classes == 10
  for position in range(13):
    example = lazy[position]
    np.testing.assert_array_equal(example["image"], eager[position]["image"])
    assert example["label"] == eager[position]["label"]
    assert example["label"].dtype == np.int32


@pytest.mark.parametrize(
  "split", ["nope", "test[", "test[:10001]", "test[5:5]"]
)
def test_unknown_split_of_a_tfds_set(data_dir, split):
  with pytest.raises(ValueError, match="split .*fashion_mnist"):
    sources.load(FASHION_MNIST, split, data_dir=data_dir)


def test_unknown_splits_and_names_list_the_known_ones(data_dir, tmp_path):
  with pytest.raises(ValueError, match=r"'nope'.*\['train', 'test'\]"):
    sources.load(FASHION_MNIST, "nope", data_dir=data_dir)
  with pytest.raises(ValueError, match="'nope'.*'train' and 'test'"):
    sources.load("digits", "nope")
  with pytest.raises(ValueError, match="'fashion_mnist'.*digits; .*tfds:<"):
    sources.load("fashion_mnist", "train")
  with pytest.raises(ValueError, match="fashion_mnits not found(?s:.)*cifar10"):
    sources.load("tfds:fashion_mnits", "train", data_dir=str(tmp_path))


def test_a_set_without_labels_is_refused_before_any_download(
  tmp_path, no_network
):
  with pytest.raises(
    ValueError, match="coco.*needs a uint8 'image' and a class"
  ):
    sources.load("tfds:coco/2017", "train", data_dir=str(tmp_path))


def test_neither_network_nor_package(tmp_path, monkeypatch, no_network):
  monkeypatch.setattr(tfds_source, "DEBIAN_FOLDER", tmp_path / "missing")
  with pytest.raises(
    ValueError,
    match="Connect to the network.*apt-get install dataset-fashion-mnist",
  ):
    sources.load(FASHION_MNIST, "test", data_dir=str(tmp_path))


@pytest.mark.parametrize(
  ("images", "labels"),
  [
    (np.zeros((2, 3, 5, 1)), np.zeros(2, np.int32)),
    (np.zeros((2, 3, 5), np.uint8), np.zeros(2, np.int32)),
    (np.zeros((2, 3, 5, 1), np.uint8), np.zeros(3, np.int32)),
    (np.zeros((2, 3, 5, 1), np.uint8), np.zeros(2)),
  ],
)
def test_arrays_are_checked(images, labels):
  with pytest.raises(ValueError, match="expected images uint8"):
    sources.ArraySource(images, labels, num_classes=2)


NEW_SOURCE = """
from tensorar_jax.data.sources import digits

USAGE = "noise:<seed>"


def load(argument, split, data_dir):
  assert (argument, data_dir) == ("a:3", "there")
  return digits.load("", split, data_dir)
"""


def test_a_new_file_is_a_new_source(tmp_path, monkeypatch):
  (tmp_path / "noise.py").write_text(NEW_SOURCE)
  monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
  source = sources.load("noise:a:3", "test", data_dir="there")
  assert len(source) == 297
  for name in ("noise", "noise:", "digits:3", "nois:3"):
    with pytest.raises(ValueError, match="known are: .*; noise:<seed>; "):
      sources.load(name, "test")


def test_the_library_of_data_sets_is_imported_only_when_it_is_read():
  code = "import sys; from tensorar_jax.data import pipeline, sources;"
  code += " sources.load('digits', 'test');"
  code += " assert 'tensorflow_datasets' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)
