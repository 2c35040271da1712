"""Published code folders and token shards: what is read, drawn, refused."""

import itertools
import json
import os
import pathlib

import numpy as np
import pytest
from array_record.python import array_record_module

from tensorar_jax.data import codes, pipeline, shards, sources
from tensorar_jax.parallel import sharding

NUM_IMAGES, CROPS, TOKENS, VOCAB = 13, 5, 9, 11


def published(root: pathlib.Path, seed: int = 0) -> np.ndarray:
  """Writes the published layout; codes [N, A, T], the label of i is i % 7."""
  draw = np.random.default_rng(seed)
  shape = (NUM_IMAGES, CROPS, TOKENS)
  drawn = draw.integers(0, VOCAB, shape, dtype=np.int64)
  for kind in ("codes", "labels"):
    (root / f"imagenet48_{kind}").mkdir(parents=True)
  for i, image in enumerate(drawn):
    np.save(root / "imagenet48_codes" / f"{i}.npy", image[None])
    label = np.array([i % 7], np.int64)
    np.save(root / "imagenet48_labels" / f"{i}.npy", label)
  return drawn


def sharded(
  root: pathlib.Path, vocab_sizes=(5, VOCAB), sizes=(4, 0, 9)
) -> np.ndarray:
  """Writes shards by hand; codes [N, A, T, F], the label of i is i % 7."""
  draw = np.random.default_rng(0)
  shape = (sum(sizes), CROPS, TOKENS)
  drawn = np.stack([draw.integers(0, v, shape) for v in vocab_sizes], -1)
  dtype = shards.code_type(vocab_sizes)
  root.mkdir(parents=True, exist_ok=True)
  counts, position = {}, 0
  for name, count in zip("abc", sizes):
    writer = array_record_module.ArrayRecordWriter(
      str(root / name), shards.WRITER_OPTIONS
    )
    for image in drawn[position : position + count]:
      writer.write(shards.pack(position % 7, image, dtype))
      position += 1
    writer.close()
    counts[name] = count
  manifest = {
    "format": 1,
    "shards": counts,
    "grid": [3, 3],
    "num_variants": CROPS,
    "vocab_sizes": list(vocab_sizes),
    "num_classes": 7,
    "class_names": list("ABCDEFG"),
  }
  (root / "manifest.json").write_text(json.dumps(manifest))
  return drawn


@pytest.fixture
def folder(tmp_path):
  return tmp_path / "flip_ten_crop"


@pytest.fixture(params=["codes", "tokens"])
def source_and_codes(request, folder):
  """Either kind of source and all its codes, [N, A, T, F]."""
  if request.param == "codes":
    drawn = published(folder)[..., None]
  else:
    drawn = sharded(folder)
  return sources.load(f"{request.param}:{folder}", "train"), drawn


def take(iterator, n):
  return list(itertools.islice(iterator, n))


def rows_of(batch, drawn):
  """(position, variant) of each row, found by its tokens."""
  same = (drawn[None] == batch["tokens"][:, None, None]).all((-1, -2))
  assert (same.sum((1, 2)) == 1).all()
  return np.argwhere(same)[:, 1:]


def test_what_is_read(source_and_codes):
  source, drawn = source_and_codes
  assert isinstance(source, codes.TokenSource)
  assert not isinstance(source, sources.Source)
  assert (len(source), source.num_tokens) == (NUM_IMAGES, TOKENS)
  assert source.num_variants == CROPS
  positions, variants = np.array([3, 12, 0, 3]), np.array([4, 0, 1, 2])
  batch = source.fetch(positions, variants)
  np.testing.assert_array_equal(batch["tokens"], drawn[positions, variants])
  np.testing.assert_array_equal(batch["label"], positions % 7)
  assert batch["tokens"].dtype == batch["label"].dtype == np.int32
  source.check()


def test_epochs_show_every_image_in_changing_variants(source_and_codes):
  source, drawn = source_and_codes

  def places(seed):
    iterator = pipeline.train_iterator(source, batch_size=NUM_IMAGES, seed=seed)
    batches = take(iterator, 40)
    assert batches[0]["tokens"].shape == (NUM_IMAGES, *drawn.shape[2:])
    found = np.array([rows_of(batch, drawn) for batch in batches])
    for batch, rows in zip(batches, found):
      np.testing.assert_array_equal(batch["label"], rows[:, 0] % 7)
    return found

  found = places(seed=1)
  assert (np.sort(found[..., 0]) == np.arange(NUM_IMAGES)).all()
  assert len({tuple(epoch) for epoch in found[..., 0]}) == 40
  share = np.bincount(found[..., 1].ravel(), minlength=CROPS) / 520
  np.testing.assert_allclose(share, 1 / CROPS, atol=0.07)  # 4 deviations
  by_image = {tuple(place) for place in found.reshape(-1, 2)}
  assert len(by_image) == NUM_IMAGES * CROPS
  np.testing.assert_array_equal(found, places(seed=1))
  assert (found != places(seed=2)).any()


def test_resuming_and_sharing_out(source_and_codes):
  source, _ = source_and_codes
  options = {"batch_size": 6, "seed": 3}
  whole = pipeline.train_iterator(source, **options)
  take(whole, 5)
  half = pipeline.train_iterator(
    source, share=sharding.Share((1,), 2), **options
  )
  half.set_state(json.loads(json.dumps(whole.get_state())))
  for one, other in zip(take(whole, 7), take(half, 7)):
    for key in ("tokens", "label"):
      np.testing.assert_array_equal(one[key][3:], other[key])


def test_tokens_cannot_be_mirrored(source_and_codes):
  with pytest.raises(ValueError, match="flip=True: tokens cannot"):
    pipeline.train_iterator(
      source_and_codes[0], batch_size=2, seed=0, flip=True
    )


def test_the_second_folder_gives_half_of_the_draws(folder):
  first = published(folder)
  second = published(folder.with_name("flip_ten_crop_105"), seed=1)
  source = sources.load(f"codes:{folder}", "train")
  assert source.num_variants == 2 * CROPS
  both = np.concatenate([first, second], axis=1)[..., None]
  every = [np.arange(NUM_IMAGES * 2 * CROPS)]
  positions, variants = np.divmod(every[0], 2 * CROPS)
  batch = source.fetch(positions, variants)
  np.testing.assert_array_equal(batch["tokens"], both[positions, variants])
  source.check()
  alone = sources.load(f"codes:{folder}_105", "train")
  assert alone.num_variants == CROPS


def test_a_split_is_a_subfolder(tmp_path):
  published(tmp_path / "train")
  sharded(tmp_path / "shards" / "test")
  assert len(sources.load(f"codes:{tmp_path}", "train")) == NUM_IMAGES
  assert len(sources.load(f"tokens:{tmp_path}/shards", "test")) == NUM_IMAGES
  with pytest.raises(ValueError, match=r"'nope'.*known are \['test'\]"):
    sources.load(f"tokens:{tmp_path}/shards", "nope")
  with pytest.raises(ValueError, match="exactly one.*imagenet<size>_codes"):
    sources.load(f"codes:{tmp_path}/shards", "test")


def test_sources_are_held_to_the_model(source_and_codes):
  source, drawn = source_and_codes
  sizes = (VOCAB,) if drawn.shape[-1] == 1 else (5, VOCAB)
  held = codes.expect(
    source, num_tokens=TOKENS, vocab_sizes=sizes, num_classes=1000
  )
  assert (held.vocab_sizes, held.num_classes) == (sizes, 1000)
  held.fetch(np.arange(3), np.arange(3))
  with pytest.raises(ValueError, match="hold 9 tokens.*reads 16 of"):
    codes.expect(source, num_tokens=16, vocab_sizes=sizes)
  with pytest.raises(ValueError, match="vocabulary.*the model reads"):
    codes.expect(source, num_tokens=TOKENS, vocab_sizes=(3, 4, 5))
  held = codes.expect(source, num_tokens=TOKENS, vocab_sizes=sizes)
  assert held.num_classes == source.num_classes


def broken_file(folder, name, array):
  path = folder / f"imagenet48_{name}"
  if isinstance(array, bytes):
    path.write_bytes(array)
  else:
    np.save(path, array)
  return path


def row(value=3, length=TOKENS, crops=CROPS):
  return np.full((1, crops, length), value, np.int64)


@pytest.mark.parametrize(
  ("name", "array", "message"),
  [
    ("codes/4.npy", row(VOCAB), "code 11 is outside.*expected 0 to 10"),
    ("codes/4.npy", row(-1), "code -1 is outside.*expected 0 to 10"),
    ("codes/4.npy", row(length=10), r"\(1, 5, 10\); expected .*\(1, 5, 9\)"),
    ("codes/4.npy", row(crops=4), r"\(1, 4, 9\); expected .*\(1, 5, 9\)"),
    ("codes/4.npy", row().astype(float), "float64.*expected integers"),
    ("codes/4.npy", b"", r"no .npy array"),
    ("codes/4.npy", b"\x93NUMPY\x01\x00 cut short", r"no .npy array"),
    ("codes/4.npy", np.array([{}]), r"no .npy array"),  # would be unpickled
    ("labels/4.npy", np.array([7]), "label 7 is no class; expected 0 to 6"),
    ("labels/4.npy", np.array([-1]), "label -1 is no class"),
    ("labels/4.npy", np.array([1, 2]), r"\(2,\); expected .*\(1,\)"),
  ],
)
def test_bad_published_files_are_named(folder, name, array, message):
  published(folder)
  source = sources.load(f"codes:{folder}", "train")
  source = codes.expect(
    source, num_tokens=TOKENS, vocab_sizes=(VOCAB,), num_classes=7
  )
  path = broken_file(folder, name, array)
  with pytest.raises(ValueError, match=f"{path}.*{message}"):
    source.fetch(np.array([3, 4]), np.array([0, 0]))
  source.fetch(np.array([3, 5]), np.array([0, 0]))


def test_errors_reach_the_trainer(folder):
  published(folder)
  source = sources.load(f"codes:{folder}", "train")
  path = broken_file(folder, "codes/4.npy", row(-1))
  iterator = pipeline.train_iterator(source, batch_size=NUM_IMAGES, seed=0)
  with pytest.raises(ValueError, match=f"{path}: code -1"):
    next(iterator)


def test_wrong_lengths_are_found_without_reading(folder):
  published(folder)
  source = sources.load(f"codes:{folder}", "train")
  path = broken_file(folder, "codes/7.npy", row(length=10))
  with pytest.raises(ValueError, match=f"{path} has .* bytes; expected"):
    source.check()


@pytest.mark.parametrize(
  ("remove", "message"),
  [
    (["codes/4.npy", "labels/4.npy"], "codes/4.npy is missing; expected 0.npy"),
    (["labels/4.npy"], "labels/4.npy is missing; expected 0.npy to 11"),
    (["labels/12.npy"], "labels/12.npy is missing"),
    (["codes/12.npy"], "codes/12.npy is missing"),
    (["codes/0.npy"], "codes/0.npy is missing"),
  ],
)
def test_gaps_are_named(folder, remove, message):
  published(folder)
  for name in remove:
    (folder / f"imagenet48_{name}").unlink()
  with pytest.raises(ValueError, match=message):
    sources.load(f"codes:{folder}", "train")


def test_other_files_beside_the_codes_are_left_out(folder, caplog):
  published(folder)
  for name in (".DS_Store", "._0.npy", "notes.txt"):
    (folder / "imagenet48_codes" / name).write_bytes(b"")
  os.mkfifo(folder / "imagenet48_labels" / "13.npy")
  source = sources.load(f"codes:{folder}", "train")
  assert len(source) == NUM_IMAGES
  source.check()
  for line in (
    "imagenet48_codes: left out 2: hidden, or of the system (.DS_Store, ._0",
    "imagenet48_codes: left out 1: not .npy by the name (notes.txt)",
    "imagenet48_labels: left out 1: no regular file",
  ):
    assert line in caplog.text


def test_missing_folders_are_named(folder):
  published(folder)
  (folder / "imagenet48_labels").rename(folder / "labels")
  with pytest.raises(ValueError, match="imagenet48_labels is missing"):
    sources.load(f"codes:{folder}", "train")
  (folder / "imagenet48_labels").mkdir()
  with pytest.raises(ValueError, match="imagenet48_labels is empty"):
    sources.load(f"codes:{folder}", "train")
  (folder / "imagenet64_codes").mkdir()
  with pytest.raises(ValueError, match="imagenet48_codes.*imagenet64_codes"):
    sources.load(f"codes:{folder}", "train")


@pytest.mark.parametrize("vocab", [2**16, 2**16 + 1])
def test_records_are_compact_and_exact(vocab):
  wide = vocab > 2**16
  dtype = shards.code_type((3, vocab))
  image = np.array([0, vocab - 1] * 30, np.int32).reshape(5, 6, 2)
  record = shards.pack(999, image, dtype)
  assert len(record) == 16 + 60 * (4 if wide else 2)
  assert record[:16] == b"TOK1" + bytes(
    [0xE7, 3, 0, 0, 5, 0, 6, 0, 0, 0, 2, 4 if wide else 2]
  )
  label, found = shards.unpack(record, "here")
  assert label == 999
  np.testing.assert_array_equal(found, image)
  for bad in (record[:-1], record[:7], b"", b"TOK2" + record[4:]):
    with pytest.raises(ValueError, match="here is no record of tokens"):
      shards.unpack(bad, "here")


def test_shards_without_or_with_a_bad_manifest(folder):
  sharded(folder)
  file = folder / "manifest.json"
  manifest = json.loads(file.read_text())
  for text, message in (
    ("{", "cannot be read as JSON"),
    ("[]", "the content is .*expected an object"),
    ('{"format": 1}', "shards is missing; expected an object"),
    (json.dumps(manifest | {"format": 2}), "of format 2; expected 1"),
    (json.dumps(manifest | {"shards": {"a": 0}}), "lists no image"),
    (json.dumps(manifest | {"shards": {"a": 5}}), "/a holds 4 .*expected 5"),
    (json.dumps(manifest | {"shards": {"d": 5}}), "/d is missing"),
  ):
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
      sources.load(f"tokens:{folder}", "train")
  file.unlink()
  with pytest.raises(ValueError, match="manifest.json is missing.*tokenize"):
    sources.load(f"tokens:{folder}", "train")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"vocab_sizes": [5, 10]}, "/c, record [0-8]: code 10 .*expected 0 to 9"),
    ({"num_classes": 6}, "record [0-8]: label 6 is no class; expected 0 to 5"),
    ({"grid": [2, 4]}, r"record 0 holds codes \(5, 9, 2\).*\(5, 8, 2\)"),
    ({"num_variants": 4}, r"holds codes \(5, 9, 2\); expected \(4, 9, 2\)"),
  ],
)
def test_records_that_the_manifest_denies(folder, change, message):
  sharded(folder)
  file = folder / "manifest.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  source = sources.load(f"tokens:{folder}", "train")
  with pytest.raises(ValueError, match=message):
    source.fetch(np.array([4, 6, 7, 8, 12]), np.zeros(5, int))
  with pytest.raises(ValueError, match="record"):
    source.check()


def test_damaged_shards_are_named(folder):
  sharded(folder)
  source = sources.load(f"tokens:{folder}", "train")
  file = folder / "c"
  data = bytearray(file.read_bytes())
  where = data.index(b"TOK1")
  data[where : where + 400] = bytes(400)
  file.write_bytes(data)
  with pytest.raises(ValueError, match=f"{file}, record 0 "):
    source.fetch(np.array([0, 4]), np.zeros(2, int))
  file.write_bytes(data[:-1000])
  with pytest.raises(ValueError, match=f"{file} is no complete shard"):
    sources.load(f"tokens:{folder}", "train")
