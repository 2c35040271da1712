"""Images of more than 8 bits keep their greys, or are refused."""

import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from tensorar_jax.data import images, sources

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)  # every grey once


def file_of(pixels, kind, **tags) -> bytes:
  info, file = TiffImagePlugin.ImageFileDirectory_v2(), io.BytesIO()
  options = {}
  for tag, value in tags.items():
    info[int(tag.removeprefix("tag"))] = value
    options = {"tiffinfo": info}
  Image.fromarray(pixels).save(file, kind, **options)
  return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_by_their_range(kind, channels):
  data = file_of(RAMP * 257, kind)
  pixels = images.decode_image(data, channels)
  want = np.repeat(RAMP[..., None], channels, axis=2)
  assert pixels.dtype == np.uint8
  np.testing.assert_array_equal(pixels, want)


def test_a_big_endian_tiff_is_the_same():
  data = b"MM\x00\x2a" + np.array([8], ">u4").tobytes()
  entries = [
    (256, 4, 16),
    (257, 4, 16),
    (258, 3, 16),
    (259, 3, 1),
    (262, 3, 1),
    (273, 4, 8 + 2 + 8 * 12 + 4),
    (278, 4, 16),
    (279, 4, 512),
  ]
  data += np.array([len(entries)], ">u2").tobytes()
  for tag, kind, value in entries:
    data += np.array([tag, kind], ">u2").tobytes()
    data += np.array([1], ">u4").tobytes()
    one = np.array([value], ">u4" if kind == 4 else ">u2").tobytes()
    data += one.ljust(4, b"\0")
  data += b"\0" * 4 + (RAMP * 257).astype(">u2").tobytes()
  np.testing.assert_array_equal(images.decode_image(data, 1)[..., 0], RAMP)


def test_zero_is_white_where_the_file_says_so():
  data = file_of(65535 - RAMP * 257, "TIFF", tag262=0)
  np.testing.assert_array_equal(images.decode_image(data, 1)[..., 0], RAMP)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_range_are_broken_images(dtype):
  data = file_of((RAMP / 255).astype(dtype), "TIFF")
  with pytest.raises(images.BrokenImageError, match="without a known range"):
    images.decode_image(data)


def test_a_folder_with_a_16_bit_png_has_its_greys(field):
  source = sources.load(f"folder:{field / 'gray16'}", "train")
  image = source[0]["image"]
  with Image.open(field / "gray16" / "a" / "ramp.png") as opened:
    grey = np.array(opened) / 257
  np.testing.assert_allclose(image[..., 0], grey, atol=0.5)
  np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_8_bits_are_left_alone():
  for mode in ("L", "LA", "RGB", "RGBA", "P", "1", "CMYK"):
    picture = Image.new(mode, (2, 3))
    kind, file = "TIFF" if mode == "CMYK" else "PNG", io.BytesIO()
    picture.save(file, kind)
    with Image.open(io.BytesIO(file.getvalue())) as opened:
      want = np.array(opened.convert("RGB"))
    got = images.decode_image(file.getvalue())
    np.testing.assert_array_equal(got, want)
