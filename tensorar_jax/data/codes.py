"""Sources of tokens in place of images, and the published .npy codes.

The layout of LlamaGen's extraction, image i of N in A variants (crops, flips):

  <root>/imagenet<size>_codes/<i>.npy    int64 (1, A, T)
  <root>/imagenet<size>_labels/<i>.npy   int64 (1,)

If `ten_crop/` in the path can be replaced by `ten_crop_105/`, that folder
holds A more variants of each image; all 2 A are drawn alike. The extraction
may leave a few surplus files at the end, which repeat the first images.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import Integer

Positions = Integer[np.ndarray, " b"]


@runtime_checkable
class TokenSource(Protocol):
  """Labelled tokens, each image in `num_variants` variants (crops, flips).

  `vocab_sizes` and `num_classes` are None where the files do not tell.
  """

  num_classes: int | None
  num_tokens: int
  num_variants: int
  vocab_sizes: tuple[int, ...] | None

  def __len__(self) -> int: ...

  def fetch(self, positions: Positions, variants: Positions) -> dict[str, Any]:
    """{"tokens": int32 [b, T, F], "label": int32 [b]}, checked.

    Or "text" [b, P, E] and "text_mask" [b, P] in place of "label".
    """
    ...


def expect(
  source: TokenSource,
  *,
  num_tokens: int,
  vocab_sizes: Sequence[int],
  num_classes: int | None = None,
  text: tuple[int, int] | None = None,
) -> TokenSource:
  """The same source, held to what the model reads; ValueError if it differs.

  `text` is (width, length) of the text features, None of a model of classes.
  """
  vocab_sizes = tuple(vocab_sizes)
  # Published files do not tell their vocabulary; they never factorise it.
  stored = source.vocab_sizes or vocab_sizes[:1]
  if (source.num_tokens, stored) != (num_tokens, vocab_sizes):
    raise ValueError(
      f"the data hold {source.num_tokens} tokens of vocabulary {stored} per "
      f"image, the model reads {num_tokens} of {vocab_sizes}: change one of "
      "them"
    )
  found = getattr(source, "text", None)
  found = (found.width, found.length) if found else None
  if found != text:
    kinds = [
      f"texts of (width, length) {t}" if t else "classes" for t in (found, text)
    ]
    raise ValueError(
      f"the data hold {kinds[0]}, the model reads {kinds[1]}: tokenize with the"
      " config that is trained"
    )
  if source.num_classes and num_classes and source.num_classes > num_classes:
    raise ValueError(
      f"the data have {source.num_classes} classes, the model {num_classes}: "
      "raise the model's num_classes"
    )
  return dataclasses.replace(
    source,
    vocab_sizes=vocab_sizes,
    num_classes=num_classes or source.num_classes,
  )


def check_codes(
  where: str,
  codes: Integer[np.ndarray, "*n F"],
  vocab_sizes: tuple[int, ...] | None,
) -> None:
  """ValueError if a code of `where` is none of its vocabulary."""
  for f, size in enumerate(vocab_sizes or (2**31,) * codes.shape[-1]):
    low, high = codes[..., f].min(), codes[..., f].max()
    if low < 0 or high >= size:
      raise ValueError(
        f"{where}: code {low if low < 0 else high} is outside the vocabulary; "
        f"expected 0 to {size - 1}: the codes are of another tokenizer, or "
        "damaged"
      )


def check_label(
  where: str, label: int | np.integer, num_classes: int | None
) -> None:
  """ValueError if the label of `where` is no class."""
  top = (num_classes or 2**31) - 1
  if not 0 <= label <= top:
    raise ValueError(
      f"{where}: label {label} is no class; expected 0 to {top}: set "
      "num_classes, or extract the labels again"
    )


# --- published folders -------------------------------------------------------


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
      with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries}
      odd = [name for name in sizes if sizes[name] != sizes["0.npy"]]
      if odd:
        raise ValueError(
          f"{folder / odd[0]} has {sizes[odd[0]]} bytes; expected "
          f"{sizes['0.npy']} as of 0.npy ({len(odd)} such files): extract its "
          "codes again"
        )


def open_code_folders(root: pathlib.Path) -> CodeFolders:
  """The published codes of `root`; ValueError for gaps and missing files."""
  found = sorted(root.glob("imagenet*_codes"))
  if len(found) != 1:
    raise ValueError(
      f"{root} holds {[f.name for f in found]}; expected exactly one folder "
      "imagenet<size>_codes, and imagenet<size>_labels beside it"
    )
  size = re.fullmatch(r"imagenet(.*)_codes", found[0].name).group(1)
  roots, path = [root], f"{root}/"
  twin = pathlib.Path(path.replace("ten_crop/", "ten_crop_105/"))
  if twin != root and (twin / found[0].name).is_dir():
    logging.info("%s: half of the draws are from %s", root, twin)
    roots.append(twin)
  names = (f"imagenet{size}_codes", f"imagenet{size}_labels")
  folders = tuple(tuple(r / name for name in names) for r in roots)
  counts = {folder: _count(folder) for pair in folders for folder in pair}
  num_images = counts[folders[0][0]]
  for folder, count in counts.items():
    if count != num_images:
      missing = min(count, num_images)
      lacks = folder if count < num_images else folders[0][0]
      raise ValueError(
        f"{lacks / f'{missing}.npy'} is missing: {folder} holds {count} files, "
        f"{folders[0][0]} {num_images}; expected as many"
      )
  shape = _read_npy(folders[0][0] / "0.npy", (1, None, None)).shape
  return CodeFolders(folders, num_images, *shape[1:])


def _count(folder: pathlib.Path) -> int:
  """How many files 0.npy, 1.npy, ... there are."""
  if not folder.is_dir():
    raise ValueError(f"{folder} is missing; expected files 0.npy, 1.npy, ...")
  with os.scandir(folder) as entries:
    names = {entry.name for entry in entries}
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
  """An integer array of this shape, in which None fits any length."""
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
      f"{shape}: extract it again, or keep it apart"
    )
  return array
