"""Sources of tokens in place of images, and the checks that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

Positions = Integer[np.ndarray, " b"]


@runtime_checkable
class TokenSource(Protocol):
  """Labelled tokens, each image in `num_variants` variants (crops, flips).

  `vocab_sizes` and `num_classes` are None where the files do not tell.
  """

  __dataclass_fields__: ClassVar[dict[str, Any]]  # `expect` replaces some

  @property
  def num_classes(self) -> int | None: ...

  @property
  def num_tokens(self) -> int: ...

  @property
  def num_variants(self) -> int: ...

  @property
  def vocab_sizes(self) -> tuple[int, ...] | None: ...

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
  """The same source, checked against what the model reads.

  `text` is (width, length) of the text features, None for a model of classes.
  ValueError where they differ.
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
  stored_text = getattr(source, "text", None)
  if stored_text:
    stored_text = (stored_text.width, stored_text.length)
  if stored_text != text:
    held, read = (
      f"texts of (width, length) {size}" if size else "classes"
      for size in (stored_text, text)
    )
    raise ValueError(
      f"the data hold {held}, the model reads {read}: tokenize with the config"
      " that is trained"
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
  """ValueError if a code is not in its vocabulary; it names `where`."""
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
  """ValueError if a label is no class; it names `where`."""
  top = (num_classes or 2**31) - 1
  if not 0 <= label <= top:
    raise ValueError(
      f"{where}: label {label} is no class; expected 0 to {top}: set "
      "num_classes, or extract the labels again"
    )
