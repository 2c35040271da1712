"""Image files: decoding, and the crops that are tokenized.

| recipe   | variants of an image                                          |
| -------- | ------------------------------------------------------------- |
| center   | the centre crop                                               |
| flip     | the centre crop, and the same mirrored                        |
| ten_crop | ten crops of the centre crop to int(image_size * crop_range), |
|          | for each range given                                          |

The centre crop is ADM's (openai/guided-diffusion, image_datasets.py), which
LlamaGen and most class-conditional models share: halve with a box filter while
the short side is at least twice the target, then bicubic, then crop. The ten
crops are torchvision's: the corners, the centre, and all five mirrored.
LlamaGen is trained on those of ranges 1.1 and 1.05, drawn alike.

All images are opened here, and only in `FORMATS`: Pillow knows some, such as
EPS, that start another program. What is larger than the bounds below is no
image of a data set, but a mistake or an attack.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import stat
import struct
import zlib
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tensorar_jax.data import leftovers
from tensorar_jax.data.eight_bits import eight_bits

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # Pillow's, by channels
RECIPES = {"center": 1, "flip": 2, "ten_crop": 10}
# What torchvision's ImageFolder takes for an image, so that positions agree.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm")
EXTENSIONS += (".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**27  # decoded, 3 bytes each
MAX_BYTES = 2**30  # of a file
# How many times as long as it is wide an image is scaled. Scaling all of a
# strip of 2 x 8000 pixels to a side of 256 would take gigabytes.
MAX_RATIO = 32
# Pillow's decoders raise all of these on damaged bytes.
_DECODING_ERRORS = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  RuntimeError,
  TypeError,
  LookupError,
  struct.error,
  zlib.error,
  Image.DecompressionBombError,
)


class BrokenSampleError(ValueError):
  """An image, or what belongs to it, cannot be used; `reason` says why."""

  problem, expected = "cannot be used", "an image and its caption"

  def __init__(self, name: str, reason: str):
    self.name, self.reason = name, reason
    super().__init__(
      f"{name}: {self.problem} ({reason}); expected {self.expected}: replace"
      " or remove it; --mode=tokenize skips it"
    )


class BrokenImageError(BrokenSampleError):
  """The bytes are no image, or not a whole one; `reason` is Pillow's."""

  problem = "cannot be decoded"
  expected = f"a whole image in one of the formats {', '.join(FORMATS)}"


def check_name(name: str) -> None:
  """BrokenSampleError if a file's name is no UTF-8: no report can hold it."""
  if (shown := leftovers.shown(name)) != name:
    raise BrokenSampleError(shown, "its name is not UTF-8; rename it")


def decode_image(
  file: str | os.PathLike | bytes, channels: int = 3
) -> UInt8[np.ndarray, "h w {channels}"]:
  """The pixels of an image file or of its bytes, RGB or of other `MODES`.

  Raises BrokenImageError, a ValueError that names the file, if they cannot be
  decoded. A file that cannot be read at all is an OSError: then the disk is at
  fault, and the run should not go on without the image.
  """
  is_bytes = isinstance(file, bytes)
  name = "these bytes" if is_bytes else leftovers.shown(os.fspath(file))
  data = file if is_bytes else _read(pathlib.Path(file), name)
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"{size}, more than {MAX_PIXELS:,}")
      pixels = np.array(eight_bits(image).convert(MODES[channels]))
      return pixels.reshape(*pixels.shape[:2], channels)
  except _DECODING_ERRORS as error:
    # Pillow's own message holds the address of our buffer, never the same.
    known = not isinstance(error, Image.UnidentifiedImageError)
    reason = str(error) if known else f"{len(data)} bytes of unknown format"
    raise BrokenImageError(name, reason) from error


def _read(file: pathlib.Path, name: str) -> bytes:
  """The bytes of a regular file of bounded size; others are broken images."""
  status = file.stat()
  if not stat.S_ISREG(status.st_mode):
    raise BrokenImageError(name, "no regular file")
  if status.st_size > MAX_BYTES:
    size = f"{status.st_size:,} bytes, more than {MAX_BYTES:,}"
    raise BrokenImageError(name, size)
  return file.read_bytes()


def center_crop(
  image: UInt8[np.ndarray, "h w C"], size: int
) -> UInt8[np.ndarray, "s s C"]:
  """The middle of the image, its short side scaled to `size`."""
  if size < 1 or 0 in image.shape:
    raise ValueError(
      f"cannot crop an image of shape {image.shape} to {size}x{size}; expected"
      " at least one pixel"
    )
  image = _middle(image)
  # Pillow has no name for a last axis of 1.
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  while min(picture.size) >= 2 * size:
    half_size = picture.width // 2, picture.height // 2
    picture = picture.resize(half_size, Image.Resampling.BOX)
  scale = size / min(picture.size)
  scaled = round(picture.width * scale), round(picture.height * scale)
  picture = picture.resize(scaled, Image.Resampling.BICUBIC)
  pixels = np.array(picture).reshape(*scaled[::-1], image.shape[-1])
  top, left = ((side - size) // 2 for side in pixels.shape[:2])
  return pixels[top : top + size, left : left + size]


def _middle(image):
  """The middle of a strip, MAX_RATIO times as long as wide; others whole.

  All of the centre crop lies in it. What is cut off is the same at both ends,
  so that the pixels of the crop stay where they are.
  """
  most = MAX_RATIO * min(image.shape[:2])
  top, left = (max(0, (side - most) // 2) for side in image.shape[:2])
  return image[top : len(image) - top, left : image.shape[1] - left]


def ten_crop(
  image: UInt8[np.ndarray, "h w C"], size: int
) -> UInt8[np.ndarray, "10 s s C"]:
  """Top left, top right, bottom left, bottom right, centre; then mirrored.

  The mirrored five are those of the mirrored image: the sixth is its top left.
  """
  height, width, _ = image.shape
  if not 1 <= size <= min(height, width):
    raise ValueError(
      f"ten crops of {size}x{size} do not fit an image of {height}x{width}; "
      "expected one at least as large"
    )
  down, right = height - size, width - size
  # Half to even, as torchvision rounds: a slack of 19 gives 10, of 25 gives 12.
  corners = ((0, 0), (0, right), (down, 0), (down, right))
  corners += ((round(down / 2), round(right / 2)),)
  return np.stack(
    [
      view[top : top + size, left : left + size]
      for view in (image, image[:, ::-1])
      for top, left in corners
    ]
  )


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Cuts the variants of an image; see the table above."""

  name: str
  image_size: int
  crop_ranges: tuple[float, ...] = (1.1,)

  def __post_init__(self):
    if self.name not in RECIPES:
      raise ValueError(
        f"recipe {self.name!r} is unknown; expected one of {list(RECIPES)}"
      )
    if not self.crop_ranges or min(self.crop_ranges) < 1:
      raise ValueError(
        f"crop_range={self.crop_ranges}: expected at least 1, such as 1.1"
      )
    if self.image_size < 1:
      raise ValueError(f"image_size={self.image_size}: expected at least 1")

  @property
  def num_variants(self) -> int:
    repeats = len(self.crop_ranges) if self.name == "ten_crop" else 1
    return RECIPES[self.name] * repeats

  def __call__(
    self, image: UInt8[np.ndarray, "h w C"]
  ) -> UInt8[np.ndarray, "A s s C"]:
    """The variants of an image of any size."""
    size = self.image_size
    if self.name == "ten_crop":
      large = (int(size * scale) for scale in self.crop_ranges)
      crops = (center_crop(image, side) for side in large)
      return np.concatenate([ten_crop(crop, size) for crop in crops])
    crop = center_crop(image, size)
    return np.stack([crop, crop[:, ::-1]] if self.name == "flip" else [crop])

  def settings(self) -> dict[str, Any]:
    """The settings that the tokens depend on."""
    ranges = list(self.crop_ranges) if self.name == "ten_crop" else None
    return {
      "recipe": self.name,
      "image_size": self.image_size,
      "crop_range": ranges,
      "num_variants": self.num_variants,
    }
