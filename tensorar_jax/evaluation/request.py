"""What `--mode=sample` is asked for: images of classes, or of prompts.

Prompts are numbered, and a number is to the sampler what a class is: only
`encode` knows that features stand behind it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8

from tensorar_jax import build, conditioning
from tensorar_jax.conditioning import TextConditioning
from tensorar_jax.data import encoder
from tensorar_jax.interfaces import Batch, Cond, Conditioning

GRID = 100  # images in the grid
COLUMNS = 10  # of it
TITLE = 40  # letters of a prompt beside its row


@dataclasses.dataclass(frozen=True)
class Request:
  """Which images, at `resize` pixels a side.

  Of `classes` in turn (None: all), `num_images` in all; or of each of `prompts`
  `num_images`, one prompt after another.
  """

  num_images: int = 100
  classes: tuple[int, ...] | None = None
  seed: int = 0
  resize: int | None = None
  prompts: tuple[str, ...] | None = None

  def __post_init__(self):
    sizes = [n for n in (self.num_images, self.resize) if n is not None]
    if min(sizes) < 1:
      raise ValueError(
        f"num_images={self.num_images}, resize={self.resize}: expected at least"
        " 1."
      )
    if self.classes is not None and not self.classes:
      raise ValueError("classes: expected at least one, or None for all.")
    if self.prompts is not None:
      if self.classes is not None:
        raise ValueError("classes and prompts: expected one or the other.")
      check_prompts(self.prompts, "prompt")

  def labels(self, num_classes: int) -> Int[np.ndarray, "n"]:
    """The class, or prompt, of each image; counts differ by one at most."""
    if self.prompts is not None:
      return np.repeat(np.arange(len(self.prompts)), self.num_images)
    chosen = range(num_classes) if self.classes is None else self.classes
    return np.resize(np.asarray(chosen, np.int64), self.num_images)

  def file_name(self, image: int) -> str:
    """Of the PNG of an image, by its position in the run."""
    if self.prompts is None:
      return f"{image:06d}.png"
    prompt, image = divmod(image, self.num_images)
    return f"prompt_{prompt:03d}_image_{image:02d}.png"

  def grid(
    self, images: UInt8[np.ndarray, "n h w C"]
  ) -> tuple[UInt8[np.ndarray, "r c h w C"], list[str]]:
    """Up to GRID of the first images, a row a prompt, and titles of rows."""
    if self.prompts is None:
      columns = min(COLUMNS, len(images))
      rows, step = min(GRID, len(images)) // columns, columns
      titles = [""] * rows
    else:
      columns, step = min(COLUMNS, self.num_images), self.num_images
      rows = min(max(1, len(images) // step), GRID // columns)
      titles = [textwrap.shorten(p, TITLE) for p in self.prompts[:rows]]
    return images[np.arange(rows)[:, None] * step + np.arange(columns)], titles


@dataclasses.dataclass(frozen=True)
class Prompts:
  """A `Conditioning` of numbered texts, of which it keeps the real rows."""

  texts: TextConditioning
  rows: Sequence[Float[np.ndarray, "_ E"]]
  is_text = True
  null = staticmethod(conditioning.null)
  drop = staticmethod(conditioning.drop)

  @property
  def num_classes(self) -> int:
    return len(self.rows)

  def encode(self, raw: Int[np.ndarray, "B"]) -> Cond:
    """The condition of prompts by number."""
    chosen = [self.rows[number] for number in raw]
    return self.texts.encode(conditioning.pad_left(chosen, self.texts.length))

  def from_batch(self, batch: Batch) -> Cond:
    """The condition of a batch's "label", the numbers of prompts."""
    return self.encode(batch["label"])

  def example(self) -> Cond:
    return self.encode(np.zeros(1, int))


def condition(
  request: Request, name: str, stage: Mapping, mesh: Mesh | None
) -> tuple[Conditioning, dict[str, Any]]:
  """What the request's images are made of, and what to record of it.

  Prompts are encoded here, and the text encoder is gone on return. ValueError
  for classes or prompts that the stage does not know.
  """
  section = stage["conditioning"]
  conditions = build.conditioning(section)
  if request.prompts is None:
    check_classes(name, stage)
    # Refused before anything is written.
    conditions.encode(np.unique(request.labels(conditions.num_classes)))
    return conditions, {"num_classes": conditions.num_classes}
  if not conditions.is_text:
    raise ValueError(
      f"stage {name!r} makes images from the conditioning {section['name']!r},"
      " not from prompts: name --classes, or a stage that reads text."
    )
  encode = build.text_encoder(section, mesh)
  rows = conditioning.real_rows(*encode(request.prompts))
  return Prompts(conditions, rows), {
    "text_encoder": encoder.text_identity(encode)
  }


def check_classes(name: str, stage: Mapping) -> None:
  """ValueError unless images of the stage are drawn class by class."""
  if build.conditioning(stage["conditioning"]).is_text:
    raise ValueError(
      f"stage {name!r} makes images from text, there are no classes to draw:"
      " sample it with --mode=sample and --prompts=FILE or --prompt=TEXT;"
      " --mode=evaluate --samples=FILE.npz measures what that has written."
    )


def read_prompts(file: pathlib.Path) -> tuple[str, ...]:
  """A prompt from each line of a text file in UTF-8; ValueError for others."""
  try:
    text = file.read_bytes().decode("utf-8-sig")
  except FileNotFoundError as error:
    raise ValueError(f"--prompts={file}: there is no such file.") from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f"--prompts={file} is no text in UTF-8 ({error}): expected a prompt in"
      " each line."
    ) from error
  if not text.strip():
    raise ValueError(f"--prompts={file} is empty: expected a prompt a line.")
  prompts = text.removesuffix("\n").split("\n")
  prompts = tuple(prompt.removesuffix("\r") for prompt in prompts)
  check_prompts(prompts, f"{file}, line", start=1)
  return prompts


def check_prompts(prompts: Sequence[str], where: str, start: int = 0) -> None:
  """ValueError for none at all, and for the first that is no line of text."""
  if not prompts:
    raise ValueError("prompts: expected at least one.")
  for number, prompt in enumerate(prompts, start):
    if not prompt.strip():
      raise ValueError(f"{where} {number} is empty: expected a prompt.")
    odd = [c for c in prompt if unicodedata.category(c) == "Cc" and c != "\t"]
    if odd:
      raise ValueError(
        f"{where} {number} holds the control character {odd[0]!r}: expected"
        " plain text, a prompt in each line; this may be a binary file."
      )
