"""Folders: every regular file once; the rest is left out, and counted."""

import io
import os
import socket

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tensorar_jax.data import folders, images, sources, tokenize
from tensorar_jax.tokenizers import pixels

LATIN = os.fsdecode(b"caf\xe9.png")


def put(file, seed=0):
  """Writes a small picture."""
  file.parent.mkdir(parents=True, exist_ok=True)
  draw = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
  data = io.BytesIO()
  Image.fromarray(draw).save(data, "PNG")
  file.write_bytes(data.getvalue())


def counts(source) -> dict[str, int]:
  return {reason: e["count"] for reason, e in source.left_out.items()}


def named(source) -> set[str]:
  return {name for e in source.left_out.values() for name in e["names"]}


def test_hidden_folders_are_no_classes(field, caplog):
  source = sources.load(f"folder:{field / 'hidden'}", "train")
  assert source.class_names == ("cat", "dog")
  assert source.names == ("cat/a.png", "dog/a.png")
  assert source.labels.tolist() == [0, 1]
  assert named(source) == {".ipynb_checkpoints", "__MACOSX"}
  assert "left out 2: hidden" in caplog.text
  assert ".ipynb_checkpoints, __MACOSX" in caplog.text


def test_hidden_files_and_other_kinds_are_counted(tmp_path):
  for name in ("cat/1.png", "cat/._1.png", "cat/.cache/2.png", "loose.png"):
    put(tmp_path / name)
  for name in ("cat/1.avif", "cat/notes.txt", "cat/Thumbs.db"):
    (tmp_path / name).write_bytes(b"")
  source = sources.load(f"folder:{tmp_path}", "")
  assert source.names == ("cat/1.png",)
  assert counts(source) == {
    folders.HIDDEN: 3,
    "beside the class folders": 1,
    "no image by its name": 2,
  }
  assert {"loose.png", "cat/1.avif", "cat/._1.png"} < named(source)


def test_every_file_is_there_once(tmp_path):
  """Links that loop, links to other classes, and links out of the set."""
  root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
  for i, name in enumerate(("ant/1.png", "bee/1.png", "bee/deep/2.png")):
    put(root / name, i)
  for i, name in enumerate(("cow/1.png", "cow/2.png", "single.png")):
    put(elsewhere / name, 9 + i)
  links = {
    "ant/self": ".",
    "ant/up": "..",
    "bee/deep/up": "../..",
    "bee/one": "two",
    "bee/two": "one",
    "bee/gone.png": "nowhere.png",
    "bee/other.png": "../ant/1.png",
    "kitty": "bee",
    "cow": str(elsewhere / "cow"),
    "ant/single.png": str(elsewhere / "single.png"),
    "ant/twice.png": str(elsewhere / "single.png"),
    "bee/cow": str(elsewhere / "cow"),
    "bee/root": "/",
  }
  for name, target in links.items():
    (root / name).symlink_to(target)
  (elsewhere / "cow" / "back").symlink_to(root)
  (elsewhere / "cow" / "up").symlink_to("..")
  source = sources.load(f"folder:{root}", "")
  assert source.class_names == ("ant", "bee", "cow")
  files = ("ant/1.png", "ant/single.png", "bee/1.png", "bee/deep/2.png")
  assert source.names == (*files, "cow/1.png", "cow/2.png")
  assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
  left = {*links, "cow/back", "cow/up"} - {"cow", "ant/single.png"}
  assert named(source) == left


def test_links_into_a_hidden_store_are_files(tmp_path):
  """As git-annex and datalad have them."""
  put(tmp_path / ".git" / "annex" / "sha1")
  (tmp_path / "ant").mkdir()
  for name in ("1.png", "2.png"):
    (tmp_path / "ant" / name).symlink_to("../.git/annex/sha1")
  source = sources.load(f"folder:{tmp_path}", "")
  assert source.names == ("ant/1.png",)
  assert named(source) == {".git", "ant/2.png"}


def test_pipes_and_devices_are_not_opened(tmp_path):
  put(tmp_path / "ant" / "1.png")
  os.mkfifo(tmp_path / "ant" / "pipe.png")
  (tmp_path / "ant" / "zero.png").symlink_to("/dev/zero")
  with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(str(tmp_path / "ant" / "s.png"))
    source = sources.load(f"folder:{tmp_path}", "")
  assert source.names == ("ant/1.png",)
  assert list(counts(source).values()) == [3]
  for name in ("pipe.png", "zero.png"):
    with pytest.raises(images.BrokenImageError, match="no regular file"):
      images.decode_image(tmp_path / "ant" / name)


def test_names_that_are_not_utf8_are_skipped_and_named(tmp_path, caplog):
  folder, out = tmp_path / "in", tmp_path / "out"
  put(folder / "ant" / "1.png")
  put(folder / "ant" / LATIN)
  put(folder / os.fsdecode(b"b\xe9b\xe9") / "2.png")
  source = sources.load(f"folder:{folder}", "")
  assert source.class_names == ("ant", r"b\udce9b\udce9")
  tokenizer = pixels.Model(
    pixels.Config((5, 5), image_channels=3, levels=19), rngs=nnx.Rngs(0)
  )
  manifest = tokenize.tokenize(
    source, tokenizer, out, recipe="center", image_size=5
  )
  assert manifest["num_images"] == 1
  skipped = [one["name"] for one in manifest["skipped"]]
  assert skipped == [r"ant/caf\udce9.png", r"b\udce9b\udce9/2.png"]
  assert r"caf\udce9.png: cannot be used (its name is not UTF-8" in caplog.text


def test_what_is_not_there_is_said_at_the_end_and_when_it_is_read(
  tmp_path, caplog
):
  folder, out = tmp_path / "in", tmp_path / "out"
  put(folder / "ant" / "1.png")
  (folder / "ant" / "2.png").write_bytes(b"no image")
  (folder / "ant" / "3.gif").write_bytes(b"")
  tokenizer = pixels.Model(
    pixels.Config((5, 5), image_channels=3, levels=19), rngs=nnx.Rngs(0)
  )
  source = sources.load(f"folder:{folder}", "")
  caplog.clear()
  manifest = tokenize.tokenize(
    source, tokenizer, out, recipe="center", image_size=5
  )
  assert manifest["left_out"] == source.left_out
  lines = (
    "left out 1: images or samples that cannot be used (ant/2.png)",
    "left out 1: no image by its name (ant/3.gif)",
  )
  assert all(line in caplog.text for line in lines)
  caplog.clear()
  sources.load(f"tokens:{out}", "train")
  assert all(line in caplog.text for line in lines)
