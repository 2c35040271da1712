"""Crops against the published arrays, decoding, and folders by class."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from tensorar_jax.data import images, sources
from tensorar_jax.nn import image_bytes


def picture(height, width, channels=3, seed=0):
  shape = (height, width, channels)
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels, kind="PNG", **options) -> bytes:
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind, **options)
  return file.getvalue()


def test_parity_of_crop_and_normalisation(parity):
  io_ = np.load(parity / "llamagen" / "postprocess" / "io.npz")
  sizes = io_["crop_sizes"].tolist()
  # Halving twice, once and never, enlarging, both orientations.
  for i, size in enumerate(sizes):
    crop = images.center_crop(io_[f"crop_in_{i}"], size)
    np.testing.assert_array_equal(crop, io_[f"crop_out_{i}"])
    chw = image_bytes.normalise(crop).transpose(2, 0, 1)
    np.testing.assert_array_equal(chw, io_[f"norm_out_{i}"])
    assert chw.dtype == np.float32
  ours = {f"crop_{end}_{i}" for end in ("in", "out") for i in range(len(sizes))}
  ours |= {f"norm_out_{i}" for i in range(len(sizes))} | {"crop_sizes"}
  rest = {name for name in io_ if not name.startswith(("resize_", "uint8_"))}
  assert rest == ours


@pytest.mark.parametrize("case", ["vq16", "vq8"])
def test_parity_of_the_recipes(parity, case):
  io_ = np.load(parity / "llamagen" / case / "io.npz")
  image, size = io_["src_image"], int(io_["src_image_size"])
  ranges = (float(io_["src_crop_range"]),)
  large = int(size * ranges[0])
  assert large == io_["src_crop_size"]
  crop = images.center_crop(image, large)
  np.testing.assert_array_equal(crop, io_["src_center_crop_big"])
  ten = images.Recipe("ten_crop", size, ranges)(image)
  np.testing.assert_array_equal(ten, io_["src_ten_crop"])
  center = images.Recipe("center", size)(image)
  np.testing.assert_array_equal(center, io_["src_center_crop"][None])
  flip = images.Recipe("flip", size)(image)
  np.testing.assert_array_equal(flip[0], io_["src_center_crop"])
  np.testing.assert_array_equal(flip[1], io_["src_center_crop"][:, ::-1])
  nchw = image_bytes.normalise(center).transpose(0, 3, 1, 2)
  np.testing.assert_array_equal(nchw, io_["src_normalised"])


def test_parity_of_the_crop_before_tokenizing(parity):
  io_ = np.load(parity / "rar" / "pretokenize" / "io.npz")
  cases = range(3)
  for i in cases:
    image, size = io_[f"image_{i}"], int(io_[f"size_{i}"])
    crop = io_[f"crop_{i}"]
    np.testing.assert_array_equal(images.center_crop(image, size), crop)
    for name in ("center", "flip"):
      ours = images.Recipe(name, size)(image)
      np.testing.assert_array_equal(ours[0], crop)
  claimed = {f"{kind}_{i}" for kind in ("image", "size", "crop") for i in cases}
  assert set(io_) == claimed


def test_the_published_recipes_of_json_lines():
  """RAR's: TenCrop(256) of a centre crop to 281, or a crop and its mirror."""
  image = picture(300, 410)
  large = images.center_crop(image, 281)
  expected = []
  for view in (large, large[:, ::-1]):
    # TenCrop's order, as torchvision 0.28 gives it.
    for top, left in ((0, 0), (0, 25), (25, 0), (25, 25), (12, 12)):
      expected.append(view[top : top + 256, left : left + 256])
  ours = images.Recipe("ten_crop", 256, (1.1,))(image)
  np.testing.assert_array_equal(ours, expected)
  crop = images.center_crop(image, 256)
  ours = images.Recipe("flip", 256)(image)
  np.testing.assert_array_equal(ours, [crop, crop[:, ::-1]])


@pytest.mark.parametrize(
  ("size", "slack", "offset"), [(384, 19, 10), (256, 25, 12), (5, 3, 2)]
)
def test_the_middle_of_ten_crops_is_rounded_half_to_even(size, slack, offset):
  image = picture(size + slack, size + slack, 1)
  crops = images.ten_crop(image, size)
  window = slice(offset, offset + size)
  np.testing.assert_array_equal(crops[4], image[window, window])
  # Of the mirrored image, which an odd slack tells from mirrored crops.
  np.testing.assert_array_equal(crops[9], image[:, ::-1][window, window])


def test_ten_crops_of_an_oblong_image():
  image = picture(5, 7)
  crops = images.ten_crop(image, 3)
  mirrored = image[:, ::-1]
  for source, five in ((image, crops[:5]), (mirrored, crops[5:])):
    expected = [source[:3, :3], source[:3, 4:], source[2:, :3]]
    expected += [source[2:, 4:], source[1:4, 2:5]]
    np.testing.assert_array_equal(five, expected)


def test_several_ranges_give_their_crops_together():
  image = picture(29, 31)
  both = images.Recipe("ten_crop", 20, (1.1, 1.05))
  assert both.num_variants == 20
  expected = [images.Recipe("ten_crop", 20, (r,))(image) for r in (1.1, 1.05)]
  np.testing.assert_array_equal(both(image), np.concatenate(expected))


def test_small_and_grey_images():
  image = picture(8, 8, 1)
  np.testing.assert_array_equal(images.center_crop(image, 8), image)
  assert images.center_crop(picture(3, 2, 1), 7).shape == (7, 7, 1)
  grey = np.repeat(picture(50, 40, 1), 3, axis=-1)
  np.testing.assert_array_equal(
    images.center_crop(grey, 11)[..., :1],
    images.center_crop(grey[..., :1], 11),
  )


def test_a_strip_is_cut_before_it_is_scaled(monkeypatch):
  """Whole, a strip of 2 x 8000 would take gigabytes."""
  areas, resize = [], Image.Image.resize

  def told(self, size, *args):
    areas.append(size[0] * size[1])
    return resize(self, size, *args)

  monkeypatch.setattr(Image.Image, "resize", told)
  for shape in ((2, 8000), (60_000, 3), (1, 70), (2, 8001)):
    image = picture(*shape)
    crop = images.center_crop(image, 64)
    assert max(areas) <= 64 * 64 * (images.MAX_RATIO + 1)
    # The same middle, wherever the strip ends.
    top, left = ((side - min(side, 12)) // 2 for side in shape)
    middle = image[top : top + 12 + shape[0] % 2, left:]
    middle = middle[:, : 12 + shape[1] % 2]
    expected = images.center_crop(middle, 64).astype(int)
    np.testing.assert_array_less(np.abs(crop - expected), 3)
    mirrored = images.center_crop(image[::-1, ::-1], 64).astype(int)
    np.testing.assert_array_less(np.abs(mirrored[::-1, ::-1] - crop), 3)


@pytest.mark.parametrize("size", [(300, 9600), (6, 192), (4000, 125)])
def test_other_crops_are_of_the_whole_image(size):
  """Bit for bit those of the published cropping, which scales it all."""
  image = picture(*size)
  monkey = pytest.MonkeyPatch()
  with monkey.context() as patched:
    patched.setattr(images, "_middle", lambda image: image)
    expected = images.center_crop(image, 17)
  np.testing.assert_array_equal(images.center_crop(image, 17), expected)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: images.center_crop(picture(3, 5), 0), "to 0x0"),
    (lambda: images.center_crop(picture(0, 5), 2), r"\(0, 5, 3\)"),
    (lambda: images.ten_crop(picture(3, 5), 4), "4x4 do not fit.*3x5"),
    (lambda: images.Recipe("nine", 4), "'nine' is unknown.*ten_crop"),
    (lambda: images.Recipe("ten_crop", 4, (0.9,)), "at least 1"),
  ],
)
def test_bad_options_are_errors(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_every_kind_of_image_becomes_rgb(tmp_path):
  pixels = picture(5, 7)
  for kind in ("PNG", "BMP", "TIFF", "PPM"):
    decoded = images.decode_image(encoded(pixels, kind))
    np.testing.assert_array_equal(decoded, pixels)
  grey = images.decode_image(encoded(pixels[..., 0]))
  np.testing.assert_array_equal(grey, np.repeat(pixels[..., :1], 3, -1))
  with_alpha = np.concatenate([pixels, pixels[..., :1]], -1)
  decoded = images.decode_image(encoded(with_alpha))
  np.testing.assert_array_equal(decoded, pixels)
  grey = images.decode_image(encoded(pixels), channels=1)
  assert grey.shape == (5, 7, 1) and grey.dtype == np.uint8
  alpha = images.decode_image(encoded(with_alpha), channels=4)
  np.testing.assert_array_equal(alpha, with_alpha)
  file = tmp_path / "a.jpg"
  file.write_bytes(encoded(pixels, "JPEG"))
  assert images.decode_image(file).shape == (5, 7, 3)
  assert images.decode_image(str(file)).dtype == np.uint8


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"


def test_only_listed_formats_are_opened(tmp_path, monkeypatch):
  """Pillow would start Ghostscript for an EPS file, whatever its name."""
  monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", pytest.fail)
  file = tmp_path / "cat.jpg"
  file.write_bytes(EPS)
  with pytest.raises(images.BrokenImageError, match="unknown format.*JPEG"):
    images.decode_image(file)
  for kind in ("ICO", "TGA", "PCX", "SGI"):
    with pytest.raises(images.BrokenImageError, match="unknown format"):
      images.decode_image(encoded(picture(16, 16), kind))
  for kind in images.FORMATS:
    assert images.decode_image(encoded(picture(4, 6), kind)).shape == (4, 6, 3)


def test_images_are_opened_in_one_place():
  package = pathlib.Path(images.__file__).parents[1]
  files = [p for p in package.rglob("*.py") if " Image.open(" in p.read_text()]
  assert files == [pathlib.Path(images.__file__)]


def test_the_number_of_pixels_is_bounded():
  """Before one is decoded; beyond Pillow's own bound, by Pillow."""
  for width, message in (
    (11_700, "11700 x 11500 pixels, more than 134,217,728"),
    (117_000, "1345500000 pixels. exceeds limit"),
  ):
    header = f"P5 {width} 11500 255\n".encode()
    with pytest.raises(images.BrokenImageError, match=message):
      images.decode_image(header)


def damaged():
  whole = {k: encoded(picture(64, 64), k) for k in ("PNG", "JPEG", "WEBP")}
  for kind, data in whole.items():
    yield f"half a {kind}", data[: len(data) // 2]
    yield f"the start of a {kind}", data[:20]
  yield "text", b"class,label\n1,2\n"
  yield "nothing", b""
  yield "page", b"<html>404 Not Found</html>"
  yield "wrong length", whole["PNG"][:8] + b"\xff" * 60
  yield "wrong crc", whole["PNG"][:40] + b"\xff\x00" * 9 + whole["PNG"][58:]


@pytest.mark.parametrize(
  "data", [pytest.param(data, id=name) for name, data in damaged()]
)
def test_broken_images_are_named(tmp_path, data):
  file = tmp_path / "n01440764_18.JPEG"
  file.write_bytes(data)
  with pytest.raises(ValueError, match=f"{file}: cannot be decoded") as one:
    images.decode_image(file)
  with pytest.raises(images.BrokenImageError, match="these bytes") as other:
    images.decode_image(data)
  assert one.value.reason == other.value.reason  # the same in every run


def test_what_cannot_be_read_is_not_a_broken_image(tmp_path):
  with pytest.raises(FileNotFoundError):
    images.decode_image(tmp_path / "missing.png")


def test_a_folder_is_in_the_order_of_torchvision(tmp_path):
  names = ("b/2.png", "b/10.PNG", "a/x/1.jpeg", "a/z.png", "B/1.png")
  for i, name in enumerate((*names, "b/notes.txt", "readme.txt")):
    file = tmp_path / "train" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encoded(picture(3 + i, 5), "PNG"))
  source = sources.load(f"folder:{tmp_path}", "train")
  assert isinstance(source, sources.Source)
  # Capitals first; a directory's own files before those further down.
  assert source.class_names == ("B", "a", "b")
  assert source.names == ("B/1.png", "a/z.png", "a/x/1.jpeg", "b/10.PNG") + (
    "b/2.png",
  )
  assert source.labels.tolist() == [0, 1, 1, 2, 2]
  assert (len(source), source.num_classes) == (5, 3)
  assert source.image_shape == (None, None, 3)
  for name, example in zip(source.names, source):
    assert example["image"].shape == (3 + names.index(name), 5, 3)
  assert example["label"] == 2 and example["label"].dtype == np.int32
  whole = sources.load(f"folder:{tmp_path / 'train'}", "train")
  assert whole.names == source.names
  assert whole.fingerprint() == source.fingerprint()
  (tmp_path / "train" / "b" / "2.png").unlink()
  fewer = sources.load(f"folder:{tmp_path}", "train")
  assert fewer.fingerprint() != source.fingerprint()


def test_bad_folders_are_errors(tmp_path):
  def load(split="train", path=tmp_path):
    sources.load(f"folder:{path}", split)

  with pytest.raises(ValueError, match="missing is no folder"):
    load(path=tmp_path / "missing")
  with pytest.raises(ValueError, match="has no subfolders.*per class"):
    load()
  (tmp_path / "train" / "cat").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"cat holds no images \(.jpg"):
    load()
  with pytest.raises(ValueError, match=r"'valid' of .*known are \['train'\]"):
    load("valid")
  with pytest.raises(ValueError, match="slices are not"):
    load("train[:7]", tmp_path / "train")
