"""Where images come from: random access to uint8 images and their labels.

| name                | splits                       | images                 |
| ------------------- | ---------------------------- | ---------------------- |
| `digits`            | train (1500), test (297)     | scikit-learn's, 8 x 8  |
| `shapes`            | train, test                  | drawings with captions |
| `tfds:<dataset>`    | the set's own and its slices | of TensorFlow Datasets |
| `folder:<path>`     | subfolders, or none          | files, a folder a class|
| `captions:<path>`   | subfolders, or none          | files, a text for each |
| `webdataset:<path>` | subfolders, or none          | in tars, the same      |
| `codes:<path>`      | subfolders, or none          | none: published tokens |
| `tokens:<path>`     | subfolders, or none          | none: shards of tokens |
| `jsonl:<file>`      | none: any name will do       | none: lines of tokens  |

TFDS decodes only a few thousand images per second, so a split that fits in
memory is decoded once and kept beside the prepared files. A larger one, or one
whose images differ in size, stays lazy.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import struct
import tempfile
import urllib.parse
import urllib.request
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import Int32, UInt8

from tensorar_jax.data import (
  cache,
  captions,
  codes,
  images,
  jsonl,
  shapes,
  shards,
  webdataset,
)

FOLDERS = {
  "folder": images.open_folder,
  "captions": captions.open_captioned_folder,
  "webdataset": webdataset.open_webdataset,
  "codes": codes.open_code_folders,
  "tokens": shards.open_shards,
}
FILES = {"jsonl": jsonl.open_jsonl}
IN_MEMORY_BYTES = 2**31  # decoded images of one split; more stays lazy

# Debian's package `dataset-fashion-mnist` and the gzip time stamps of the files
# that upstream published under the same names.
DEBIAN_FOLDER = pathlib.Path("/usr/share/datasets/fashion-mnist")
UPSTREAM_MTIME = {
  "train-images-idx3-ubyte": 1504176606,
  "train-labels-idx1-ubyte": 1504176606,
  "t10k-images-idx3-ubyte": 1504176627,
  "t10k-labels-idx1-ubyte": 1504176627,
}


@runtime_checkable
class Source(Protocol):
  """Labelled images by position: `{"image": uint8 [h, w, C], "label": int32}`.

  Captioned ones have a text, "caption", for a label, and num_classes is None.
  `image_shape` is (h, w, C); h and w are None where images differ in size.
  """

  num_classes: int | None
  image_shape: tuple[int | None, int | None, int]

  def __len__(self) -> int: ...

  def __getitem__(self, position: SupportsIndex) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
  """Images in memory. An array of positions gives a batch, copied at once."""

  images: np.ndarray  # uint8 [n, h, w, C]
  labels: np.ndarray  # int32 [n]
  num_classes: int
  class_names: tuple[str, ...] = ()  # where they are known

  def __post_init__(self):
    images, labels = self.images, self.labels
    fit = images.ndim == 4 and labels.shape == images.shape[:1]
    if not fit or images.dtype != np.uint8 or labels.dtype != np.int32:
      raise ValueError(
        "expected images uint8 [n, h, w, C] and labels int32 [n], got "
        f"{images.dtype} {images.shape} and {labels.dtype} {labels.shape}"
      )

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(h, w, C) of every image."""
    return self.images.shape[1:]

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, position: SupportsIndex | np.ndarray) -> dict[str, Any]:
    return {"image": self.images[position], "label": self.labels[position]}


@dataclasses.dataclass(frozen=True)
class LazySource:
  """Images that TFDS reads each time they are asked for.

  They are decoded here: TFDS's own errors are the same whether an image is
  broken, which raises BrokenImageError, or the disk.
  """

  examples: Any  # of `builder.as_data_source`, each "image" still encoded
  image_shape: tuple[int | None, int | None, int]
  num_classes: int
  class_names: tuple[str, ...] = ()
  name: str = "images"

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, position: SupportsIndex) -> dict[str, Any]:
    example = self.examples[position]
    try:
      image = images.decode_image(example["image"], self.image_shape[-1])
    except images.BrokenImageError as error:
      where = f"{self.name}, example {position}{_file_name(example)}"
      raise images.BrokenImageError(where, error.reason) from error
    return {"image": image, "label": np.int32(example["label"])}


def _file_name(example: dict[str, Any]) -> str:
  """The name in brackets, if the data set keeps it, whatever it calls it."""
  for key, value in example.items():
    if key.endswith(("file_name", "filename")) and isinstance(value, bytes):
      return f" ({value.decode(errors='replace')})"
  return ""


def load(
  name: str, split: str, *, data_dir: str | None = None
) -> Source | codes.TokenSource:
  """The images, or tokens, of one split.

  `data_dir` is where TFDS keeps its data sets, its own default if None; what is
  not there yet is prepared. ValueError for a name or split that is not known,
  or data that cannot be had.
  """
  if name == "digits":
    return _load_digits(split)
  if name == "shapes":
    return shapes.open_shapes(split)
  if name.startswith("tfds:"):
    return _load_tfds(name.removeprefix("tfds:"), split, data_dir)
  kind, _, path = name.partition(":")
  if kind in FOLDERS and path:
    return FOLDERS[kind](_split_folder(pathlib.Path(path), split))
  if kind in FILES and path:
    return FILES[kind](_whole_file(pathlib.Path(path), split))
  raise ValueError(
    f"unknown data set {name!r}; known are 'digits' and 'tfds:<dataset>', such "
    "as 'tfds:fashion_mnist'; 'shapes', 'folder:<path>' of images by class, "
    "'captions:<path>' and 'webdataset:<path>' of images with captions, "
    "'codes:<path>' of published codes, 'tokens:<path>' of --mode=tokenize, "
    "'jsonl:<file>' of published lines of tokens"
  )


def _whole_file(file: pathlib.Path, split: str) -> pathlib.Path:
  """The file, for a split of any name: it holds only one."""
  if not re.fullmatch(r"\w*", split):
    raise ValueError(
      f"unknown split {split!r} of {file}: a file has no splits; expected a "
      "plain name, such as 'train': slices are not possible"
    )
  return file.expanduser()


def _split_folder(folder: pathlib.Path, split: str) -> pathlib.Path:
  """The subfolder of a split, or the folder itself where it has no splits."""
  folder = folder.expanduser()
  if not folder.is_dir():
    raise ValueError(f"{folder} is no folder; expected one that exists")
  if split and (folder / split).is_dir():
    return folder / split
  # Else a misspelt split would be the whole set, or its splits its classes.
  usual = ("train", "val", "validation", "test")
  known = [name for name in usual if (folder / name).is_dir()]
  if known or not re.fullmatch(r"\w*", split):
    raise ValueError(
      f"unknown split {split!r} of {folder}; known are "
      f"{known or 'those with a subfolder, and none has one'}; slices are not "
      "possible"
    )
  return folder


def _load_digits(split: str) -> ArraySource:
  """scikit-learn's digits, split evenly within every class without chance."""
  if split not in ("train", "test"):
    raise ValueError(
      f"unknown split {split!r} of 'digits'; known are 'train' and 'test'"
    )
  from sklearn import datasets

  digits = datasets.load_digits()
  by_class = np.argsort(digits.target, kind="stable")
  in_test = np.zeros(len(by_class), bool)
  in_test[by_class[np.arange(297) * len(by_class) // 297]] = True
  chosen = in_test if split == "test" else ~in_test
  images = np.rint(digits.images[chosen, :, :, None] * 255 / 16)
  labels = digits.target[chosen].astype(np.int32)
  return ArraySource(images.astype(np.uint8), labels, num_classes=10)


def _load_tfds(
  dataset: str, split: str, data_dir: str | None
) -> ArraySource | LazySource:
  import tensorflow_datasets as tfds

  # An unknown data set is a ValueError of TFDS that lists all it has.
  builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
  _check_features(builder)
  if not builder.is_prepared():
    _prepare(builder)
  try:
    num_images = builder.info.splits[split].num_examples
  except ValueError as error:
    raise ValueError(
      f"unknown split {split!r} of {dataset!r}; known are "
      f"{list(builder.info.splits)} and slices such as 'train[:1000]'"
    ) from error
  if not num_images:
    raise ValueError(f"split {split!r} of {dataset!r} is empty")
  shape = builder.info.features["image"].shape
  label = builder.info.features["label"]
  classes = label.num_classes, tuple(label.names)
  decoders = {"image": tfds.decode.SkipDecoding()}
  examples = builder.as_data_source(split, decoders=decoders)
  lazy = LazySource(
    examples, shape, *classes, f"{builder.info.full_name} {split}"
  )
  if None in shape or num_images * math.prod(shape) > IN_MEMORY_BYTES:
    return lazy
  cache_file = f"decoded-{urllib.parse.quote(split, '')}.npz"
  try:
    return ArraySource(
      *_decoded(lazy, builder.data_path / cache_file), *classes
    )
  except images.BrokenImageError as error:
    # Who asks for this image hears of it; `tokenize` can do without.
    logging.warning("decoded only when asked for: %s", error)
    return lazy


def _check_features(builder: Any):
  import tensorflow_datasets as tfds

  features = dict(builder.info.features.items())
  image, label = features.get("image"), features.get("label")
  if (
    not isinstance(image, tfds.features.Image)
    or image.np_dtype != np.uint8
    or image.shape[-1] not in images.MODES
    or not isinstance(label, tfds.features.ClassLabel)
  ):
    raise ValueError(
      f"data set {builder.info.full_name!r} cannot be used: it needs a uint8 "
      f"'image' and a class 'label', and 1 to 4 channels; "
      f"its features are {features}"
    )


def _prepare(builder: Any):
  """Writes the data set into its folder, downloading what it takes."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  tf.config.set_visible_devices([], "GPU")  # the accelerator is JAX's
  with tempfile.TemporaryDirectory() as folder:
    options, remedy = {}, ""
    try:
      if builder.name == "fashion_mnist":
        remedy = ", or run `apt-get install dataset-fashion-mnist`"
        options = _fashion_mnist_options(builder, pathlib.Path(folder))
      builder.download_and_prepare(**options)
    except (OSError, tfds.download.DownloadError) as error:
      raise ValueError(
        f"could not prepare {builder.info.full_name} in {builder.data_path}: "
        f"{error}. Connect to the network, pass a data_dir with it{remedy}"
      ) from error


def _fashion_mnist_options(
  builder: Any, folder: pathlib.Path
) -> dict[str, Any]:
  """How to prepare the set: offline with Debian's files, else by download.

  Debian keeps upstream's deflate streams but puts a plain gzip header of 10
  bytes in place of the published one, which TFDS's checksums cover.
  """
  import tensorflow_datasets as tfds

  files = [DEBIAN_FOLDER / f"{name}.gz" for name in UPSTREAM_MTIME]
  if not all(file.exists() for file in files):
    # Without a network TFDS would retry for minutes before it gives up.
    url = urllib.parse.urljoin(builder.URL, "t10k-labels-idx1-ubyte.gz")
    urllib.request.urlopen(url, timeout=10).close()
    return {}
  for file, (name, mtime) in zip(files, UPSTREAM_MTIME.items(), strict=True):
    header = struct.pack("<4sIBB", b"\x1f\x8b\x08\x08", mtime, 0, 3)
    upstream = header + name.encode() + b"\0" + file.read_bytes()[10:]
    (folder / file.name).write_bytes(upstream)
  config = tfds.download.DownloadConfig(
    manual_dir=folder, force_checksums_validation=True, try_download_gcs=False
  )
  return {"download_dir": folder, "download_config": config}


def _decoded(
  lazy: LazySource, cache_file: pathlib.PurePath
) -> tuple[UInt8[np.ndarray, "n h w C"], Int32[np.ndarray, " n"]]:
  """All images and labels of a split, from the cache or else into it."""
  num_images = len(lazy)
  if cache_file.exists():
    with cache_file.open("rb") as file, np.load(file) as stored:
      images, labels = stored["images"], stored["labels"]
    if not len(images) == len(labels) == num_images:
      raise ValueError(
        f"{cache_file} holds {len(images)} images and {len(labels)} labels, "
        f"expected {num_images}: delete it, it will be written anew"
      )
    return images, labels
  images = np.empty((num_images, *lazy.image_shape), np.uint8)
  labels = np.empty(num_images, np.int32)
  for i in range(num_images):
    example = lazy[i]
    images[i], labels[i] = example["image"], example["label"]
    logging.log_every_n_seconds(
      logging.INFO, "%s: decoded %d of %d", 5, lazy.name, i + 1, num_images
    )
  cache.save(cache_file, images=images, labels=labels)
  return images, labels
