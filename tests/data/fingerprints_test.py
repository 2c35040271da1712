"""A digest of data changes where they change, and only there."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from tensorar_jax.data import fingerprints, sources


def png(seed: int) -> bytes:
  rng, file = np.random.default_rng(seed), io.BytesIO()
  pixels = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(file, "BMP")  # of one size, whatever it shows
  return file.getvalue()


@pytest.fixture
def folder(tmp_path):
  for number, name in enumerate(("a/0.bmp", "a/1.bmp", "b/0.bmp")):
    path = tmp_path / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(number))
  return tmp_path / "images"


def digest(folder):
  return fingerprints.of(sources.load(f"folder:{folder}", ""))


CHANGES = {
  "grown": lambda f: (f / "b" / "1.bmp").write_bytes(png(9)),
  "shrunk": lambda f: (f / "a" / "0.bmp").unlink(),
  "renamed": lambda f: (f / "a" / "0.bmp").rename(f / "a" / "2.bmp"),
  "relabelled": lambda f: (f / "a" / "1.bmp").rename(f / "b" / "1.bmp"),
  "changed": lambda f: (f / "a" / "0.bmp").write_bytes(png(7)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_folder_that_is_changed_has_another_digest(folder, change):
  before = digest(folder)
  assert before["images"] == 3 and digest(folder) == before
  change(folder)
  assert digest(folder)["sha256"] != before["sha256"]


def test_a_folder_may_be_moved(folder):
  before = digest(folder)
  moved = folder.with_name("elsewhere")
  shutil.move(folder, moved)
  assert digest(moved) == before


def test_every_source_has_a_digest_of_its_own(field, tmp_path):
  file = tmp_path / "a.jsonl"
  file.write_text('{"class_id": 1, "tokens": [1, 2]}\n' * 3)
  names = ("digits", "shapes", f"jsonl:{file}", f"webdataset:{field / 'dots'}")
  found = [fingerprints.of(sources.load(name, "train")) for name in names]
  found += [fingerprints.of(sources.load(n, "test")) for n in names[:2]]
  assert len({one["sha256"] for one in found}) == len(found)
  file.write_text('{"class_id": 1, "tokens": [1, 3]}\n' * 3)
  again = fingerprints.of(sources.load(names[2], "train"))
  assert again["sha256"] != found[2]["sha256"]


def test_of_many_files_a_sample_is_read(folder, monkeypatch):
  read, ends = [], fingerprints._ends
  monkeypatch.setattr(fingerprints, "SAMPLED", 2)
  monkeypatch.setattr(
    fingerprints, "_ends", lambda file: read.append(file.name) or ends(file)
  )
  digest(folder)
  assert len(read) == 2
