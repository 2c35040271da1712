"""The data sets of TensorFlow Datasets: `tfds:fashion_mnist`, and their slices.

TFDS decodes only a few thousand images per second, so a split that fits in
memory is decoded once and kept beside the prepared files. A larger one, or one
whose images differ in size, stays lazy. Fashion-MNIST can be prepared offline,
from the files of a Debian package.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import struct
import tempfile
import urllib.parse
import urllib.request
from typing import Any, SupportsIndex

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int32, UInt8

from tensorar_jax.data import cache, images
from tensorar_jax.data.sources import ArraySource

USAGE = "tfds:<dataset> of TensorFlow Datasets, such as tfds:fashion_mnist"
Builder = Any  # tfds.core.DatasetBuilder; its package takes seconds to import
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


@dataclasses.dataclass(frozen=True)
class LazySource:
  """Images that TFDS reads each time they are asked for.

  They are decoded here, and a broken image raises BrokenImageError: the errors
  of TFDS do not tell a broken image from a broken disk.
  """

  examples: Any  # of `builder.as_data_source`, each "image" still encoded
  image_shape: tuple[int | None, int | None, int]
  num_classes: int
  class_names: tuple[str, ...] = ()
  name: str = "images"

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, position: SupportsIndex, /) -> dict[str, Any]:
    example = self.examples[position]
    try:
      image = images.decode_image(example["image"], self.image_shape[-1])
    except images.BrokenImageError as error:
      where = f"{self.name}, example {position}{_file_name(example)}"
      raise images.BrokenImageError(where, error.reason) from error
    return {"image": image, "label": np.int32(example["label"])}


def _file_name(example: dict[str, Any]) -> str:
  """The name in brackets, if the data set keeps it under any usual key."""
  for key, value in example.items():
    if key.endswith(("file_name", "filename")) and isinstance(value, bytes):
      return f" ({value.decode(errors='replace')})"
  return ""


def load(
  dataset: str, split: str, data_dir: str | None
) -> ArraySource | LazySource:
  """A split of a data set, prepared in `data_dir` first if it is not there.

  `data_dir` None is the library's own default.
  """
  import tensorflow_datasets as tfds

  # An unknown data set is a ValueError of TFDS that lists all it has.
  builder: Builder = tfds.builder(
    dataset, data_dir=data_dir, file_format="array_record"
  )
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
  decoders = {"image": tfds.decode.SkipDecoding()}
  examples = builder.as_data_source(split, decoders=decoders)
  lazy = LazySource(
    examples=examples,
    image_shape=shape,
    num_classes=label.num_classes,
    class_names=tuple(label.names),
    name=f"{builder.info.full_name} {split}",
  )
  if None in shape or num_images * math.prod(shape) > IN_MEMORY_BYTES:
    return lazy
  cache_file = f"decoded-{urllib.parse.quote(split, '')}.npz"
  try:
    pixels, labels = _decoded(lazy, shape, builder.data_path / cache_file)
  except images.BrokenImageError as error:
    # Asking for this image raises the error; `tokenize` can do without it.
    logging.warning("decoded only when asked for: %s", error)
    return lazy
  return ArraySource(
    images=pixels,
    labels=labels,
    num_classes=lazy.num_classes,
    class_names=lazy.class_names,
  )


def _check_features(builder: Builder) -> None:
  import tensorflow_datasets as tfds

  features = dict(builder.info.features.items())
  image, label = features.get("image"), features.get("label")
  if (
    not isinstance(image, tfds.features.Image)
    or image.np_dtype != np.uint8
    or features["image"].shape[-1] not in images.MODES
    or not isinstance(label, tfds.features.ClassLabel)
  ):
    raise ValueError(
      f"data set {builder.info.full_name!r} cannot be used: it needs a uint8 "
      f"'image' and a class 'label', and 1 to 4 channels; "
      f"its features are {features}"
    )


def _prepare(builder: Builder) -> None:
  """Writes the data set into its folder, with the downloads that it needs."""
  import tensorflow_datasets as tfds

  try:
    import tensorflow as tf
  except ImportError as error:
    raise ValueError(
      f"{builder.info.full_name} is not in {builder.data_path} yet, and to"
      " prepare it takes TensorFlow: pip install 'tensorar_jax[tfds]'."
    ) from error
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
  builder: Builder, folder: pathlib.Path
) -> dict[str, Any]:
  """Options to prepare the set: from Debian's files, else by download.

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
  lazy: LazySource, shape: tuple[int, int, int], cache_file: epath.Path
) -> tuple[UInt8[np.ndarray, "n h w C"], Int32[np.ndarray, " n"]]:
  """All images and labels of a split, from the cache, written if need be."""
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
  images = np.empty((num_images, *shape), np.uint8)
  labels = np.empty(num_images, np.int32)
  for i in range(num_images):
    example = lazy[i]
    images[i], labels[i] = example["image"], example["label"]
    logging.log_every_n_seconds(
      logging.INFO, "%s: decoded %d of %d", 5, lazy.name, i + 1, num_images
    )
  cache.save(cache_file, images=images, labels=labels)
  return images, labels
