"""Pictures of images and of their tokens, for people.

The refinement of tokens is given as a strip (the pictures after 1 .. k looks)
and as the cells that each look changed. Two more pictures are made from these:
an image as it grew, where each cell is cut from the picture after as many looks
as it has had; and a map of the last look that changed each cell.

matplotlib and PIL are imported where they are used: importing this module costs
nothing. Tiles are laid out in whole pixels, so tiny images keep sharp edges.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tensorar_jax.checkpoints import files
from tensorar_jax.method import windows

_TILE = 72  # smaller images are enlarged to about this many pixels
_STRIP_TILE = 115  # the same for a strip
_FRAMES = 64  # most frames of an image that grows; the last is shown longer
_GAP, _MARGIN = 4, 24  # pixels
_PAGE = 1800  # panels wrap at this width
_MARK = np.array([255, 106, 0], np.uint8)
_BLANK = np.array([222, 228, 236], np.uint8)  # a cell that is not drawn yet
INK, MUTED = "#1f2328", "#656d76"
Path_ = str | Path
Tiles = UInt8[np.ndarray, "n S H W 3"]  # n images in S states
Strip = Any  # uint8 [n, k, h, w, C] after 1 .. k looks; checked below
Changed = Any  # bool [n, k, r, c], the cells that a look has changed
Named = Mapping[str, Any]  # by model, stage or caption


def _images(array: Any, name: str, rank: int) -> np.ndarray:
  """The array; ValueError unless it is a non-empty uint8 array of images."""
  array = np.asarray(array)
  good = array.ndim == rank and array.size and array.dtype == np.uint8
  if not good or array.shape[-1] not in (1, 3):
    axes = {4: "[frames, h, w, C]", 5: "[rows, columns, h, w, C]"}[rank]
    raise ValueError(
      f"{name} is {array.dtype} {array.shape}; expected a non-empty uint8 "
      f"{axes} with C = 1 or 3: scale to 0..255 and cast, or add the axis."
    )
  return array


def _enlarge(images: np.ndarray, side: int) -> np.ndarray:
  """RGB images, their pixels repeated until the longer side is near `side`."""
  factor = max(1, round(side / max(images.shape[-3:-1])))
  images = np.repeat(np.repeat(images, factor, axis=-3), factor, axis=-2)
  return np.broadcast_to(images, (*images.shape[:-1], 3))


def _corners(panels: Named, left: int, top: int) -> list[tuple[int, int]]:
  """The corner of each panel's first tile, in lines of about equal width."""
  if not panels:
    raise ValueError(
      "there are no pictures; expected a model or more: add one."
    )
  widths = [_MARGIN + _width(name, tiles) for name, tiles in panels.items()]
  page = sum(widths) / math.ceil(sum(widths) / _PAGE)
  corners, x, y, height = [], 0, _MARGIN + top, 0
  for tiles, width in zip(panels.values(), widths):
    if x + width / 2 > page:
      x, y, height = 0, y + height + _MARGIN + top, 0
    corners.append((left + x, y))
    x, height = x + width, max(height, tiles.shape[0] * (tiles.shape[2] + _GAP))
  return corners


def _width(name: str, tiles: np.ndarray) -> int:
  """The width of a panel: that of its tiles or its title."""
  return max(tiles.shape[1] * (tiles.shape[3] + _GAP) - _GAP, 10 * len(name))


def _save_panels(
  path: Path_, panels: Named, columns: Named, rows: Sequence[str], legend: str
) -> None:
  """Writes panels of tiles `[n, m, H, W, 3]` as one PNG, wrapped to a page."""
  from matplotlib.figure import Figure

  left = _MARGIN + max([10 + 9 * len(text) for text in rows], default=0)
  corners = _corners(panels, left, 52 if columns else 32)
  texts, pastes = [], []  # (x, y, text, style) and (x, y, tile)
  for (name, tiles), (x, y) in zip(panels.items(), corners):
    bold = {"color": INK, "fontsize": 13, "weight": "bold"}
    texts.append((x, y - (40 if columns else 16), name, bold))
    tall, wide = tiles.shape[2] + _GAP, tiles.shape[3] + _GAP
    for i, j in np.ndindex(tiles.shape[:2]):
      pastes.append((x + j * wide, y + i * tall, tiles[i, j]))
    for j, text in enumerate(columns.get(name, ())):
      texts.append((x + j * wide + wide / 2, y - 8, text, {"ha": "center"}))
    for i, text in enumerate(rows if x == left else ()):
      style = {"ha": "right", "va": "center"}
      texts.append((x - 10, y + i * tall + tall / 2, text, style))
  width = max(x + _width(*p) for (x, _), p in zip(corners, panels.items()))
  height = max(y + len(tile) for _, y, tile in pastes)
  width, height = width + _MARGIN, height + _MARGIN * (2 if legend else 1)
  if legend:
    texts.append((_MARGIN, height - 24, "\u25a0", {"color": _MARK / 255}))
    texts.append((_MARGIN + 16, height - 24, legend, {}))
  canvas = np.full((height, width, 3), 255, np.uint8)
  for x, y, tile in pastes:
    canvas[y : y + len(tile), x : x + tile.shape[1]] = tile
  figure = Figure(figsize=(width / 100, height / 100), dpi=100)
  figure.figimage(canvas)
  for x, y, text, style in texts:
    style = {"color": MUTED, "fontsize": 10, "parse_math": False, **style}
    figure.text(x / width, 1 - y / height, text, **style)
  save_figure(path, figure, dpi=100)


def save_sample_grids(
  path: Path_, grids: Named, row_labels: Sequence[str]
) -> None:
  """Writes a PNG with a panel of samples per model; rows are classes."""
  panels = {}
  for name, grid in grids.items():
    grid = _images(grid, f"grid {name!r}", 5)
    if len(grid) != len(row_labels):
      raise ValueError(
        f"grid {name!r} has {len(grid)} rows; expected {len(row_labels)}, one "
        "for each of row_labels: give one label per class."
      )
    panels[name] = _enlarge(grid, _TILE)
  _save_panels(path, panels, {}, [str(label) for label in row_labels], "")


def save_refinement(
  path: Path_, strips: Named, changed: Named | None = None
) -> None:
  """Writes a PNG of the pictures after 1 .. k looks, one panel per model.

  `changed[name]`, bool `[n, k, rows, columns]`, is true where a token of the
  grid differs from the look before; those areas are outlined from look 2 on.
  """
  panels, columns = {}, {}
  for name, strip in strips.items():
    strip = _images(strip, f"strip {name!r}", 5)
    panels[name] = _enlarge(strip, _STRIP_TILE)
    if changed and name in changed:
      panels[name] = look_tiles(strip, changed[name], _STRIP_TILE, name)
    looks = range(1, strip.shape[1] + 1)
    columns[name] = [f"after {i} look{'s' * (i > 1)}" for i in looks]
  legend = "tokens that differ from the look before" if changed else ""
  _save_panels(path, panels, columns, (), legend)


def look_tiles(
  strip: Strip, changed: Changed, side: int, name: str = ""
) -> Tiles:
  """Enlarges a strip and outlines what each look from the second on changed.

  Errors call the strip `name`.
  """
  tiles = _enlarge(_images(strip, f"strip {name!r}", 5), side)
  changed = _cells(changed, tiles.shape[:2], name).copy()
  changed[:, 0] = False  # nothing comes before the first look
  return _outline(tiles, changed)


def growth_tiles(
  strip: Strip, changed: Changed, side: int, name: str = ""
) -> Tiles:
  """Shows how images grew token by token, in S <= 64 enlarged frames.

  Cells that changed since the frame before are outlined; the last frame is the
  finished image.
  """
  strip = _images(strip, f"strip {name!r}", 5)
  changed = _cells(changed, strip.shape[:2], name)
  window, rows, columns = changed.shape[1:]
  num_tokens = rows * columns
  steps = np.linspace(0, num_tokens - 1, min(num_tokens, _FRAMES), dtype=int)
  looks = windows.looks_at(steps, window, num_tokens)  # [S, T]
  before = np.vstack([looks[:1], looks[:-1]])
  # changes[:, l, p]: how many of the looks 2 .. l have changed position p.
  changes = changed.reshape(len(changed), window, -1).cumsum(axis=1)
  changes -= changes[:, :1]
  changes = np.pad(changes, ((0, 0), (1, 0), (0, 0)))
  position = np.arange(num_tokens)
  new = changes[:, looks, position] > changes[:, before, position]
  new &= before > 0  # [n, S, T]
  cut = _stretch(looks.reshape(-1, rows, columns), strip.shape[2:4])
  y, x = np.ogrid[: strip.shape[2], : strip.shape[3]]
  frames = np.broadcast_to(strip, (*strip.shape[:4], 3))
  frames = frames[:, np.maximum(cut, 1) - 1, y, x]  # [n, S, h, w, 3]
  frames = np.where(cut[None, ..., None] > 0, frames, _BLANK)
  new = new.reshape(*new.shape[:2], rows, columns)
  return _outline(_enlarge(frames, side), new)


def heat_colors(window: int) -> UInt8[np.ndarray, "k 3"]:
  """A colour for each look that may be the last to change a cell."""
  from matplotlib import colormaps

  warm = colormaps["YlOrRd"](np.linspace(0.25, 0.95, max(1, window - 1)))
  colors = np.vstack([_BLANK, np.round(255 * warm[:, :3])])
  return colors[:window].astype(np.uint8)


def heat_tiles(changed: Changed, size: tuple[int, int]) -> Tiles:
  """Maps, after each look, of the last look that changed a cell, in colour."""
  changed = _cells(changed, np.shape(changed)[:2], "tokens")
  look = np.arange(changed.shape[1])[:, None, None]
  last = np.maximum.accumulate(np.where(changed, look, 0), axis=1)
  return heat_colors(changed.shape[1])[_stretch(last, size)]


def _cells(changed: Any, like: tuple[int, int], name: str) -> np.ndarray:
  """The array; ValueError unless it is bool, of `like` = (n, k) pictures."""
  changed = np.asarray(changed)
  good = changed.dtype == bool and changed.ndim == 4 and changed.size
  if not good or changed.shape[:2] != like:
    raise ValueError(
      f"changed {name!r} is {changed.dtype} {changed.shape}; expected bool [n, "
      f"k, rows, columns] with n, k = {like} as the strips have: compare the"
      " tokens of consecutive looks."
    )
  return changed


def _stretch(cells: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Cells `[..., rows, columns]` as pixels `[..., *size]`."""
  rows = np.arange(size[0]) * cells.shape[-2] // size[0]
  columns = np.arange(size[1]) * cells.shape[-1] // size[1]
  return cells[..., rows[:, None], columns]


def _outline(tiles: np.ndarray, marked: np.ndarray) -> np.ndarray:
  """Draws a line around each area of marked cells, and tints its inside."""
  height, width = tiles.shape[2:4]
  inside = _stretch(marked, (height, width))  # [n, S, H, W]
  # A pixel is on the line if it is inside and one 2 pixels away is not.
  padded = np.pad(inside, ((0, 0), (0, 0), (2, 2), (2, 2)))
  rows = np.logical_and.reduce([padded[:, :, y : y + height] for y in range(5)])
  deep = np.logical_and.reduce([rows[..., x : x + width] for x in range(5)])
  line = inside & ~deep
  tint = inside & ~line  # sets the inside apart from the outside
  tiles = tiles.copy()
  tiles[line] = _MARK
  tiles[tint] = (
    tiles[tint] + 0.15 * (_MARK - tiles[tint].astype(float))
  ).astype(np.uint8)
  return tiles


def in_a_row(tiles: UInt8[np.ndarray, "n H W 3"]) -> UInt8[np.ndarray, "H w 3"]:
  """Lays tiles side by side on white."""
  gap = ((0, 0), (0, 0), (0, _GAP), (0, 0))
  return np.hstack(list(np.pad(tiles, gap, constant_values=255)))[:, :-_GAP]


def save_refinement_gif(path: Path_, strips: Named, changed: Named) -> None:
  """Writes a GIF of images drawn token by token, a row for each model.

  The arguments are those of `save_refinement`.
  """
  from PIL import Image, ImageDraw, ImageFont

  if not strips:
    raise ValueError("there are no pictures; expected a model or more.")
  grown = [
    growth_tiles(strip, changed[name], _STRIP_TILE, name)
    for name, strip in strips.items()
  ]
  frames = []
  for i in range(max(tiles.shape[1] for tiles in grown)):
    rows = [in_a_row(t[:, min(i, t.shape[1] - 1)]) for t in grown]
    width = max(row.shape[1] for row in rows)
    title = 26 if any(strips) else 0  # pixels for the name above a row
    rows = [
      np.pad(
        row,
        ((title, _GAP), (0, width - row.shape[1]), (0, 0)),
        constant_values=255,
      )
      for row in rows
    ]
    picture = Image.fromarray(np.vstack(rows))
    pen, y = ImageDraw.Draw(picture), 0
    for name, row in zip(strips, rows):
      font = ImageFont.load_default(15)
      pen.text((0, y + 4), name, fill=INK, font=font)
      y += len(row)
    frames.append(np.asarray(picture))
  save_gif(path, np.stack(frames))


def save_gif(path: Path_ | io.BytesIO, frames: UInt8[np.ndarray, "S H W 3"]):
  """Writes an endless GIF of about 6 s that rests on its last frame."""
  from PIL import Image

  first, *more = [
    Image.fromarray(f).quantize(dither=Image.Dither.NONE) for f in frames
  ]
  # Browsers slow down frames of 10 ms and less.
  milliseconds = max(40, min(500, 6000 // len(frames)))
  durations = [milliseconds] * len(more) + [2500]
  options = {"save_all": True, "duration": durations, "loop": 0}
  with _whole(path) as file:
    first.save(file, format="GIF", append_images=more, **options)


def save_image(path: Path_ | io.BytesIO, image: Any) -> None:
  """Writes one uint8 image [h, w, C] as a PNG, pixel for pixel."""
  from PIL import Image

  image = _images(np.asarray(image)[None], "image", 4)[0]
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  with _whole(path) as file:
    picture.save(file, format="PNG")


def save_figure(path: Path_, figure: Any, **options: Any) -> None:
  """Writes a figure of matplotlib as a PNG, whole or not at all."""
  with _whole(path) as file:
    figure.savefig(file, format="png", **options)


@contextlib.contextmanager
def _whole(path: Path_ | io.BytesIO) -> Iterator[Path | io.BytesIO]:
  """Where to write: a file that becomes `path` when it is whole, or memory."""
  if isinstance(path, io.BytesIO):
    yield path
  else:
    with files.replacing(Path(path)) as partial:
      yield partial
