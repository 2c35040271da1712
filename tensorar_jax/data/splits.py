"""Finds the split of data that lie in folders and files."""

from __future__ import annotations

import pathlib
import re


def split_folder(path: str, split: str) -> pathlib.Path:
  """The subfolder of a split, or the folder itself where it has no splits."""
  folder = pathlib.Path(path)
  if not folder.is_dir():
    raise ValueError(f"{folder} is no folder; expected one that exists")
  if split and (folder / split).is_dir():
    return folder / split
  # A misspelt split would otherwise be the whole set, or its splits classes.
  usual = ("train", "val", "validation", "test")
  known = [name for name in usual if (folder / name).is_dir()]
  if known or not re.fullmatch(r"\w*", split):
    raise ValueError(
      f"unknown split {split!r} of {folder}; known are "
      f"{known or 'those with a subfolder, and none has one'}; slices are not "
      "possible"
    )
  return folder


def whole_file(path: str, split: str) -> pathlib.Path:
  """The file, for a split of any name: a file holds only one."""
  if not re.fullmatch(r"\w*", split):
    raise ValueError(
      f"unknown split {split!r} of {path}: a file has no splits; expected a "
      "plain name, such as 'train': slices are not possible"
    )
  return pathlib.Path(path)
