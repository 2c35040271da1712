"""Conditions: classes, text features or prompts, as arrays with a batch axis.

`null` and `drop` only set `is_null`: the null embedding itself is one of the
backbone's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Num

from tensorar_jax.interfaces import Batch, Cond, Key


def null(cond: Cond) -> Cond:
  """The same condition with every row turned to null."""
  return {**cond, "is_null": jnp.ones_like(cond["is_null"])}


def drop(rng: Key, cond: Cond, rate: float) -> Cond:
  """The same condition with each row turned to null with probability rate."""
  is_null = cond["is_null"]
  dropped: Bool[Array, "B"] = jax.random.bernoulli(rng, rate, is_null.shape)
  return {**cond, "is_null": is_null | dropped}


def class_ids(cond: Cond, num_classes: int) -> Int[Array, "B"]:
  """The rows of a table that holds the classes and, after them, null."""
  return jnp.where(cond["is_null"], num_classes, cond["label"])


def check_labels(cond: Cond, num_classes: int, null_class: bool = True) -> None:
  """ValueError if a backbone of these classes does not know a label, or null.

  Nothing is checked under `jax.jit`, where values are not known.
  """
  _check_kind(cond, "label", "class labels")
  if isinstance(cond["label"], jax.core.Tracer):
    return
  known, label = num_classes, np.asarray(cond["label"])
  if label.size and not 0 <= label.min() <= label.max() < known:
    raise ValueError(
      f"class ids {label.min()} to {label.max()}: this backbone knows"
      f" {known} classes, 0 to {known - 1}. Let the conditioning's and the"
      " backbone's num_classes agree."
    )
  if not null_class and np.asarray(cond["is_null"]).any():
    raise ValueError(
      "null_class=False: this backbone has no null class, so there is"
      " neither guidance nor condition dropout. Set guidance=1 and"
      " condition_dropout=0."
    )


def check_text(cond: Cond, length: int, width: int) -> None:
  """ValueError if a backbone of this text prefix cannot read the features."""
  _check_kind(cond, "text", "text features")
  if (shape := cond["text"].shape)[1:] != (length, width):
    raise ValueError(
      f"text features of shape {shape}: this backbone reads [B, {length},"
      f" {width}], {length} rows of {width} features. Let the conditioning's"
      " length and width agree with its text_length and text_width."
    )
  _check_padding(cond)


def check_prompts(cond: Cond, vocab_size: int) -> None:
  """ValueError if a backbone of this text vocabulary cannot read the ids."""
  _check_kind(cond, "text", "the token ids of prompts")
  text = cond["text"]
  if text.shape[2:] != (2,) or not jnp.issubdtype(text.dtype, jnp.integer):
    raise ValueError(
      f"text of shape {text.shape} and dtype {text.dtype}: this backbone reads"
      " integers [B, P, 2], the ids of a prompt and of its null prompt. Make"
      " the condition by PromptConditioning (conditioning.name='prompt')."
    )
  _check_padding(cond)
  check_ids(text, vocab_size, "the backbone's text_vocab_size")


def check_ids(
  ids: Int[Array | np.ndarray, "*n"], size: int, option: str
) -> None:
  """ValueError for an id that is not below `size`, the value of `option`."""
  if isinstance(ids, jax.core.Tracer) or not ids.size:
    return
  low, high = int(np.min(ids)), int(np.max(ids))
  if low < 0 or high >= size:
    raise ValueError(
      f"token id {low if low < 0 else high}: expected 0 to {size - 1}, as"
      f" {option} says. Take tokenizer and weights from one published model."
    )


def _check_padding(cond: Cond) -> None:
  padding, shape = cond.get("is_padding"), cond["text"].shape
  if padding is not None and padding.shape != shape[:2]:
    raise ValueError(
      f"is_padding of shape {padding.shape} for text features of shape {shape}:"
      f" expected {shape[:2]}, true at the rows that nothing may see."
    )


def _check_kind(cond: Cond, entry: str, kind: str) -> None:
  if entry not in cond:
    raise ValueError(
      f"the condition has the entries {sorted(cond)}: this backbone makes"
      f" images from {kind}, the entry {entry!r}. Choose the conditioning or"
      " the variant of the other kind."
    )


def refuse_order(cond: Cond) -> None:
  """ValueError if the tokens come in an order of their own."""
  if "order" in cond:
    raise ValueError(
      "order: the tokens of this backbone come in raster order. Set"
      " loss.random_order=None."
    )


class ClassConditioning:
  """Class labels 0 .. num_classes - 1 as {"label": int32[B], "is_null"}."""

  is_text = False

  def __init__(self, num_classes: int):
    if num_classes < 1:
      raise ValueError(f"num_classes={num_classes}: expected at least 1.")
    self.num_classes = num_classes

  def encode(self, raw) -> Cond:
    """The condition of integer labels [B]; out of range is a ValueError."""
    if not isinstance(raw, jax.core.Tracer):
      labels = np.asarray(raw)
      if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
          f"labels of shape {labels.shape} and dtype {labels.dtype}: expected"
          " a list of integers, one per image."
        )
      bad = labels[(labels < 0) | (labels >= self.num_classes)]
      if bad.size:
        raise ValueError(
          f"class id {int(bad[0])} is out of range: this model knows"
          f" {self.num_classes} classes, 0 to {self.num_classes - 1}."
        )
    # On the host where the labels are: a batch is put on its devices at once.
    array = jnp if isinstance(raw, jax.core.Tracer) else np
    labels = array.asarray(raw, jnp.int32)
    return {"label": labels, "is_null": array.zeros(labels.shape, bool)}

  def from_batch(self, batch: Batch) -> Cond:
    """The condition of a batch's "label"."""
    return self.encode(batch["label"])

  def example(self) -> Cond:
    return self.encode(np.asarray([self.num_classes - 1]))

  null = staticmethod(null)
  drop = staticmethod(drop)


def align_right(
  features: Num[Array | np.ndarray, "B P E"],
  mask: Bool[Array | np.ndarray, "B P"],
) -> tuple[Num[Array | np.ndarray, "B P E"], Bool[Array | np.ndarray, "B P"]]:
  """Moves the real rows of each text to the end; the others become zero."""
  # Features on the host stay there, as labels do.
  xp: Any = np if isinstance(features, np.ndarray) else jnp
  # False sorts before True, and equal rows keep their order.
  order = xp.argsort(xp.asarray(mask), axis=1, stable=True)
  mask = xp.take_along_axis(xp.asarray(mask), order, axis=1)
  features = xp.take_along_axis(features, order[..., None], axis=1)
  return xp.where(mask[..., None], features, xp.zeros((), features.dtype)), mask


def real_rows(
  features: Num[Array | np.ndarray, "B P E"],
  mask: Bool[Array | np.ndarray, "B P"],
) -> list[Num[np.ndarray, "_ E"]]:
  """The features of each text's own tokens, on the host; see `pad_left`."""
  texts, masks = np.asarray(features), np.asarray(mask, bool)
  return [text[rows] for text, rows in zip(texts, masks)]


def pad_left(
  texts: Sequence[Num[np.ndarray, "_ E"]], length: int
) -> tuple[Num[np.ndarray, "B P E"], Bool[np.ndarray, "B P"]]:
  """(features, mask) of texts of up to P = length rows, their own rows last."""
  shape = (len(texts), length, texts[0].shape[1])
  features = np.zeros(shape, texts[0].dtype)
  for padded, text in zip(features, texts):
    padded[length - len(text) :] = text
  counts = np.array([len(text) for text in texts])
  return features, np.arange(length) >= length - counts[:, None]


class TextConditioning:
  """Text as {"text": [B, P, E], "is_padding": bool[B, P], "is_null"}.

  Texts of every length end where the image begins: their padding is on the
  left. Null rows keep it, as guidance compares two prefixes of one length.

  Attributes:
    width: features of a text token.
    length: tokens of a text.
    encoder: folder or name of the text encoder, which `build.text_encoder`
      opens; a model that is given features needs none.
    encoder_dtype: of its weights and computation.
  """

  is_text = True
  reads = "t5"  # the kind of encoder that is in the folder `encoder`

  def __init__(
    self,
    width: int = 2048,
    length: int = 120,
    encoder: str = "",
    encoder_dtype: str = "bfloat16",
  ):
    if min(width, length) < 1:
      raise ValueError(
        f"width={width}, length={length}: expected at least 1 of each, the"
        " features of a text token and the tokens of a text."
      )
    self.width, self.length = width, length
    self.encoder, self.encoder_dtype = encoder, encoder_dtype

  def encode(self, raw) -> Cond:
    """The condition of (features [B, P, E], mask [B, P], true at real rows).

    The real rows of a text may stand anywhere, as text encoders or files have
    them. Another shape, or a text without any row, is a ValueError.
    """
    features, mask = raw
    self._check(features, mask)
    array = np if isinstance(features, np.ndarray) else jnp
    features, mask = align_right(features, array.asarray(mask, bool))
    is_null = array.zeros(len(mask), bool)
    return {"text": features, "is_padding": ~mask, "is_null": is_null}

  def _check(self, features, mask):
    want, shape = (self.length, self.width), np.shape(features)
    if len(shape) != 3 or shape[1:] != want:
      raise ValueError(
        f"text features of shape {shape}: expected [B, {want[0]}, {want[1]}],"
        f" {want[0]} rows of {want[1]} features. Use the text encoder of the"
        " model, or set the conditioning's length and width."
      )
    if np.shape(mask) != shape[:2]:
      raise ValueError(
        f"a mask of shape {np.shape(mask)} for text features of shape {shape}:"
        f" expected {shape[:2]}, true at the rows that are text."
      )
    if isinstance(mask, jax.core.Tracer):
      return
    empty = np.flatnonzero(~np.asarray(mask, bool).any(axis=1))
    if empty.size:
      raise ValueError(
        f"text {empty[0]} has no rows: every row is masked. Leave it out, or"
        " use null for an image of no text."
      )

  def from_batch(self, batch: Batch) -> Cond:
    """The condition of "text", "text_mask" and, where given, "valid"."""
    missing = {"text", "text_mask"} - batch.keys()
    if missing:
      raise ValueError(
        f"the batch has {sorted(batch)}, it lacks {sorted(missing)}: text"
        " conditions are made of a data set with text features."
      )
    mask = np.asarray(batch["text_mask"], bool)
    if "valid" not in batch:
      return self.encode((batch["text"], mask))
    # The replacement of an unreadable sample need not have a text.
    valid = np.asarray(batch["valid"], bool)
    cond = self.encode((batch["text"], mask | ~valid[:, None]))
    return {**cond, "is_valid": valid}

  def example(self) -> Cond:
    shape = (1, self.length, self.width)
    return self.encode((np.zeros(shape, np.float32), np.ones(shape[:2], bool)))

  null = staticmethod(null)
  drop = staticmethod(drop)


def prompt_rows(
  ids: Sequence[Sequence[int] | np.ndarray], pad: int, length: int
) -> tuple[Int[np.ndarray, "B P 2"], Bool[np.ndarray, "B P"]]:
  """(ids, mask) of prompts beside their null prompts, P = `length`.

  Each prompt has 2 to `length` ids; others are a ValueError. Its null prompt
  keeps the first and the last, between which all are `pad`.
  """
  rows = []
  for number, prompt in enumerate(ids):
    if not 2 <= len(prompt) <= length:
      raise ValueError(
        f"prompt {number} has {len(prompt)} ids: expected 2, which a null"
        f" prompt keeps, to length={length}."
      )
    null_prompt = [prompt[0], *[pad] * (len(prompt) - 2), prompt[-1]]
    rows.append(np.stack([prompt, null_prompt], axis=1).astype(np.int32))
  return pad_left(rows, length)


class PromptConditioning(TextConditioning):
  """Prompts as {"text": int32 [B, P, 2], "is_padding", "is_null"}.

  For backbones that read text by token ids, with an embedding of their own. At
  each place are the ids of the prompt and of its null prompt, as `prompt_rows`
  makes them, so that only the prompts' tokenizer has to know what stands for no
  text.

  Attributes:
    length: the most ids of a prompt.
    vocab_size: ids are below it.
    encoder: the folder of the model, whose tokenizer.json makes the ids, for
      `build.text_encoder`.
  """

  reads = "chat"

  def __init__(
    self, length: int = 256, vocab_size: int = 102400, encoder: str = ""
  ):
    super().__init__(2, length, encoder)
    self.vocab_size = vocab_size

  def encode(self, raw) -> Cond:
    """The condition of (ids [B, P, 2], mask [B, P], true at real rows)."""
    ids, mask = raw
    if not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(
        f"prompts of dtype {ids.dtype}: expected integers, the ids of tokens."
        " Text features are for TextConditioning."
      )
    cond = super().encode((ids.astype(np.int32), mask))
    check_ids(cond["text"], self.vocab_size, "the conditioning's vocab_size")
    return cond

  def example(self) -> Cond:
    highest = np.full((1, self.length, 2), self.vocab_size - 1, np.int32)
    return self.encode((highest, np.ones(highest.shape[:2], bool)))
