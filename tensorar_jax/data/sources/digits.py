"""scikit-learn's digits, 8 x 8: 1500 to train with and 297 to test."""

from __future__ import annotations

from typing import cast

import numpy as np

from tensorar_jax.data.sources import ArraySource

USAGE = "digits"


def load(argument: str, split: str, data_dir: str | None) -> ArraySource:
  """The digits of "train" or "test", split evenly within every class."""
  del argument, data_dir
  if split not in ("train", "test"):
    raise ValueError(
      f"unknown split {split!r} of 'digits'; known are 'train' and 'test'"
    )
  from sklearn import datasets
  from sklearn.utils import Bunch

  digits = cast(Bunch, datasets.load_digits())
  by_class = np.argsort(digits.target, kind="stable")
  in_test = np.zeros(len(by_class), bool)
  in_test[by_class[np.arange(297) * len(by_class) // 297]] = True
  chosen = in_test if split == "test" else ~in_test
  images = np.rint(digits.images[chosen, :, :, None] * 255 / 16)
  labels = digits.target[chosen].astype(np.int32)
  return ArraySource(images.astype(np.uint8), labels, num_classes=10)
