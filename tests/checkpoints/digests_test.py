"""No flipped bit of a checkpoint goes unseen."""

import os
import shutil

import jax.numpy as jnp
import pytest

from tensorar_jax.checkpoints import digests, orbax_io


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A checkpoint folder."""
  folder = tmp_path_factory.mktemp("saved")
  checkpoints = orbax_io.Checkpoints(folder)
  state = {"params": {"a": jnp.arange(300.0), "b": jnp.ones((3, 5))}}
  checkpoints.save(7, state, {"next_index": 12}, {"config": {"seed": 0}})
  checkpoints.close()
  return folder / "7"


def flip(path, bit: int) -> None:
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def read_names(folder) -> list[str]:
  """The files of the items, and the digests."""
  return [
    path.relative_to(folder).as_posix()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and (path.parent != folder or path.name == digests.FILE)
  ]


def test_every_flipped_bit_is_found(saved, tmp_path):
  """In each file: bits at the ends and in between, in every place of a byte."""
  folder = shutil.copytree(saved, tmp_path / "7")
  digests.verify(folder, orbax_io.ITEMS)
  names, flips = read_names(folder), 0
  assert {"data/metadata", "meta/metadata", "state/_METADATA"} <= {*names}
  assert sum(name.startswith("state/ocdbt") for name in names) > 3
  for name in names:
    path = folder / name
    content, bits = path.read_bytes(), 8 * path.stat().st_size
    for i in range(min(bits, 17)):
      flip(path, (i * (bits - 1) // 16 + i) % bits)
      with pytest.raises(ValueError, match="changed|digests.json"):
        digests.verify(folder, orbax_io.ITEMS)
      path.write_bytes(content)
      flips += 1
  assert flips > 200
  digests._digest_once.cache_clear()
  digests.verify(folder, orbax_io.ITEMS)


def test_every_reader_compares_what_it_reads(saved, tmp_path):
  for item, read in (
    ("meta/metadata", orbax_io.read_meta),
    ("state/_METADATA", orbax_io.read_weights),
    ("state/_METADATA", orbax_io.weight_shapes),
    ("state/manifest.ocdbt", orbax_io.read_weights),
  ):
    folder = shutil.copytree(saved, tmp_path / str(len(os.listdir(tmp_path))))
    assert read(folder)
    flip(folder / item, 200)
    with pytest.raises(ValueError, match="cannot be read .*has changed since"):
      read(folder)


def test_lost_and_added_files_are_found(saved, tmp_path):
  folder = shutil.copytree(saved, tmp_path / "7")
  (folder / "state" / "_sharding").rename(folder / "state" / "new")
  with pytest.raises(ValueError, match="is not in the folder, or not in dig"):
    digests.verify(folder, ["state"])
  digests.verify(folder, ["data", "meta"])


def test_processes_compare_a_share_each(saved, tmp_path):
  folder = shutil.copytree(saved, tmp_path / "7")
  flip(folder / "state" / "_sharding", 0)
  found = 0
  for index in range(3):
    try:
      digests.verify(folder, ["state"], (index, 3))
    except ValueError:
      found += 1
  assert found == 1


def test_what_orbax_alone_writes_is_not_read(saved, tmp_path):
  folder = shutil.copytree(saved, tmp_path / "7")
  others = [p for p in folder.iterdir() if p.is_file()]
  others = [p for p in others if p.name != digests.FILE]
  assert {p.name for p in others} == {"_CHECKPOINT_METADATA", COMMIT}
  for path in others:
    path.write_bytes(b"junk")
  assert orbax_io.read_weights(folder)["params"]["a"][299] == 299
  # Nor are they in the way of a run that continues.
  layout = {"params": {"a": jnp.zeros(300), "b": jnp.zeros((3, 5))}}
  state, data, _ = orbax_io.Checkpoints(tmp_path).restore(layout)
  assert state["params"]["a"][299] == 299 and data == {"next_index": 12}


def test_a_checkpoint_of_an_earlier_version_has_no_digests(saved, tmp_path):
  folder = shutil.copytree(saved, tmp_path / "7")
  (folder / digests.FILE).unlink()
  assert orbax_io.read_meta(folder) == orbax_io.read_meta(saved)
  assert orbax_io.read_weights(folder)["params"]["a"][299] == 299


COMMIT = "commit_success.txt"
