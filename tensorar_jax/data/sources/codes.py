"""Published codes in .npy files, as LlamaGen's extraction writes them.

Image i of N in A variants (crops, flips):

  <root>/imagenet<size>_codes/<i>.npy    int64 (1, A, T)
  <root>/imagenet<size>_labels/<i>.npy   int64 (1,)

If `ten_crop/` in the path can be replaced by `ten_crop_105/`, that folder
holds A more variants of each image; all 2 A are drawn alike. The extraction
may leave a few surplus files at the end, which repeat the first images.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Integer

from tensorar_jax.data import folders, leftovers, splits
from tensorar_jax.data.codes import Positions, check_codes, check_label

USAGE = "codes:<path> of published codes"
_ENDING = ".npy"


def load(argument: str, split: str, data_dir: str | None) -> CodeFolders:
  """The codes of `<argument>/<split>`, or of `argument` without splits."""
  del data_dir
  return open_code_folders(splits.split_folder(argument, split))


@dataclasses.dataclass(frozen=True)
class CodeFolders:
  """Published codes; `folders` are the pairs (codes, labels) to draw from."""

  folders: tuple[tuple[pathlib.Path, pathlib.Path], ...]
  num_images: int
  num_crops: int
  num_tokens: int
  vocab_sizes: tuple[int, ...] | None = None
  num_classes: int | None = None

  @property
  def num_variants(self) -> int:
    return len(self.folders) * self.num_crops

  def __len__(self) -> int:
    return self.num_images

  def fetch(self, positions: Positions, variants: Positions) -> dict[str, Any]:
    """See `TokenSource`."""
    tokens = np.empty((len(positions), self.num_tokens, 1), np.int32)
    labels = np.empty(len(positions), np.int32)
    shape = (1, self.num_crops, self.num_tokens)
    for i, (position, variant) in enumerate(zip(positions, variants)):
      folder, crop = divmod(int(variant), self.num_crops)
      file, label_file = (f / f"{position}.npy" for f in self.folders[folder])
      codes, label = _read_npy(file, shape), _read_npy(label_file, (1,))[0]
      check_codes(str(file), codes[..., None], self.vocab_sizes)
      check_label(str(label_file), label, self.num_classes)
      tokens[i, :, 0], labels[i] = codes[0, crop], label
    return {"tokens": tokens, "label": labels}

  def check(self) -> None:
    """ValueError if a file's length differs from the first's; opens none."""
    for folder in (folder for pair in self.folders for folder in pair):
      names = folders.Tree(folder).with_ending(_ENDING)
      sizes = {name: (folder / name).stat().st_size for name in names}
      others = [name for name in sizes if sizes[name] != sizes["0.npy"]]
      if others:
        raise ValueError(
          f"{folder / others[0]} has {sizes[others[0]]} bytes; expected "
          f"{sizes['0.npy']} as of 0.npy ({len(others)} such files): extract "
          "its codes again"
        )


def open_code_folders(root: pathlib.Path) -> CodeFolders:
  """The published codes of `root`; ValueError for gaps and missing files."""
  names = [path.name for path in sorted(root.glob("imagenet*_codes"))]
  if len(names) != 1:
    raise ValueError(
      f"{root} holds {names}; expected exactly one folder "
      "imagenet<size>_codes, and imagenet<size>_labels beside it"
    )
  codes_name = names[0]
  labels_name = codes_name.removesuffix("_codes") + "_labels"
  roots = [root]
  twin = pathlib.Path(f"{root}/".replace("ten_crop/", "ten_crop_105/"))
  if twin != root and (twin / codes_name).is_dir():
    logging.info("%s: half of the draws are from %s", root, twin)
    roots.append(twin)
  pairs = tuple((r / codes_name, r / labels_name) for r in roots)
  counts = {folder: _count(folder) for pair in pairs for folder in pair}
  num_images = counts[pairs[0][0]]
  for folder, count in counts.items():
    if count != num_images:
      missing = min(count, num_images)
      lacks = folder if count < num_images else pairs[0][0]
      raise ValueError(
        f"{lacks / f'{missing}.npy'} is missing: {folder} holds {count} files, "
        f"{pairs[0][0]} {num_images}; expected as many"
      )
  first = _read_npy(pairs[0][0] / "0.npy", (1, None, None))
  return CodeFolders(
    folders=pairs,
    num_images=num_images,
    num_crops=first.shape[1],
    num_tokens=first.shape[2],
  )


def _count(folder: pathlib.Path) -> int:
  """Counts the files 0.npy, 1.npy, ...; ValueError for a gap."""
  if not folder.is_dir():
    raise ValueError(f"{folder} is missing; expected files 0.npy, 1.npy, ...")
  tree = folders.Tree(folder)
  names = {*tree.with_ending(_ENDING)}
  leftovers.say(folder, tree.left_out)
  for i in range(len(names)):
    if f"{i}.npy" not in names:
      raise ValueError(
        f"{folder / f'{i}.npy'} is missing; expected 0.npy to "
        f"{len(names) - 1}.npy in a folder of {len(names)} files"
      )
  if not names:
    raise ValueError(f"{folder} is empty; expected files 0.npy, 1.npy, ...")
  return len(names)


def _read_npy(
  file: pathlib.Path, shape: tuple[int | None, ...]
) -> Integer[np.ndarray, "..."]:
  """Reads an integer array of this shape, in which None is any length."""
  try:
    array = np.load(file, allow_pickle=False)
  except FileNotFoundError as error:
    raise ValueError(f"{file} is missing") from error
  except (ValueError, EOFError) as error:
    raise ValueError(
      f"{file} is no .npy array of numbers ({error}); extract it again"
    ) from error
  wrong = array.ndim != len(shape) or any(
    n not in (None, m) for n, m in zip(shape, array.shape)
  )
  if wrong or array.dtype.kind not in "iu" or not array.size:
    raise ValueError(
      f"{file} holds {array.dtype} {array.shape}; expected integers "
      f"{shape}: extract it again, or move it elsewhere"
    )
  return array
