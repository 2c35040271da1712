"""Requests for images, of classes or of prompts, as `--mode=sample` takes them.

Prompts are numbered, and the sampler treats a number as a class: only
`Prompts.encode` knows the features that belong to it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, Num, UInt8

from tensorar_jax.conditioning import captions, conditions
from tensorar_jax.conditioning.conditions import (
  ClassConditioning,
  TextConditioning,
)
from tensorar_jax.data import encoder, folders, leftovers
from tensorar_jax.experiment import build
from tensorar_jax.experiment.schema import Stage, choose
from tensorar_jax.generation.layouts import LAYOUTS, parse_line
from tensorar_jax.interfaces import Batch, Cond
from tensorar_jax.nn import checks

GRID = 100  # images in the grid
COLUMNS = 10  # of the grid
TITLE = 40  # letters of a prompt beside its row


@dataclasses.dataclass(frozen=True)
class Request:
  """A request for images: what to draw, from which checkpoint.

  Attributes:
    num_images: in all, or with prompts of each.
    classes: drawn in turn; None: all.
    seed: image i depends on (seed, i).
    resize: pixels a side of the files; None: as the tokenizer decodes them.
    prompts: instead of classes, one prompt after another.
    layout: a key of LAYOUTS: the files of a benchmark's scorer.
    sources: for a layout, the line or the id of each prompt.
    step: of the checkpoint; None: the newest.
  """

  num_images: int = 100
  classes: tuple[int, ...] | None = None
  seed: int = 0
  resize: int | None = None
  prompts: tuple[str, ...] | None = None
  layout: str | None = None
  sources: tuple[str, ...] | None = None
  step: int | None = None

  def __post_init__(self):
    checks.seed(self.seed)
    side = checks.Rule(
      f"1 to {checks.MAX_SIDE} pixels", lambda n: 1 <= n <= checks.MAX_SIDE
    )
    checks.numbers(self, checks.COUNT, "num_images")
    checks.numbers(self, side, "resize")
    each = 1 if self.prompts is None else len(self.prompts)
    if self.num_images * each > checks.MAX_IMAGES:
      of_each = "" if self.prompts is None else f" of each of {each} prompts"
      raise ValueError(
        f"num_images={self.num_images}{of_each}: expected at most"
        f" {checks.MAX_IMAGES:,} images in all; draw more by several seeds."
      )
    if self.classes is not None and not self.classes:
      raise ValueError("classes: expected at least one, or None for all.")
    if self.prompts is not None:
      if self.classes is not None:
        raise ValueError("classes and prompts: expected one or the other.")
      check_prompts(self.prompts, "prompt")
    if self.layout is not None:
      layout = choose("--layout", self.layout, LAYOUTS)
      if len(self.sources or ()) != len(self.prompts or ()) or not self.sources:
        raise ValueError(f"layout={self.layout!r} needs --prompts, its file.")
      if self.num_images not in layout.counts:
        raise ValueError(
          f"num_images={self.num_images}: the layout {self.layout!r} takes"
          f" {layout.counts} of each prompt."
        )

  def labels(self, num_classes: int) -> Int[np.ndarray, "n"]:
    """The class or prompt of each image; counts differ by at most one."""
    if self.prompts is not None:
      return np.repeat(np.arange(len(self.prompts)), self.num_images)
    chosen = range(num_classes) if self.classes is None else self.classes
    return np.resize(np.asarray(chosen, np.int64), self.num_images)

  @property
  def together(self) -> int:
    """The number of images written together: in a layout, all of a prompt."""
    return self.num_images if self.layout else 1

  def names(self, part: range) -> list[str]:
    """The names of the files of images, given by positions in the run."""
    if self.prompts is None:
      return [f"{part.start:06d}.png"]
    prompt, image = divmod(part.start, self.num_images)
    if not self.layout or self.sources is None:
      return [f"prompt_{prompt:03d}_image_{image:02d}.png"]
    return LAYOUTS[self.layout].names(prompt, self.sources[prompt], len(part))

  def contents(
    self, part: range, images: UInt8[np.ndarray, "n h w C"]
  ) -> list[Any]:
    """The contents of the files of `names`: images, or text."""
    if not self.layout or self.sources is None:
      return list(images)
    source = self.sources[part.start // self.num_images]
    return list(LAYOUTS[self.layout].contents(source, images))

  def grid(
    self, images: UInt8[np.ndarray, "n h w C"]
  ) -> tuple[UInt8[np.ndarray, "r c h w C"], list[str]]:
    """Up to GRID of the first images, a row per prompt, and titles of rows."""
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
  """A `Conditioning` of numbered texts; `rows` are their features, unpadded."""

  texts: TextConditioning
  rows: Sequence[Num[np.ndarray, "_ E"]]
  is_text = True
  null = staticmethod(conditions.null)
  drop = staticmethod(conditions.drop)

  @property
  def num_classes(self) -> int:
    return len(self.rows)

  def encode(self, raw: Int[np.ndarray, "B"]) -> Cond:
    """The condition of prompts by number."""
    chosen = [self.rows[number] for number in raw]
    return self.texts.encode(conditions.pad_left(chosen, self.texts.length))

  def from_batch(self, batch: Batch) -> Cond:
    """The condition of a batch's "label", the numbers of prompts."""
    return self.encode(np.asarray(batch["label"]))

  def example(self) -> Cond:
    return self.encode(np.zeros(1, int))


def condition(
  request: Request, name: str, stage: Stage, mesh: Mesh | None
) -> tuple[ClassConditioning | Prompts, dict[str, Any]]:
  """The conditioning of a request's images, and a description for its record.

  Prompts are encoded here, so the text encoder is freed on return. ValueError
  for classes or prompts that the stage does not know.
  """
  if request.prompts is None:
    conditioning = check_classes(name, stage)
    # An unknown class is an error here, before anything is written.
    conditioning.encode(np.unique(request.labels(conditioning.num_classes)))
    return conditioning, {"num_classes": conditioning.num_classes}
  conditioning = build.conditioning(stage.conditioning)
  if not isinstance(conditioning, TextConditioning):
    raise ValueError(
      f"stage {name!r} makes images from the conditioning"
      f" {stage.conditioning.name!r}, not from prompts:"
      " name --classes, or a stage that reads text."
    )
  encode = build.text_encoder(stage.conditioning, mesh)
  rows = conditions.real_rows(*encode(request.prompts))
  prompts = Prompts(conditioning, rows)
  return prompts, {"text_encoder": encoder.text_identity(encode)}


def check_classes(name: str, stage: Stage) -> ClassConditioning:
  """The conditioning by classes; ValueError if images are drawn from text."""
  reads = build.conditioning(stage.conditioning)
  if not isinstance(reads, ClassConditioning):
    raise ValueError(
      f"stage {name!r} makes images from text, there are no classes to draw:"
      " sample it with --mode=sample and --prompts=FILE or --prompt=TEXT;"
      " --mode=evaluate --samples=FILE.npz measures what that has written."
    )
  return reads


def read_prompts(
  path: pathlib.Path, layout: str | None = None
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
  """The prompts of --prompts, and with a layout the source of each.

  Without a layout, a prompt is a line of a text file. With "geneval", a line is
  a JSON object with `tag` and `prompt`, and the source is the line. With "dpg",
  the path is a folder with a text file ID.txt for each prompt, in the order of
  names, and the source is the id. ValueError for anything else.
  """
  if layout == "dpg":
    if not path.is_dir():
      raise ValueError(f"--prompts={path}: expected a folder of .txt files.")
    tree = folders.Tree(path)
    files = [path / name for name in tree.with_ending(".txt")]
    leftovers.say(path, tree.left_out)
    if not files:
      raise ValueError(f"--prompts={path}: expected a folder of .txt files.")
    sources = tuple(file.stem for file in files)
    check_prompts(sources, f"--prompts={path}, name")
    if dotted := [source for source in sources if "." in source]:
      raise ValueError(
        f"--prompts={path}: {dotted[0]}.txt has a dot in its id; the scorer"
        " would cut it off there. Rename the file, or take it out."
      )
    texts = [read_text(file).strip() for file in files]
    prompts = tuple(" ".join(text.splitlines()) for text in texts)
    for file, prompt in zip(files, prompts):
      check_prompts([prompt], f"{file}, prompt")
    return prompts, sources
  lines = read_text(path).removesuffix("\n").split("\n")
  lines = tuple(line.removesuffix("\r") for line in lines)
  check_prompts(lines, f"{path}, line", start=1)
  if layout is None:
    return lines, None
  prompts, seen = [], {}
  for number, line in enumerate(lines, 1):
    where = f"{path}, line {number}"
    entry = parse_line(line, where, {"prompt": str, "tag": str})
    if not entry["prompt"].strip():
      raise ValueError(f"{where}: the prompt is empty.")
    if flaw := captions.flaw(entry["prompt"]):
      raise ValueError(f"{where}: the prompt {flaw}: correct it.")
    if (first := seen.setdefault(line, number)) != number:
      raise ValueError(
        f"{where} is line {first} again: the scorer would count the two as one"
        " prompt."
      )
    prompts.append(entry["prompt"])
  return tuple(prompts), lines


def read_text(file: pathlib.Path) -> str:
  """Reads a file in UTF-8; ValueError if it is not, or holds only blanks."""
  try:
    text = file.read_bytes().decode("utf-8-sig")
  except (FileNotFoundError, IsADirectoryError) as error:
    raise ValueError(
      f"--prompts={file}: there is no such file. A folder goes with"
      " --layout=dpg."
    ) from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f"--prompts={file} is not text in UTF-8 ({error}): expected a prompt in"
      " each line, or file."
    ) from error
  if not text.strip():
    raise ValueError(f"--prompts={file} is empty: expected a prompt.")
  return text


def check_prompts(prompts: Sequence[str], where: str, start: int = 0) -> None:
  """ValueError if there are no prompts, or one is not a line of plain text."""
  if not prompts:
    raise ValueError("prompts: expected at least one.")
  for number, prompt in enumerate(prompts, start):
    if not prompt.strip():
      raise ValueError(f"{where} {number} is empty: expected a prompt.")
    if flaw := captions.flaw(prompt):
      raise ValueError(f"{where} {number}: {flaw}; expected plain text.")
    odd = [c for c in prompt if unicodedata.category(c) == "Cc" and c != "\t"]
    if odd:
      raise ValueError(
        f"{where} {number} holds the control character {odd[0]!r}: expected"
        " plain text, a prompt in each line; this may be a binary file."
      )
