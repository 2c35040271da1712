"""Images of more than 8 bits, scaled by the range of their type.

Pillow's own conversion clips them at 255, which leaves a 16-bit image white.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0


def eight_bits(image: Image.Image) -> Image.Image:
  """The image with 8 bits a channel; those that have them stay as they are.

  ValueError for 32-bit integers and floating-point numbers: their files do not
  say which number is white.
  """
  mode, tags = image.mode, getattr(image, "tag_v2", {})
  # Pillow opens 16-bit files of these formats with 32-bit integers.
  is_16_bit = mode == "I" and image.format in ("PNG", "PPM")
  if not is_16_bit and not mode.startswith("I;16"):
    if mode in ("I", "F"):
      kind = "32-bit integers" if mode == "I" else "floating-point numbers"
      raise ValueError(f"{kind} without a known range; convert it to 8 bits")
    return image
  bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
  white = 2 ** min(bits, 16) - 1
  values = np.asarray(image).astype(np.float64)
  if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
    values = white - values
  scaled = np.rint(values * (255 / white))
  return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
