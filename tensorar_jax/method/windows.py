"""Overlapping windows: the position of each slot, and the padding at the end.

Window t holds the tokens of positions t .. t + k - 1; slot j of window t is
position t + j. Slots with t + j >= T are PAD: invalid, never predicted.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def check_window(window: int, num_tokens: int) -> None:
  """Raises ValueError unless 1 <= window <= num_tokens."""
  if not 1 <= window <= num_tokens:
    raise ValueError(
      f"window={window}: a window has at least 1 slot and at most as many as"
      f" the image has tokens ({num_tokens}). Choose 1 <= window <="
      f" {num_tokens}; 1 is the base model."
    )


def valid_slots(
  starts: Int[Array, "*n"], window: int, num_tokens: int
) -> Bool[Array, "*n k"]:
  """True where slot j of the window that starts at `starts` is no PAD."""
  return jnp.asarray(starts)[..., None] + jnp.arange(window) < num_tokens


def unfold(
  tokens: Int[Array, "B T F"], window: int
) -> tuple[Int[Array, "B T k F"], Bool[Array, "T k"]]:
  """Returns every window and its valid slots; PAD slots hold 0."""
  num_tokens = tokens.shape[1]
  valid = valid_slots(jnp.arange(num_tokens), window, num_tokens)
  position = jnp.arange(num_tokens)[:, None] + jnp.arange(window)
  windows = tokens[:, jnp.where(valid, position, 0)]  # [B, T, k, F]
  return jnp.where(valid[:, :, None], windows, 0), valid


def after_looks(
  drafts: Int[Array, "B T k F"], looks: int
) -> Int[Array, "B T F"]:
  """Returns the sequence after at most `looks` looks at each position.

  `looks = k` is the result; `looks = 1` the first draft of every position.
  Position p is read from `drafts[p - j, j]` with j = k - looks, or from the
  first window, `drafts[0, p]`, where p < j.
  """
  window, num_tokens = drafts.shape[2], drafts.shape[1]
  if not 1 <= looks <= window:
    raise ValueError(
      f"looks={looks}: a token of this model is looked at 1 to {window} times."
    )
  position = jnp.arange(num_tokens)
  slot = jnp.minimum(window - looks, position)
  return drafts[:, position - slot, slot]


def looks_at(
  steps: Int[np.ndarray, "S"], window: int, num_tokens: int
) -> Int[np.ndarray, "S T"]:
  """Returns how often each position has been drawn after each step, 0 to k.

  The first k - 1 positions count from the first window, as in `after_looks`:
  position p has had k - p looks when it is drawn for the first time.
  """
  ahead = np.arange(num_tokens) - steps[:, None]
  return np.clip(window - ahead, 0, window)
