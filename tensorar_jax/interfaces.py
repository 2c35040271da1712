"""The interfaces of the project: backbone, tokenizer, condition, text encoder.

Letters used in every shape annotation:

| letter | meaning                     | letter | meaning                   |
| ------ | --------------------------- | ------ | ------------------------- |
| `B`    | batch                       | `D`    | backbone width            |
| `T`    | image tokens, raster order  | `L`    | layers                    |
| `P`    | condition prefix            | `N`    | attention heads           |
| `M`    | rows that run at once       | `H`    | width of one head         |
| `k`    | slots of a window           | `F`    | sub-tokens of one token   |
| `V_f`  | vocabulary of sub-token `f` | `C`    | image channels            |
| `E`    | features of a text token    | `R`    | windows drawn at once     |
| `G`    | groups of images            | `S`    | rows of a cache, or steps |

Tokens are always `int32[..., F]`, with `F = 1` where a family does not
factorise its vocabulary, so that shared code has one case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, Num

# A condition: arrays with a leading batch axis. "is_null" (bool[B]) marks the
# rows whose condition is replaced by the backbone's null embedding. "order"
# (int32[B, T], where a backbone supports it) is the raster index of each token
# of the sequence; without it the order is raster. "is_padding" (bool[B, P], for
# prefixes of unequal length) marks rows that no other row may see.
# "is_valid" (bool[B]) marks the images that the loss counts; without it, all.
Cond = dict[str, Array | np.ndarray]
# What the data pipeline yields: "image" (uint8 [B, h, w, C]) or "tokens"
# (int32 [B, T, F]), and "label" (int32 [B]) or "text" ([B, P, E]) with
# "text_mask" (bool [B, P], true at text) and perhaps "valid" (bool [B]).
Batch = dict[str, Array | np.ndarray]
Key = Array  # a typed PRNG key, or an array of them


class Frozen(nnx.Variable):
  """An array that is saved and sharded with the weights but never trained."""


@struct.dataclass
class Cache:
  """Keys and values of every layer; only `layers.py` knows their layout.

  Attributes:
    k: keys, one array `[L, B, N, S, H]` or a tuple of L arrays `[B, N, S, H]`
      (N key/value heads, S rows).
    v: values, as the keys.
    end: int32 [B], the next row of each image to be written.
    context: the backbone's own, for later rows: a padding mask, a class, ...
    is_aligned: whether all images are at the same row, so that one write
      serves them all.
  """

  k: Any
  v: Any
  end: Any
  context: Any = None
  is_aligned: bool = struct.field(pytree_node=False, default=True)


@struct.dataclass
class Samples:
  """The result of `generate`.

  Attributes:
    tokens: the committed ones; `tokens[:, n] == drafts[:, n, 0]`.
    drafts: `drafts[:, n, j]` is the token drawn at step n for position n + j.
    logits: for each sub-token the guided logits before temperature, if they
      were asked for.
    steps: the step of the backbone that committed each token, from 0 for the
      prefix. The window decoder takes one step for each token, the parallel
      decoder fewer.
  """

  tokens: Int[Array, "B T F"]
  drafts: Int[Array, "B T k F"]
  logits: tuple[Float[Array, "B T k _"], ...] | None = None
  steps: Int[Array, "B T"] | None = None


@runtime_checkable
class Backbone(Protocol):
  """A pretrained causal image transformer in the parts that TensorAR wraps.

  Everything that depends on the position (rotary tables, absolute embeddings,
  adaptive norms) happens inside `__call__`, `prefill` and `decode`. `embed` and
  `logits` are position-free and apply to any leading axes. The modules that
  wrap it use the family's `make_norm`, `kernel_init` and compute `dtype`.
  """

  num_tokens: int
  grid: tuple[int, int]  # rows and columns of the image's tokens
  width: int
  dtype: str
  num_heads: int
  vocab_sizes: tuple[int, ...]
  kernel_init: Callable[..., Array]

  def make_norm(self, rngs: nnx.Rngs) -> nnx.Module:
    """Makes a norm over `width` features, of the family's type."""
    ...

  def check(self, cond: Cond) -> None:
    """Raises ValueError if this model cannot serve `cond`."""
    ...

  def embed(self, tokens: Int[Array, "*n F"]) -> Float[Array, "*n D"]:
    """The embedding of each token."""
    ...

  def __call__(
    self, cond: Cond, x: Float[Array, "B M D"], *, rng: Key | None = None
  ) -> Float[Array, "B M+1 D"]:
    """Hidden states; row t predicts token t. `rng` switches dropout on."""
    ...

  def prefill(
    self, cond: Cond, spare: int = 0
  ) -> tuple[Float[Array, "B D"], Cache]:
    """The hidden state that predicts token 0, and the cache of the prefix.

    The cache has room for `spare` more rows than the sequence has.
    """
    ...

  def decode(
    self, x: Float[Array, "B M D"], cache: Cache
  ) -> tuple[Float[Array, "B M D"], Cache]:
    """Runs M more rows, written from `cache.end`; each sees those before it.

    `prefill` and decodes of T - 1 rows, one by one or several at once, equal
    `__call__`. Rows that were written before and are not before `cache.end` are
    never seen: with a smaller `end` they are written again.
    """
    ...

  def logits(
    self,
    hidden: Float[Array, "*n D"],
    tokens: Int[Array, "*n F"],
    *,
    rng: Key | None = None,
  ) -> tuple[Float[Array, "*n _"], ...]:
    """Logits of each sub-token; `logits[f]` reads only `tokens[..., :f]`.

    `rng` switches on the head's own dropout, where a family has one.
    """
    ...


@runtime_checkable
class Tokenizer(Protocol):
  """A frozen map between images in [-1, 1] and tokens in raster order."""

  config: Any  # of the family; its `image_size` is (height, width)
  grid: tuple[int, int]
  vocab_sizes: tuple[int, ...]
  uint8_offset: float  # bytes are 127.5 x + offset, truncated: 128 rounds

  def encode(self, images: Float[Array, "B h w C"]) -> Int[Array, "B T F"]:
    """The tokens of each image."""
    ...

  def decode(self, tokens: Int[Array, "B T F"]) -> Float[Array, "B h w C"]:
    """The image of each token sequence, not clipped."""
    ...


@runtime_checkable
class TextEncoder(Protocol):
  """Turns captions into `width` features of each of at most `length` tokens.

  Features are numbers that a text model makes, or ids that the backbone reads.
  """

  width: int
  length: int

  def __call__(
    self, captions: Sequence[str]
  ) -> tuple[Num[Array | np.ndarray, "B P E"], Bool[np.ndarray, "B P"]]:
    """Returns (features, mask, true at tokens).

    Raises:
      ValueError: a caption cannot be encoded.
    """
    ...


@runtime_checkable
class ChecksCaptions(Protocol):
  """A text encoder that says beforehand which captions it cannot encode."""

  def check(self, caption: str) -> None:
    """ValueError, with the reason, if the caption cannot be encoded."""
    ...


@runtime_checkable
class Conditioning(Protocol):
  """The condition that an image is made from: class labels or text."""

  is_text: bool  # from text features, not from labels

  def encode(self, raw: Any) -> Cond:
    """The condition for raw labels or prompts; bad input is a ValueError."""
    ...

  def from_batch(self, batch: Batch) -> Cond:
    """The condition of a batch of the data pipeline."""
    ...

  def example(self) -> Cond:
    """One row that needs all that a backbone may lack, for early checks."""
    ...

  def null(self, cond: Cond) -> Cond:
    """The same rows with `is_null` set, for the unguided half."""
    ...

  def drop(self, rng: Key, cond: Cond, rate: float) -> Cond:
    """The same rows, each turned to null with probability `rate`."""
    ...


@runtime_checkable
class Trainable(Protocol):
  """A module that carries its own loss (tokenizer, classifier)."""

  def loss(
    self, batch: Batch, rng: Key
  ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of a batch and its metrics."""
    ...


@dataclasses.dataclass(frozen=True)
class Rule:
  """One line of an import table: PyTorch names -> one path in this package.

  `source` is a regular expression over the whole PyTorch name; its group
  `layer`, if there is one, is the index on the stacked leading axis. `target`
  is the path with `/`, in which `{name}` stands for a named group of `source`;
  `None` names a tensor that is known and not needed. `axes` is the
  transposition from PyTorch's layout to ours, empty for none. An alias is the
  tensor's name in files of another layout: it is read, never written.
  """

  source: str
  target: str | None
  axes: tuple[int, ...] = ()
  is_alias: bool = False


# The usual transpositions: y = x W^T -> x W, and OIHW -> HWIO.
LINEAR = (1, 0)
CONV = (2, 3, 1, 0)
