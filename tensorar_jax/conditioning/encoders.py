"""Opens text encoders by kind; T5 with its tokenizer, captions -> features.

T5's weights lie on a mesh by the rules of `sharding`, as any model's, and the
devices share the rows of a batch.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from tensorar_jax.checkpoints import hub, torch_import
from tensorar_jax.checkpoints.files import read_json
from tensorar_jax.conditioning import chat, t5
from tensorar_jax.conditioning.captions import CaptionTokenizer
from tensorar_jax.parallel import sharding, weights

BATCH_SIZE = 64  # captions at once


@jax.jit
def _encode(model, ids, mask):
  return model(ids, mask)


class T5Encoder:
  """Turns captions into what `TextConditioning.encode` reads, by T5.

  Attributes:
    width: features of a token.
    length: the most tokens of a caption with its end; more are cut off.
    dtype: of the features.
  """

  def __init__(
    self,
    model: t5.Model,
    tokenizer: CaptionTokenizer,
    mesh: Mesh | None = None,
  ):
    if tokenizer.vocab_size > model.config.vocab_size:
      raise ValueError(
        f"the tokenizer knows {tokenizer.vocab_size} tokens, the text encoder"
        f" {model.config.vocab_size}: take both from one published model."
      )
    self.model, self.tokenizer, self._mesh = model, tokenizer, mesh
    self.width, self.length = model.config.width, tokenizer.length
    self.dtype = model.config.dtype

  def __call__(
    self, captions: Sequence
  ) -> tuple[Float[Array | np.ndarray, "B P E"], Bool[np.ndarray, "B P"]]:
    """(features in the model's dtype, mask, true at a caption's tokens).

    Features of up to BATCH_SIZE captions stay on the devices, perhaps not
    computed yet; those of more come batch by batch to the host.
    """
    ids, mask = self.tokenizer(captions)
    if len(ids) <= BATCH_SIZE:
      return self._batch(ids, mask), mask
    parts = []
    for start in range(0, len(ids), BATCH_SIZE):
      # The last batch overlaps the one before: there is one compiled shape.
      first = min(start, len(ids) - BATCH_SIZE)
      rows = slice(first, first + BATCH_SIZE)
      part = np.asarray(self._batch(ids[rows], mask[rows]))
      parts.append(part[start - first :])
    return np.concatenate(parts), mask

  def check(self, caption: str) -> None:
    """ValueError if a caption cannot be encoded: nothing is left of it."""
    self.tokenizer.check(caption)

  def _batch(self, ids, mask):
    if not self._mesh:
      return _encode(self.model, ids, mask)
    spare = -len(ids) % sharding.row_parts(self._mesh)
    arrays = [np.pad(a, ((0, spare), (0, 0)), "edge") for a in (ids, mask)]
    arrays = jax.device_put(arrays, sharding.rows(self._mesh))
    return _encode(self.model, *arrays)[: len(ids)]


def import_text_encoder(
  folder: str | pathlib.Path,
  dtype: str = "bfloat16",
  length: int = 120,
  mesh: Mesh | None = None,
) -> T5Encoder:
  """Opens the encoder of a published folder of T5 v1.1 or Flan-T5.

  Args:
    folder: holds tokenizer.json, and what `import_t5` reads.
    dtype: as in `import_t5`.
    length: tokens of a caption.
    mesh: what weights and batches are split over; None: one device.
  """
  folder = _existing(folder)
  tokenizer = CaptionTokenizer(folder / "tokenizer.json", length)
  return T5Encoder(import_t5(folder, dtype, mesh), tokenizer, mesh)


def import_t5(
  folder: str | pathlib.Path,
  dtype: str = "bfloat16",
  mesh: Mesh | None = None,
) -> t5.Model:
  """Imports the network of a published folder, token ids -> features.

  Args:
    folder: holds config.json and one of `hub.WEIGHTS`; an index needs the files
      that it names. A decoder may be there, it is not read. A name on the hub
      stands for the folder as well, see `hub.find`.
    dtype: of weights and computation, "float32" or "bfloat16" (in which the
      published image models were made and are sampled).
    mesh: what the weights are split over; None: one device has them.
  """
  folder = _existing(folder)
  remedy = "Download it again."
  fields = read_json(folder / "config.json", dict, remedy=remedy)
  config = t5.published_config(fields, dtype)
  model = weights.abstract(lambda rngs: t5.Model(config, rngs=rngs))
  tensors = torch_import.load_state_dict(hub.weights_of(folder))
  return torch_import.fill(model, t5.import_rules(config), tensors, dtype, mesh)


def _existing(folder: str | pathlib.Path) -> pathlib.Path:
  """The local folder of a name or path; ValueError if there is none."""
  if not (folder := hub.find(folder)).is_dir():
    raise ValueError(f"{folder}: no such folder. {hub.advice(folder)}")
  return folder


def _t5(folder, texts, mesh):
  return import_text_encoder(folder, texts.encoder_dtype, texts.length, mesh)


def _chat(folder, texts, mesh):
  del mesh  # the backbone has the weights
  encoder = chat.import_prompt_encoder(_existing(folder), texts.length)
  if encoder.vocab_size > texts.vocab_size:
    raise ValueError(
      f"{folder}: the tokenizer knows {encoder.vocab_size} tokens, the"
      f" conditioning {texts.vocab_size}. Set its vocab_size and the backbone's"
      " text_vocab_size to those of the published model."
    )
  return encoder


# Kind of encoder -> the function (folder, conditioning, mesh) that opens it, as
# an `interfaces.TextEncoder`.
TEXT_ENCODERS = {"t5": _t5, "chat": _chat}
