"""Lines of tokens: the published ones, the index, training, bad lines."""

import concurrent.futures
import functools
import itertools
import json
import os
import pickle

import numpy as np
import pytest

from tensorar_jax.data import codes, pipeline, sources
from tensorar_jax.data.sources import jsonl
from tensorar_jax.parallel import sharding

NUM_LINES, TOKENS, VOCAB = 23, 9, 11


def line(label=3, tokens=(1,) * TOKENS) -> str:
  return json.dumps({"class_id": label, "tokens": list(map(int, tokens))})


@pytest.fixture(autouse=True)
def every_index_is_kept(monkeypatch):
  monkeypatch.setattr(jsonl, "_WORTH_KEEPING", 0)


@pytest.fixture
def drawn() -> np.ndarray:
  draw = np.random.default_rng(0)
  return draw.integers(0, VOCAB, (NUM_LINES, TOKENS))


@pytest.fixture
def file(tmp_path, drawn):
  """Lines of several lengths; the label of line i is i % 7."""
  path = tmp_path / "maskgitvq.jsonl"
  lines = [line(i % 7, tokens) for i, tokens in enumerate(drawn)]
  path.write_text("\n".join(lines) + "\n")
  return path


def load(file, split="train"):
  return sources.load(f"jsonl:{file}", split)


def everything(source):
  positions = np.arange(len(source))
  return source.fetch(positions, np.zeros_like(positions))


def index_of(file):
  return file.with_name(f"{file.name}.lines.npz")


def take(iterator, n):
  return list(itertools.islice(iterator, n))


def test_parity_of_published_lines(parity, tmp_path):
  published = parity / "rar" / "pretokenize" / "pretokenized.jsonl"
  file = tmp_path / published.name
  file.write_bytes(published.read_bytes())
  io_ = np.load(parity / "rar" / "gpt" / "io.npz")
  source = codes.expect(
    load(file), num_tokens=16, vocab_sizes=(96,), num_classes=10
  )
  batch = everything(source)
  np.testing.assert_array_equal(batch["tokens"][..., 0], io_["token_ids"])
  np.testing.assert_array_equal(batch["label"], io_["class_ids"])
  assert len(source) == 3
  source.check()


def test_what_is_read(file, drawn):
  source = load(file)
  assert isinstance(source, codes.TokenSource)
  assert not isinstance(source, sources.Source)
  assert (len(source), source.num_tokens) == (NUM_LINES, TOKENS)
  assert source.num_variants == 1
  positions = np.array([3, 22, 0, 3])
  batch = source.fetch(positions, np.zeros(4, int))
  np.testing.assert_array_equal(batch["tokens"], drawn[positions][..., None])
  np.testing.assert_array_equal(batch["label"], positions % 7)
  assert batch["tokens"].dtype == batch["label"].dtype == np.int32
  source.check()


def test_the_split_may_have_any_name(file, monkeypatch):
  monkeypatch.setenv("HOME", str(file.parent))
  for split in ("train", "val", ""):
    assert len(load("~/maskgitvq.jsonl", split)) == NUM_LINES
  with pytest.raises(ValueError, match=r"'train\[:5\]'.*slices are not"):
    load(file, "train[:5]")


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**24])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_lines_are_found_in_chunks(file, drawn, monkeypatch, chunk, end):
  text = file.read_text().removesuffix("\n")
  if end == "\r\n":
    text = text.replace("\n", end)
  file.write_bytes((text + end).encode())
  monkeypatch.setattr(jsonl, "_CHUNK", chunk)
  source = load(file)
  lengths = [len(one) for one in file.read_bytes().splitlines(keepends=True)]
  np.testing.assert_array_equal(np.diff(source.starts), lengths)
  np.testing.assert_array_equal(everything(source)["tokens"][..., 0], drawn)


def test_the_index_is_kept_while_the_file_is_the_same(file, monkeypatch):
  first = load(file)
  assert index_of(file).exists()
  assert not list(file.parent.glob("*.partial"))
  with monkeypatch.context() as patched:
    patched.setattr(jsonl, "_find_lines", lambda file: pytest.fail("again"))
    np.testing.assert_array_equal(load(file).starts, first.starts)
  with file.open("a") as more:
    more.write(line() + "\n")
  assert len(load(file)) == NUM_LINES + 1
  # As many bytes in other lines, written later.
  text = file.read_text().replace(line() + "\n", "")
  spaces = " " * (len(line()) + 1)
  file.write_text(text.removesuffix("\n") + spaces + "\n")
  stat = file.stat()
  os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
  assert len(load(file)) == NUM_LINES


def test_a_small_file_needs_no_index(file, monkeypatch):
  monkeypatch.setattr(jsonl, "_WORTH_KEEPING", file.stat().st_size + 1)
  assert len(load(file)) == NUM_LINES
  assert not index_of(file).exists()


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_a_damaged_index_is_replaced(file, caplog, keep):
  load(file)
  whole = index_of(file).read_bytes()
  index_of(file).write_bytes(whole[:keep])
  assert len(load(file)) == NUM_LINES
  assert "lines.npz is damaged and will be replaced" in caplog.text
  assert index_of(file).read_bytes() == whole


def test_an_index_that_cannot_be_kept(file, caplog, monkeypatch):
  def full(file, **arrays):
    raise OSError("no space left")

  with monkeypatch.context() as patched:
    patched.setattr(np, "savez", full)
    assert len(load(file)) == NUM_LINES
  assert "will be computed again next time" in caplog.text
  assert sorted(file.parent.iterdir()) == [file]


def test_epochs_show_every_line_in_changing_order(file, drawn):
  source = load(file)

  def places(seed):
    iterator = pipeline.train_iterator(source, batch_size=NUM_LINES, seed=seed)
    batches = take(iterator, 5)
    assert batches[0]["tokens"].shape == (NUM_LINES, TOKENS, 1)
    found = []
    for batch in batches:
      same = (batch["tokens"][:, None, :, 0] == drawn).all(-1)
      assert (same.sum(1) == 1).all()
      found.append(same.argmax(1))
      np.testing.assert_array_equal(batch["label"], found[-1] % 7)
    return np.array(found)

  found = places(seed=1)
  assert (np.sort(found) == np.arange(NUM_LINES)).all()
  assert len({tuple(epoch) for epoch in found}) == 5
  np.testing.assert_array_equal(found, places(seed=1))
  assert (found != places(seed=2)).any()


def test_resuming_and_sharing_out(file):
  options = {"batch_size": 6, "seed": 3}
  whole = pipeline.train_iterator(load(file), **options)
  take(whole, 5)
  half = pipeline.train_iterator(
    load(file), share=sharding.Share((1,), 2), **options
  )
  half.set_state(json.loads(json.dumps(whole.get_state())))
  for one, other in zip(take(whole, 7), take(half, 7)):
    for key in ("tokens", "label"):
      np.testing.assert_array_equal(one[key][3:], other[key])
  with pytest.raises(ValueError, match="flip=True: tokens cannot"):
    pipeline.train_iterator(load(file), flip=True, **options)


def test_threads_and_processes_read_alike(file):
  source = load(file)
  expected = everything(source)
  copied = pickle.loads(pickle.dumps(source))
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    for batch in threads.map(everything, [source, copied] * 50):
      np.testing.assert_array_equal(batch["tokens"], expected["tokens"])
      np.testing.assert_array_equal(batch["label"], expected["label"])


def test_a_file_is_held_to_the_model(file):
  source = load(file)
  held = codes.expect(
    source, num_tokens=TOKENS, vocab_sizes=(VOCAB,), num_classes=1000
  )
  assert (held.vocab_sizes, held.num_classes) == ((VOCAB,), 1000)
  everything(held)
  with pytest.raises(ValueError, match="hold 9 tokens.*reads 16 of"):
    codes.expect(source, num_tokens=16, vocab_sizes=(VOCAB,))
  with pytest.raises(ValueError, match="vocabulary.*the model reads"):
    codes.expect(source, num_tokens=TOKENS, vocab_sizes=(3, 4))


BAD_LINES = [
  (line()[:-5], "JSONDecodeError: .*make the file again"),
  (line() + line(), "JSONDecodeError: Extra data.: remove"),
  ('"class_id": 3', "JSONDecodeError: Extra data.: remove"),
  ("\udcff" * 70, "Unicode"),
  ("[" * 100_000, "Recursion"),
  ('{"class_id": 3}', "KeyError: 'tokens'"),
  ('{"tokens": [1]}', "KeyError: 'class_id'"),
  (f"[{line()}]", "TypeError: list indices"),
  (line().replace("[1,", "[1.0,"), r"TypeError: a float where"),
  (line().replace("[1,", "[true,"), r"TypeError: a bool where"),
  (line().replace("[1,", "[[1],"), r"TypeError: a list where"),
  (line().replace("3", '"3"'), r"TypeError: a str where"),
  (line().replace("[1,", f"[{2**64},"), "OverflowError"),
  ('{"class_id": 3, "tokens": []}', "TypeError: no tokens"),
  (line(tokens=[1] * 10), "holds 10 tokens; expected 9 as of line 1: remove"),
  (line(tokens=[VOCAB] * 9), "code 11 is outside.*expected 0 to 10"),
  (line(tokens=[-1] * 9), "code -1 is outside.*expected 0 to 10"),
  (line(7), "label 7 is no class; expected 0 to 6"),
  (line(-1), "label -1 is no class; expected 0 to 6"),
]


def with_line(file, number, text):
  """The same file with another line of this number, from 1."""
  lines = file.read_text().splitlines()
  lines[number - 1] = text
  file.write_text("\n".join(lines) + "\n", errors="surrogateescape")


@pytest.mark.parametrize(("text", "message"), BAD_LINES)
def test_bad_lines_are_named(file, text, message):
  with_line(file, 5, text.ljust(80))  # else found as the shortest
  source = codes.expect(
    load(file), num_tokens=TOKENS, vocab_sizes=(VOCAB,), num_classes=7
  )
  fetch = functools.partial(source.fetch, np.array([3, 4]), np.zeros(2, int))
  for read in (fetch, source.check):
    with pytest.raises(ValueError, match=f"{file}, line 5(?s:.)*{message}"):
      read()
  source.fetch(np.array([3, 5]), np.zeros(2, int))


@pytest.mark.parametrize("number", [1, NUM_LINES, 5])
def test_some_bad_lines_are_found_at_once(file, number):
  """The first, the last, and blank ones."""
  with_line(file, number, "" if number == 5 else line()[:-5])
  with pytest.raises(ValueError, match=f"{file}, line {number} is not of the"):
    load(file)


@pytest.mark.parametrize("end", ["\n", "\n\n\r\n", "  \t"])
def test_blank_lines_at_the_end_are_counted(file, end, caplog):
  first = load(file)
  with file.open("a") as more:
    more.write(end)
  source = load(file)
  assert len(source) == NUM_LINES
  source.check()
  expected = everything(first)["tokens"]
  np.testing.assert_array_equal(everything(source)["tokens"], expected)
  count = max(1, end.count("\n"))
  line = f"line {NUM_LINES + 1}"
  assert f"left out {count}: blank lines at the end ({line})" in caplog.text


def test_missing_and_empty_files(file):
  with pytest.raises(ValueError, match="nope.jsonl is missing; expected a"):
    load(file.with_name("nope.jsonl"))
  with pytest.raises(ValueError, match="is missing; expected a file"):
    load(file.parent)
  file.write_text("")
  with pytest.raises(ValueError, match=f"{file} is empty; expected lines"):
    load(file)
  with pytest.raises(ValueError, match="known are: .*jsonl:<file>"):
    sources.load("jsonl:", "train")


def test_errors_reach_the_trainer(file):
  with_line(file, 5, line(tokens=[-1] * TOKENS))
  iterator = pipeline.train_iterator(load(file), batch_size=NUM_LINES, seed=0)
  with pytest.raises(ValueError, match=f"{file}, line 5: code -1"):
    next(iterator)
