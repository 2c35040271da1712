"""Where images and tokens come from: one module for each kind of source.

`load("folder:/data/images", "train")` calls `load` of the module `folder` here.
To add a kind, add a file; its name is what stands before the colon. It has

  USAGE                            a few words for the list of what is known
  load(argument, split, data_dir)  -> Source or TokenSource

`argument` is what stands after the colon, "" if there is none. Training,
tokenization and evaluation call `load`; `pipeline` makes batches of the result.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from tensorar_jax import paths
from tensorar_jax.data.codes import TokenSource


@runtime_checkable
class Source(Protocol):
  """Labelled images by position: `{"image": uint8 [h, w, C], "label": int32}`.

  Captioned ones have a text, "caption", for a label, and num_classes is None.
  `image_shape` is (h, w, C); h and w are None where images differ in size.
  """

  @property
  def num_classes(self) -> int | None: ...

  @property
  def image_shape(self) -> tuple[int | None, int | None, int]: ...

  def __len__(self) -> int: ...

  def __getitem__(self, position: SupportsIndex, /) -> dict[str, Any]: ...


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

  def __getitem__(
    self, position: SupportsIndex | np.ndarray, /
  ) -> dict[str, Any]:
    return {"image": self.images[position], "label": self.labels[position]}


def load(
  name: str, split: str, *, data_dir: str | None = None
) -> Source | TokenSource:
  """The images, or tokens, of one split.

  `data_dir` is where prepared data sets are kept, for those that have to be
  prepared. ValueError for a name or split that is not known, or data that
  cannot be had.
  """
  kind, _, argument = paths.data(name).partition(":")
  kinds = sorted(module.name for module in pkgutil.iter_modules(__path__))
  if kind in kinds:
    module = _module(kind)
    takes_argument = module.USAGE.startswith(f"{kind}:")
    if takes_argument == bool(argument):
      return module.load(argument, split, data_dir)
  usages = "; ".join(_module(kind).USAGE for kind in kinds)
  raise ValueError(f"unknown data set {name!r}; known are: {usages}")


def _module(kind: str) -> ModuleType:
  return importlib.import_module(f"{__name__}.{kind}")
