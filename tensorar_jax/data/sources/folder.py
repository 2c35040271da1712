"""Image files of any size in one folder for each class."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int32

from tensorar_jax.data import folders, images, leftovers, splits

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
  left_out: leftovers.Counts = dataclasses.field(default_factory=dict)

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
    name = self.names[position]
    images.check_name(name)
    image = images.decode_image(self.folder / name)
    return {"image": image, "label": self.labels[position]}

  def fingerprint(self) -> str:
    """A digest of the names: it changes where files are added or removed."""
    return hashlib.sha256(os.fsencode("\0".join(self.names))).hexdigest()


def open_folder(folder: pathlib.Path) -> ImageFolder:
  """The images of `<folder>/<class>/...`, every regular file once.

  Files of other types are counted. ValueError where there is no class, or a
  class without images.
  """
  tree = folders.Tree(folder)
  class_names, beside = tree.entries()
  for name in beside:
    tree.leave_out("beside the class folders", name)
  names, counts = [], []
  for class_name in class_names:
    files = list(tree.walk(class_name))
    chosen = [f for f in files if f.lower().endswith(images.EXTENSIONS)]
    for name in sorted({*files} - {*chosen}):
      tree.leave_out("no image by its name", name)
    names += chosen
    counts.append(len(chosen))
  leftovers.say(folder, tree.left_out)
  if not class_names:
    raise ValueError(
      f"{folder} has no subfolders; expected one folder of images per class"
    )
  if 0 in counts:
    endings = ", ".join(images.EXTENSIONS)
    raise ValueError(
      f"{folder / class_names[counts.index(0)]} holds no images ({endings});"
      " expected some in every class folder: add them or remove the folder"
    )
  labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
  return ImageFolder(
    folder=folder,
    class_names=tuple(map(leftovers.shown, class_names)),
    names=tuple(names),
    labels=labels,
    left_out=tree.left_out,
  )
