"""Handwritten digits, 8 x 8: 1500 to train with and 297 to test.

`digits.npz` has the images of scikit-learn's `load_digits`, which are the test
set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits",
UCI Machine Learning Repository (1998), doi:10.24432/C50P49, CC BY 4.0.
"""

from __future__ import annotations

import pathlib

import numpy as np

from tensorar_jax.data.sources import ArraySource

USAGE = "digits"
FILE = pathlib.Path(__file__).with_name("digits.npz")


def load(argument: str, split: str, data_dir: str | None) -> ArraySource:
  """The digits of "train" or "test", split evenly within every class."""
  del argument, data_dir
  if split not in ("train", "test"):
    raise ValueError(
      f"unknown split {split!r} of 'digits'; known are 'train' and 'test'"
    )
  with np.load(FILE) as file:
    levels, labels = file["images"], file["labels"]  # levels of 0 to 16
  by_class = np.argsort(labels, kind="stable")
  in_test = np.zeros(len(by_class), bool)
  in_test[by_class[np.arange(297) * len(by_class) // 297]] = True
  chosen = in_test if split == "test" else ~in_test
  images = np.rint(levels[chosen, :, :, None] * 255.0 / 16).astype(np.uint8)
  return ArraySource(images, labels[chosen].astype(np.int32), num_classes=10)
