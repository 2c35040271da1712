"""Images with captions: tars, metadata files, and the shards made of them."""

import io
import json
import logging
import os
import re
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tensorar_jax.checkpoints import resumable
from tensorar_jax.conditioning import captions, chat, conditions
from tensorar_jax.data import codes, images, sources, tokenize
from tensorar_jax.data.sources import webdataset
from tensorar_jax.nn import image_bytes
from tensorar_jax.tokenizers import pixels
from tests.conditioning import tiny_chat, tiny_text
from tests.data import tokenize_test

SIZE = 5
LONG = "a" * 150  # more than a plain header has room for


def png(seed: int) -> bytes:
  draw = np.random.default_rng(seed)
  file = io.BytesIO()
  shape = (7, 9, 3)
  Image.fromarray(draw.integers(0, 256, shape, np.uint8)).save(file, "PNG")
  return file.getvalue()


def write_tar(file, members: dict[str, bytes]) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(file, "w") as tar:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


MEMBERS = {
  "0.png": png(0),
  "0.txt": b"A red cat\n",
  "d/1.seg.png": png(9),
  "d/1.json": b'{"caption": "from JSON", "width": 9}',
  "d/1.PNG": png(1),
  f"{LONG}.txt": b"after a long name",
  f"{LONG}.json": b'{"caption": "not this one"}',
  f"{LONG}.png": png(2),
  "3.png": png(3),
  "4.txt": b"no image",
  "5.png": png(5)[:60],
  "5.txt": b"a broken image",
  "6.png": png(6),
  "6.txt": b" \n",
  "7.png": png(7),
  "7.json": b'{"text": "another key"}',
  "8.png": png(8),
  "8.txt": b"\xff\xfe",
}
GOOD = {0: "A red cat", 1: "from JSON", 2: "after a long name", 9: "last"}
BROKEN = {
  3: "the caption is missing",
  4: "the image is missing",
  5: "a.tar, sample 5: cannot be decoded",
  6: r"the caption ' .n' has no words",
  7: 'no JSON with a "caption" .KeyError',
  8: "no text in UTF-8",
}


@pytest.fixture
def folder(tmp_path):
  write_tar(tmp_path / "tars" / "a.tar", MEMBERS)
  last = {"0.png": png(9), "0.txt": b"last"}
  write_tar(tmp_path / "tars" / "b.tar", last)
  return tmp_path / "tars"


def test_a_sample_is_what_has_one_key(folder):
  source = sources.load(f"webdataset:{folder}", "train")
  assert isinstance(source, sources.Source) and len(source) == 10
  assert (source.num_classes, source.damaged) == (None, ())
  for position, caption in GOOD.items():
    example = source[position]
    assert example["caption"] == caption
    want = images.decode_image(png(position))
    np.testing.assert_array_equal(example["image"], want)
  for position, words in BROKEN.items():
    with pytest.raises(images.BrokenSampleError, match=words):
      source[position]


def test_a_tar_that_is_cut_gives_what_is_before(tmp_path, caplog):
  members = {}
  for i in range(4):
    members |= {f"{i}.png": png(i), f"{i}.txt": f"picture {i}".encode()}
  write_tar(tmp_path / "whole.tar", members)
  with tarfile.open(tmp_path / "whole.tar") as tar:
    starts = [m.offset for m in tar.getmembers()]
    ends = [m.offset_data + m.size for m in tar.getmembers()][1::2]
  data = (tmp_path / "whole.tar").read_bytes()
  (tmp_path / "cut").mkdir()
  write_tar(tmp_path / "cut" / "b.tar", {"x.png": png(5), "x.txt": b"good"})
  # In a header, in an image, at a caption's header, in its text, at the end.
  for cut in (100, starts[2] + 600, starts[3], ends[1] - 1, ends[2], ends[3]):
    (tmp_path / "cut" / "a.tar").write_bytes(data[:cut])
    whole = sum(end <= cut for end in ends)
    source = sources.load(f"webdataset:{tmp_path / 'cut'}", "")
    found = [source[i]["caption"] for i in range(len(source))]
    assert found == [f"picture {i}" for i in range(whole)] + ["good"], cut
    (tar,) = source.damaged
    assert (tar["name"], tar["num_samples"]) == ("a.tar", whole)
    told = f"a.tar: {tar['reason']}; {whole} samples before that are used"
    assert told in caplog.text
  bad = data[: starts[4]] + b"\1" * 512 + data[starts[4] + 512 :]
  (tmp_path / "cut" / "a.tar").write_bytes(bad)
  source = sources.load(f"webdataset:{tmp_path / 'cut'}", "")
  assert len(source) == 3
  assert "a damaged member at byte" in source.damaged[0]["reason"]


def test_folders_of_another_layout(tmp_path):
  load = lambda: sources.load(f"webdataset:{tmp_path}", "")
  with pytest.raises(ValueError, match="holds no .tar files; .*KEY.jpg"):
    load()
  (tmp_path / "a.tar").write_bytes(b"no archive at all" * 99)
  with pytest.raises(ValueError, match="none of the 1 tars .*a.tar: it cannot"):
    load()
  write_tar(tmp_path / "a.tar", {"0.png": png(0), "0.cls": b"3"})
  with pytest.raises(ValueError, match="image and a caption: .*1 x .cls"):
    load()


def test_the_places_are_looked_up_once(folder, monkeypatch, caplog):
  monkeypatch.setattr(webdataset, "_WORTH_KEEPING", 0)
  caplog.set_level(logging.INFO)
  data = (folder / "a.tar").read_bytes()
  (folder / "a.tar").write_bytes(data[:-11000])
  first = sources.load(f"webdataset:{folder}", "")
  assert (folder / webdataset.INDEX).exists() and first.damaged
  with monkeypatch.context() as patch:
    patch.setattr(webdataset, "_scan", None)
    again = sources.load(f"webdataset:{folder}", "")
  assert again.damaged == first.damaged and again[0]["caption"] == "A red cat"
  np.testing.assert_array_equal(again.places, first.places)
  before = first.fingerprint()
  (folder / "a.tar").write_bytes(data)
  assert len(sources.load(f"webdataset:{folder}", "")) == 10
  assert first.fingerprint() != before
  (folder / webdataset.INDEX).write_bytes(b"PK\3\4")
  assert len(sources.load(f"webdataset:{folder}", "")) == 10
  assert "is damaged and will be replaced" in caplog.text


# --- metadata files ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_metadata_file_lists_images_and_texts(tmp_path, kind):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "1.png").write_bytes(png(1))
  rows = [("a/1.png", 'Two, "red" ones'), ("b.png", "gone"), ("a/1.png", "")]
  lines = [json.dumps({"file_name": n, "text": t, "x": 1}) for n, t in rows]
  if kind == "csv":
    lines = ["file_name,text", 'a/1.png,"Two, ""red"" ones"', "b.png,gone"]
    lines += ["a/1.png,"]
  (tmp_path / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
  source = sources.load(f"captions:{tmp_path}", "train")
  assert source.names == ("a/1.png", "b.png", "a/1.png")
  assert source[0]["caption"] == 'Two, "red" ones'
  np.testing.assert_array_equal(source[0]["image"], images.decode_image(png(1)))
  for position, words in ((1, "b.png: .*no such file"), (2, "'' has no words")):
    with pytest.raises(images.BrokenSampleError, match=words):
      source[position]


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({}, r"holds \[\]; expected exactly one of .*metadata.jsonl"),
    ({"jsonl": "{}", "csv": "x"}, "exactly one"),
    ({"jsonl": ""}, "metadata.jsonl is empty"),
    ({"jsonl": '{"file_name": "a", "text": "b"}\n{"a'}, "line 2 is not of the"),
    ({"jsonl": '{"file_name": "a", "caption": "b"}'}, "line 1 is not of the"),
    ({"csv": "name,text\na.png,b\n"}, "line 2 is not of the form"),
    ({"csv": "file_name,text\na.png\n"}, "line 2 is not of the form"),
  ],
)
def test_metadata_of_another_layout(tmp_path, files, message):
  for kind, content in files.items():
    (tmp_path / f"metadata.{kind}").write_text(content)
  with pytest.raises(ValueError, match=message):
    sources.load(f"captions:{tmp_path}", "train")


def test_blank_lines_of_metadata_are_counted(tmp_path, caplog):
  row = '{"file_name": "1.png", "text": "one"}\n'
  (tmp_path / "metadata.jsonl").write_text(f"\n{row}  \n{row}\n\n")
  (tmp_path / "1.png").write_bytes(png(1))
  source = sources.load(f"captions:{tmp_path}", "train")
  assert source[1]["caption"] == "one" and len(source) == 2
  assert "left out 4: a blank line (line 1, line 3, line 5" in caplog.text


BAD_ROWS = {
  '{"file_name": "1.png", "text": "a \\ud83d"}': r"no text .*'.ud83d'",
  '{"file_name": "1.png", "text": "caf\udce9"}': r"no text .*'.udce9'",
  '{"file_name": "1.png", "text": null}': "None is no text",
  '{"file_name": "caf\udce9.png", "text": "a"}': r"caf.udce9.*not UTF-8",
  '{"file_name": "\\ud83d.png", "text": "a"}': r"ud83d.*not UTF-8",
  f'{{"file_name": "{"n" * 9999}", "text": "a"}}': "no such file",
  '{"file_name": "1.png/1.png", "text": "a"}': "no such file",
  '{"file_name": "pipe.png", "text": "a"}': "no regular file",
  '{"file_name": "zero.png", "text": "a"}': "no regular file",
  '{"file_name": "a.png", "text": "%s"}'
  % ("a" * 2_000_000): "2,000,000 letter",
}


def test_one_bad_row_ends_no_run(tmp_path, tokenizer):
  good = '{"file_name": "1.png", "text": "one"}'
  folder = tmp_path / "in"
  folder.mkdir()
  (folder / "1.png").write_bytes(png(1))
  os.mkfifo(folder / "pipe.png")
  (folder / "zero.png").symlink_to("/dev/zero")
  lines = "\n".join([*BAD_ROWS, good])
  (folder / "metadata.jsonl").write_text(lines, errors="surrogateescape")
  source = sources.load(f"captions:{folder}", "train")
  options = OPTIONS | dict(text=Letters())
  manifest = tokenize.tokenize(source, tokenizer, tmp_path / "out", **options)
  assert manifest["num_images"] == 1
  skipped = manifest["skipped"]
  assert [one["position"] for one in skipped] == list(range(len(BAD_ROWS)))
  for one, words in zip(skipped, BAD_ROWS.values()):
    assert re.search(words, f"{one['name']}: {one['reason']}"), one


def test_a_csv_may_have_a_caption_of_any_length(tmp_path):
  (tmp_path / "1.png").write_bytes(png(1))
  rows = ["file_name,text", "1.png,one", "", f"1.png,{'a' * 2_000_000}"]
  (tmp_path / "metadata.csv").write_text("\n".join(rows))
  source = sources.load(f"captions:{tmp_path}", "train")
  assert len(source) == 2 and source[0]["caption"] == "one"
  with pytest.raises(images.BrokenSampleError, match="2,000,000 letters"):
    source[1]


def test_metadata_that_is_no_text(tmp_path):
  (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xd8\xff\xe0" * 9)
  with pytest.raises(ValueError, match="metadata.jsonl is no text in UTF-8"):
    sources.load(f"captions:{tmp_path}", "train")


# --- token shards ------------------------------------------------------------


class Letters:
  """A text encoder: a row for each letter, up to seven, in bfloat16."""

  width, length, dtype = 3, 7, "bfloat16"

  def __call__(self, captions):
    features = np.zeros((len(captions), 7, 3), jnp.bfloat16)
    mask = np.zeros((len(captions), 7), bool)
    for i, caption in enumerate(captions):
      codes_ = np.array(list(caption.encode()))[:7, None]
      features[i, : len(codes_)] = np.sin(codes_ * [1, 2, 3])
      mask[i, : len(codes_)] = True
    return jnp.asarray(features), mask


@pytest.fixture(scope="module")
def tokenizer():
  config = pixels.Config((SIZE, SIZE), image_channels=3, levels=19)
  return pixels.Model(config, rngs=nnx.Rngs(0))


OPTIONS = dict(recipe="flip", image_size=SIZE, batch_size=6, shard_size=4)


def test_texts_are_stored_without_padding(folder, tokenizer, tmp_path):
  data = (folder / "b.tar").read_bytes()
  (folder / "c.tar").write_bytes(data[:600])  # within the first image
  source = sources.load(f"webdataset:{folder}", "")
  out = tmp_path / "out"
  options = OPTIONS | dict(text=Letters())
  # As two processes; the second has nothing left to do when it runs again.
  for index in (0, 1, 1):
    worker = resumable.Worker(index, 2)
    manifest = tokenize.tokenize(
      source, tokenizer, out, worker=worker, **options
    )
  assert manifest["num_images"] == len(GOOD)
  assert [one["position"] for one in manifest["skipped"]] == list(BROKEN)
  assert manifest["damaged_files"][0]["name"] == "c.tar"
  assert manifest["text"]["encoder"]["class"].endswith("Letters")
  stored = sources.load(f"tokens:{out}", "train")
  assert isinstance(stored, codes.TokenSource)
  stored.check()
  batch = stored.fetch(np.arange(4), np.zeros(4, int))
  features, mask = Letters()(list(GOOD.values()))
  texts = conditions.TextConditioning(3, 7)
  want, cond = texts.encode((features, mask)), texts.from_batch(batch)
  assert batch["text"].dtype == jnp.bfloat16 and "label" not in batch
  assert all(isinstance(one, np.ndarray) for one in cond.values())
  for name in want:
    np.testing.assert_array_equal(cond[name], want[name])
  crop = images.center_crop(source[9]["image"], SIZE)[None]
  tokens = tokenizer.encode(jnp.asarray(image_bytes.normalise(crop)))
  np.testing.assert_array_equal(batch["tokens"][3:], tokens)
  rows = sum(min(7, len(caption)) for caption in GOOD.values())
  assert stored.records[0][-6:] == np.asarray(features)[0, 6].tobytes()
  size = 16 + 2 * SIZE * SIZE * 3 * 2  # a header and the codes
  sizes = [len(stored.records[i]) for i in range(4)]
  assert sum(sizes) == 4 * size + rows * 3 * 2


def test_each_encoder_judges_its_own_captions(tokenizer, tmp_path):
  """T5's cleaning drops Chinese, which others read."""

  class English(Letters):
    def check(self, caption):
      cleaned.check(caption)

  tiny_text.tokenizer().save(str(tmp_path / "tokenizer.json"))
  cleaned = captions.CaptionTokenizer(tmp_path / "tokenizer.json")
  members = {"0.png": png(0), "0.txt": "\u4e00\u53ea\u732b".encode()}
  members |= {"1.png": png(1), "1.txt": b"a cat"}
  write_tar(tmp_path / "in" / "a.tar", members)
  source = sources.load(f"webdataset:{tmp_path / 'in'}", "")
  assert source[0]["caption"] == "\u4e00\u53ea\u732b"
  prompts = chat.import_prompt_encoder(tiny_chat.folder(tmp_path / "chat"), 16)
  for name, text, count in (("t5", English(), 1), ("chat", prompts, 2)):
    options = OPTIONS | dict(text=text)
    out = tmp_path / name
    manifest = tokenize.tokenize(source, tokenizer, out, **options)
    assert manifest["num_images"] == count
    for one in manifest["skipped"]:
      assert one["name"] == "a.tar, sample 0"
      assert "empty once links" in one["reason"]


def test_a_killed_run_continues(folder, tokenizer, tmp_path):
  source = sources.load(f"webdataset:{folder}", "")
  options = OPTIONS | dict(text=Letters())
  with pytest.raises(tokenize_test.Killed):
    killing = tokenize_test.Killing(source, 9)
    tokenize.tokenize(killing, tokenizer, tmp_path / "a", **options)
  assert len(list((tmp_path / "a").glob("*.array_record"))) == 2
  for out in ("a", "b"):
    tokenize.tokenize(source, tokenizer, tmp_path / out, **options)
  contents = [tokenize_test.contents(tmp_path / out) for out in ("a", "b")]
  assert contents[0] == contents[1]


def test_captions_and_classes_are_kept_apart(folder, tokenizer, tmp_path):
  source = sources.load(f"webdataset:{folder}", "")
  with pytest.raises(ValueError, match="images have captions.*reads classes"):
    tokenize.tokenize(source, tokenizer, tmp_path / "out", **OPTIONS)
  classes = sources.load("digits", "test")
  with pytest.raises(ValueError, match="images have classes.*reads captions"):
    tokenize.tokenize(
      classes, tokenizer, tmp_path / "out", **OPTIONS, text=Letters()
    )
  options = OPTIONS | dict(text=Letters())
  tokenize.tokenize(source, tokenizer, tmp_path / "out", **options)
  stored = sources.load(f"tokens:{tmp_path / 'out'}", "")
  reads = dict(num_tokens=SIZE * SIZE, vocab_sizes=(19, 19, 19))
  assert codes.expect(stored, **reads, text=(3, 7)).text == stored.text
  for text, words in ((None, "classes"), ((4, 7), r"texts .* \(4, 7\)")):
    with pytest.raises(ValueError, match=rf"\(3, 7\), the model reads {words}"):
      codes.expect(stored, **reads, text=text)
  Letters.length = 6
  try:
    with pytest.raises(ValueError, match="text.length: was 7, is 6"):
      tokenize.tokenize(source, tokenizer, tmp_path / "out", **options)
  finally:
    Letters.length = 7
