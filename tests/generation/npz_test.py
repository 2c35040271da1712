import zipfile

import numpy as np
import pytest

from tensorar_jax.checkpoints import resumable
from tensorar_jax.generation import npz


@pytest.fixture
def made(tmp_path):
  """(images, labels, shards) of 3, 3 and 1 images."""
  draw = np.random.default_rng(0)
  images = draw.integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
  shards = []
  for start in (0, 3, 6):
    part = images[start : start + 3]
    shards.append(tmp_path / f"{start}.npy")
    with shards[-1].open("wb") as out:
      npz.write_shard(out, len(part), [part[:2], part[2:]][: len(part)])
  return images, np.arange(7) % 3, shards


def test_shards_become_what_numpy_would_write(made, tmp_path):
  images, labels, shards = made
  np.testing.assert_array_equal(np.load(shards[1]), images[3:6])
  assert npz.join_shards(tmp_path / "a.npz", shards, labels) == images.shape
  np.savez(tmp_path / "b.npz", images, labels)
  a, b = ((tmp_path / name).read_bytes() for name in ("a.npz", "b.npz"))
  assert a == b
  for member in zipfile.ZipFile(tmp_path / "a.npz").infolist():
    assert member.compress_type == zipfile.ZIP_STORED


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_images_are_read_a_batch_at_a_time(made, tmp_path, batch_size):
  images, labels, shards = made
  npz.join_shards(tmp_path / "a.npz", shards, labels)
  batches = list(
    npz.SampleFile(tmp_path / "a.npz").read(resumable.positions(7, batch_size))
  )
  assert max(map(len, batches)) <= batch_size
  np.testing.assert_array_equal(np.concatenate(batches), images)


def test_the_suite_s_own_files_are_of_this_layout(parity):
  path = parity / "evaluation" / "protocol_sample_batch.npz"
  stored = np.load(path)
  assert (stored["arr_0"].dtype, stored["arr_1"].dtype) == (np.uint8, np.int64)
  assert stored["arr_1"].shape == stored["arr_0"].shape[:1]
  (got,) = npz.SampleFile(path).read([range(len(stored["arr_0"]))])
  np.testing.assert_array_equal(got, stored["arr_0"])


def test_a_folder_or_a_missing_file_says_what_to_pass(tmp_path):
  with pytest.raises(ValueError, match="nowhere.npz: no such file"):
    npz.SampleFile(tmp_path / "nowhere.npz")
  with pytest.raises(ValueError, match="is a folder.*PNG.*numpy.savez"):
    npz.SampleFile(tmp_path)
  np.savez(tmp_path / "samples.npz", np.zeros((2, 1, 1, 3), np.uint8))
  with pytest.raises(ValueError, match="is a folder.*take .*samples.npz"):
    npz.SampleFile(tmp_path)


def test_a_damaged_shard_is_named(made, tmp_path):
  _, labels, shards = made
  shards[1].write_bytes(shards[1].read_bytes()[:-1])
  with pytest.raises(ValueError, match="3.npy is damaged .*delete it"):
    npz.join_shards(tmp_path / "a.npz", shards, labels)


def newer(version):
  """Writes what numpy would read too, but does not write unless it must."""

  def write(path, images):
    with (
      zipfile.ZipFile(path, "w") as archive,
      archive.open("arr_0.npy", "w") as member,
    ):
      np.lib.format.write_array(member, images, version=version)

  return write


@pytest.mark.parametrize(
  "write",
  [
    np.savez,
    np.savez_compressed,
    lambda path, images: np.savez(path, np.asfortranarray(images)),
    newer((2, 0)),
    newer((3, 0)),
  ],
)
def test_files_of_other_programs(write, made, tmp_path):
  """Deflated, in Fortran order, with newer headers: parts in any distance."""
  images, _, _ = made
  write(tmp_path / "a.npz", images)
  file = npz.SampleFile(tmp_path / "a.npz")
  assert (file.shape, file.statistics) == (images.shape, {})
  got = list(file.read([range(1, 3), range(5, 7)]))
  np.testing.assert_array_equal(got[0], images[1:3])
  np.testing.assert_array_equal(got[1], images[5:7])


def test_statistics_without_images(tmp_path):
  arrays = {name: np.eye(3) for name in npz.STATISTICS}
  np.savez(tmp_path / "a.npz", **arrays)
  file = npz.SampleFile(tmp_path / "a.npz")
  assert (file.shape, len(file)) == (None, 0)
  assert file.statistics.keys() == arrays.keys()
