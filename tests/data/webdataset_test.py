"""Members of tars: their keys, what is there twice, joined and damaged ones."""

import io
import logging
import os
import tarfile

import numpy as np
import pytest
from flax import nnx

from tensorar_jax.data import images, sources, tokenize
from tensorar_jax.data.sources import webdataset
from tensorar_jax.tokenizers import pixels
from tests.data import captioned_test, folders_test
from tests.data.captioned_test import png

MOST = 2**20  # bytes of a caption


def load(folder):
  return sources.load(f"webdataset:{folder}", "train")


def texts(source) -> list[str]:
  return [source[i]["caption"] for i in range(len(source))]


def write_tar(file, members, mode="w"):
  """Writes (name, content) pairs, in order; a name may be there twice."""
  file.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(file, mode) as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


def test_keys_may_have_dots(field):
  source = load(field / "dots")
  assert texts(source) == ["one", "two", "three"]
  assert (source.damaged, source.left_out) == ((), {})


def test_what_continues_a_key_is_part_of_that_sample(tmp_path):
  members = {
    "d.1/0001.jpg": png(1),
    "d.1/0001.txt": b"one",
    "d.1/0001.cls.json": b"{}",
    "d.1/0001.seg.png": png(2),
    "d.1/0001.depth.v2.png": png(2),
    "0001.5.png": png(3),  # in another folder: nothing that it continues
    "x.a.png": png(4),
    "x.a.txt": b"x a",
    "x.b.png": png(5),
    "x.b.txt": b"x b",
  }
  captioned_test.write_tar(tmp_path / "a.tar", members)
  source = load(tmp_path)
  assert len(source) == 4
  assert source[0]["caption"] == "one"
  with pytest.raises(images.BrokenSampleError, match="caption is missing"):
    source[1]
  assert [source[i]["caption"] for i in (2, 3)] == ["x a", "x b"]
  (entry,) = source.left_out.values()
  assert entry["count"] == 3
  assert "a.tar: d.1/0001.seg.png" in entry["names"]


def test_the_members_of_a_sample_need_not_be_neighbours(tmp_path):
  names = [f"{i}.{kind}" for kind in ("png", "txt") for i in range(3)]
  members = [(n, png(0) if "png" in n else n.encode()) for n in names]
  write_tar(tmp_path / "a.tar", members)
  assert texts(load(tmp_path)) == ["0.txt", "1.txt", "2.txt"]


def test_a_corrected_member_is_read_and_counted(tmp_path, caplog):
  file = tmp_path / "a.tar"
  pair = [("0.png", png(0)), ("0.txt", b"old")]
  write_tar(file, [*pair, ("1.png", png(1)), ("1.txt", b"other")])
  write_tar(file, [("./0.txt", b"new")], "a")
  source = load(tmp_path)
  assert texts(source) == ["new", "other"]
  assert folders_test.named(source) == {"a.tar: 0.txt"}
  assert "left out 1: followed by another member of that name" in caplog.text
  # Two samples under one key: the second is read, the first is counted.
  write_tar(file, [*pair, ("0.png", png(2)), ("0.txt", b"second")])
  source = load(tmp_path)
  assert texts(source) == ["second"]
  want = images.decode_image(png(2))
  np.testing.assert_array_equal(source[0]["image"], want)
  assert list(folders_test.counts(source).values()) == [2]


def test_members_of_other_kinds_are_counted(tmp_path):
  file = tmp_path / "a.tar"
  members = [("0.png", png(0)), ("0.txt", b"one"), ("0.jpg", png(1))]
  members += [("._0.png", b""), ("__MACOSX/0.png", png(1)), ("0.cls", b"1")]
  write_tar(file, members)
  with tarfile.open(file, "a") as tar:
    link = tarfile.TarInfo("1.png")
    link.type, link.linkname = tarfile.SYMTYPE, "0.png"
    tar.addfile(link)
  (tmp_path / "b.tar.gz").write_bytes(b"")
  (tmp_path / "more").mkdir()
  source = load(tmp_path)
  want = images.decode_image(png(0))
  np.testing.assert_array_equal(source[0]["image"], want)
  assert len(source) == 1
  assert folders_test.named(source) == {
    *(f"a.tar: {name}" for name in ("._0.png", "__MACOSX/0.png", "0.jpg")),
    *("a.tar: 0.cls", "a.tar: 1.png", "b.tar.gz", "more"),
  }


# --- joined and damaged tars -------------------------------------------------


def test_joined_tars_are_read_to_their_end(field, tmp_path):
  source = load(field / "joined")
  assert (texts(source), source.damaged) == (["one", "two"], ())
  # Each has its own keys.
  write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.txt", b"one")])
  one = (tmp_path / "a.tar").read_bytes()
  write_tar(tmp_path / "a.tar", [("0.png", png(1)), ("0.txt", b"two")])
  two = (tmp_path / "a.tar").read_bytes()
  (tmp_path / "a.tar").write_bytes(one + two + bytes(512) + one)
  source = load(tmp_path)
  assert texts(source) == ["one", "two", "one"]
  assert (source.damaged, source.left_out) == ((), {})
  (tmp_path / "a.tar").write_bytes(one + two[:700])
  source = load(tmp_path)
  assert texts(source) == ["one"]
  assert source.damaged[0]["num_samples"] == 1
  (tmp_path / "a.tar").write_bytes(one + b"\1" * 2000)
  assert "a damaged member at" in load(tmp_path).damaged[0]["reason"]


def sized(name: str, size: int) -> bytes:
  """The header of a member that declares any size."""
  header = bytearray(tarfile.TarInfo(name).tobuf())
  if 0 <= size < 8**11:
    header[124:136] = b"%011o\0" % size
  else:  # as GNU tar writes what octal digits have no room for
    header[124:136] = (size % 2**96).to_bytes(12, "big")
    header[124] = 0x80 if size >= 0 else 0xFF
  header[148:156] = b" " * 8
  header[148:156] = b"%06o\0 " % sum(header)
  return bytes(header)


@pytest.mark.parametrize(
  ("name", "size"),
  [
    ("1.png", 8**11 - 1),
    ("1.png", 2**62),
    ("1.png", 2**80),
    ("1.png", -512),
    ("1.txt", -(2**70)),
    ("1.cls", 2**63),
    ("@longname", 2**33),
    ("@pax", 2**33),
    ("@pax", -(2**20)),
  ],
)
def test_absurd_sizes_are_damage_of_one_tar(tmp_path, name, size, caplog):
  pair = [("0.png", png(0)), ("0.txt", b"before")]
  write_tar(tmp_path / "a.tar", pair)
  with tarfile.open(tmp_path / "a.tar") as tar:
    tar.getmembers()
    end = tar.offset
  header = bytearray(sized(name, size))
  if name.startswith("@"):
    header[156:157] = {"@pax": b"x", "@longname": b"L"}[name]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
  whole = (tmp_path / "a.tar").read_bytes()[:end]
  rest = b"".join(sized(f"{i}.png", 0) for i in range(2, 5)) + bytes(1024)
  (tmp_path / "a.tar").write_bytes(whole + header + rest)
  write_tar(tmp_path / "b.tar", [("0.png", png(1)), ("0.txt", b"whole")])
  source = load(tmp_path)
  assert texts(source) == ["before", "whole"]
  (tar,) = source.damaged
  assert (tar["name"], tar["num_samples"]) == ("a.tar", 1)
  assert "a.tar: it cannot be read to its end" in caplog.text


def test_other_things_named_tar_are_not_opened(tmp_path):
  write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.txt", b"one")])
  (tmp_path / "b.tar").symlink_to("a.tar")
  (tmp_path / "c.tar").mkdir()
  (tmp_path / "._a.tar").write_bytes(b"\0\5\x16\7")
  os.mkfifo(tmp_path / "d.tar")
  source = load(tmp_path)
  assert texts(source) == ["one"] and not source.damaged
  left = {"b.tar", "c.tar", "._a.tar", "d.tar"}
  assert folders_test.named(source) == left


def test_the_index_keeps_what_is_left_out(field, monkeypatch, tmp_path, caplog):
  monkeypatch.setattr(webdataset, "_WORTH_KEEPING", 0)
  members = [("0.png", png(0)), ("0.txt", b"one"), ("0.cls", b"1")]
  write_tar(tmp_path / "a.tar", members)
  first = load(tmp_path)
  monkeypatch.setattr(webdataset, "_scan", None)
  again = load(tmp_path)
  assert first.left_out and again.left_out == first.left_out
  # An index of other rules is not used.
  monkeypatch.setattr(webdataset, "_SCAN", 1)
  with pytest.raises(TypeError):
    load(tmp_path)


# --- captions ----------------------------------------------------------------


def test_half_a_character_is_skipped_and_named(field, tmp_path, caplog):
  caplog.set_level(logging.INFO)
  source = load(field / "surrogate")
  tokenizer = pixels.Model(
    pixels.Config((5, 5), image_channels=3, levels=19), rngs=nnx.Rngs(0)
  )
  manifest = tokenize.tokenize(
    source,
    tokenizer,
    tmp_path,
    recipe="center",
    image_size=5,
    text=captioned_test.Letters(),
  )
  assert manifest["num_images"] == 1
  (skipped,) = manifest["skipped"]
  assert skipped["name"] == "a.tar, sample 0"
  assert r"is no text in UTF-8: it holds '\ud83d'" in skipped["reason"]
  assert "skipped: a.tar, sample 0" in caplog.text


def test_captions_and_images_of_absurd_sizes_are_skipped(tmp_path, monkeypatch):
  members = [("0.png", png(0)), ("0.txt", b"a" * (MOST + 1))]
  members += [("1.png", png(0)), ("1.txt", b"a" * MOST)]
  write_tar(tmp_path / "a.tar", members)
  source = load(tmp_path)
  with pytest.raises(images.BrokenSampleError, match="caption has 1,048,577 b"):
    source[0]
  assert source[1]["caption"] == "a" * MOST
  monkeypatch.setattr(images, "MAX_BYTES", 60)
  with pytest.raises(images.BrokenSampleError, match="image has .* more than"):
    source[1]
