"""Image files of any size in one folder for each class."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int32

from tensorar_jax.data import images, splits

USAGE = "folder:<path> of images, a folder for each class"


def load(argument: str, split: str, data_dir: str | None) -> ImageFolder:
  """The images of `<argument>/<split>`, or of `argument` without splits."""
  del data_dir
  return open_folder(splits.split_folder(argument, split))


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """Images of any size, decoded when asked for.

  Classes and files are in torchvision's order. A broken image raises
  BrokenImageError when it is asked for.
  """

  folder: pathlib.Path
  class_names: tuple[str, ...]
  names: tuple[str, ...]  # of the files, relative to `folder`
  labels: Int32[np.ndarray, " n"]

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def image_shape(self) -> tuple[None, None, int]:
    """(h, w, C): the sizes may differ."""
    return None, None, 3

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, position: SupportsIndex, /) -> dict[str, Any]:
    image = images.decode_image(self.folder / self.names[position])
    return {"image": image, "label": self.labels[position]}

  def fingerprint(self) -> str:
    """A digest of the names: it changes where files are added or removed."""
    return hashlib.sha256("\0".join(self.names).encode()).hexdigest()


def open_folder(folder: pathlib.Path) -> ImageFolder:
  """The images of `<folder>/<class>/...`; files of other types are ignored.

  ValueError where there is no class, or a class without images.
  """
  with os.scandir(folder) as entries:
    class_names = tuple(sorted(e.name for e in entries if e.is_dir()))
  if not class_names:
    raise ValueError(
      f"{folder} has no subfolders; expected one folder of images per class"
    )
  names, counts = [], []
  for class_name in class_names:
    in_class = list(_image_names(folder, class_name))
    if not in_class:
      endings = ", ".join(images.EXTENSIONS)
      raise ValueError(
        f"{folder / class_name} holds no images ({endings}); expected some in"
        " every class folder: add them or remove the folder"
      )
    names += in_class
    counts.append(len(in_class))
  labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
  return ImageFolder(
    folder=folder,
    class_names=class_names,
    names=tuple(names),
    labels=labels,
  )


def _image_names(folder: pathlib.Path, class_name: str) -> Iterator[str]:
  """Names relative to `folder`, sorted by directory and then by file."""
  prefix = len(os.fspath(folder)) + 1
  walk = os.walk(folder / class_name, followlinks=True)
  for directory, _, files in sorted(walk):
    for file in sorted(files):
      if file.lower().endswith(images.EXTENSIONS):
        yield os.path.join(directory, file)[prefix:]
