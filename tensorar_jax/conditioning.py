"""What an image is made from. A condition is a dict of arrays, batch first.

`null` and `drop` only set `is_null`: the null embedding itself is one of the
backbone's weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from tensorar_jax.interfaces import Cond, Key


def null(cond: Cond) -> Cond:
  """The same condition with every row turned to null."""
  return {**cond, "is_null": jnp.ones_like(cond["is_null"])}


def drop(rng: Key, cond: Cond, rate: float) -> Cond:
  """The same condition with each row turned to null with probability rate."""
  is_null = cond["is_null"]
  dropped: Bool[Array, "B"] = jax.random.bernoulli(rng, rate, is_null.shape)
  return {**cond, "is_null": is_null | dropped}


def class_ids(cond: Cond, num_classes: int) -> Int[Array, "B"]:
  """The rows of a table that holds the classes and behind them null."""
  return jnp.where(cond["is_null"], num_classes, cond["label"])


def check_labels(cond: Cond, num_classes: int, null_class: bool = True) -> None:
  """ValueError if a backbone of these classes does not know a label, or null.

  Nothing is checked inside someone's jit, where there is nothing to look at.
  """
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


def refuse_order(cond: Cond) -> None:
  """ValueError if the tokens come in an order of their own."""
  if "order" in cond:
    raise ValueError(
      "order: the tokens of this backbone come in raster order. Set"
      " loss.random_order=None."
    )


class ClassConditioning:
  """Class labels 0 .. num_classes - 1 as {"label": int32[B], "is_null"}."""

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

  def example(self) -> Cond:
    return self.encode(np.asarray([self.num_classes - 1]))

  null = staticmethod(null)
  drop = staticmethod(drop)
