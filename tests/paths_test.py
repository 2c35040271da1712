"""Paths that users write, and those that stand in data files."""

import json
import pathlib

import pytest

from tensorar_jax import paths
from tensorar_jax.cli import config, parser
from tensorar_jax.cli.modes import MODES
from tensorar_jax.cli.options import flags_of
from tensorar_jax.data import sources
from tensorar_jax.data.sources import captions, tokens
from tensorar_jax.experiment import parse, schema, values

DIGITS = str(pathlib.Path(__file__).parents[1] / "configs" / "digits.py")
# A flag whose value stands for a file or folder on its help page.
PLACES = ("FILE", "FOLDER", "WEIGHTS", "PLACE")
FLAGS = [
  (mode, name)
  for mode, entry in MODES.items()
  for name, flag in flags_of(entry.options).items()
  if any(place in (flag.metavar or "") for place in PLACES)
]
URLS = ("gs://a/b", "s3://a/b", "https://a/b", "gs:/a", "file:/a", "S3://a")
# Values of a config that are paths.
KEYS = ("init", "source", "data.data_dir", "tokenizer.init")


@pytest.fixture(autouse=True)
def home(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")


def test_every_path_of_the_command_line_is_known():
  assert len(FLAGS) >= 50
  assert {name for _, name in FLAGS} >= {"workdir", "output", "prompts"}


@pytest.mark.parametrize("mode, name", FLAGS)
def test_a_home_is_expanded_and_a_url_refused(mode, name):
  kind = "folder:" * (name == "images")

  def read(place):
    words = [f"--mode={mode}", f"--{name}={kind}{place}"]
    other = [] if name == "config" else [f"--config={DIGITS}"]
    return getattr(parser.parse([*words, *other]).options, name)

  assert read("~/a b") == f"{kind}/home/me/a b"
  assert read("a~/x**:y") == f"{kind}a~/x**:y"
  assert read("/a/gs://b") == f"{kind}/a/gs://b"
  for url in URLS:
    with pytest.raises(ValueError) as caught:
      read(url)
    text = str(caught.value)
    assert text.startswith(f"--{name}: ") and url in text and "is a URL" in text
    assert "expected" in text and "\n" not in text


def test_names_on_the_hub_are_for_what_downloads_them():
  for mode, name in FLAGS:
    words = [f"--config={DIGITS}", f"--mode={mode}", f"--{name}=hf://a/b/c.pt"]
    if name in ("init", "inception"):
      assert getattr(parser.parse(words).options, name) == "hf://a/b/c.pt"
    else:
      with pytest.raises(ValueError, match="hf://a/b/c.pt' is a URL"):
        parser.parse(words)


def test_a_home_that_is_not_known_is_said():
  with pytest.raises(ValueError, match="home folder of ~nobody_here is not"):
    parser.parse([f"--config={DIGITS}", "--workdir=~nobody_here/run"])
  assert paths.local("./~nobody_here/run") == "./~nobody_here/run"
  assert paths.local("~") == "/home/me"


@pytest.mark.parametrize("key", KEYS)
def test_paths_of_a_config_are_read_as_those_of_flags(key):
  read = lambda value: config.read(DIGITS, {f"stages.base.{key}": value})
  stage = read("~/a").stages["base"]
  for name in key.split("."):
    stage = getattr(stage, name)
  assert stage == "/home/me/a"
  with pytest.raises(ValueError, match=f"{key}: 's3://a/b' is a URL"):
    read("s3://a/b")


def test_data_and_text_encoders_of_a_config():
  read = lambda changes: config.read(DIGITS, changes).stages["base"]
  assert read({"data.name": "folder:~/a"}).data.name == "folder:/home/me/a"
  assert read({"data.name": "digits"}).data.name == "digits"
  assert read({"data.name": "tfds:mnist:3.0.1"}).data.name == "tfds:mnist:3.0.1"
  for name in ("gs://a/b", "folder:gs://a/b", "tokens:hf://a/b"):
    with pytest.raises(ValueError, match="data.name: .* is a URL"):
      read({"data.name": name})
  for kind in ("text", "prompt"):
    encoder = lambda place, kind=kind: (
      parse.stage_of(
        {"conditioning": {"name": kind, "encoder": place}}
      ).conditioning.encoder
    )
    assert encoder("~/t5") == "/home/me/t5"
    assert encoder("hf://google/flan-t5-xl") == "hf://google/flan-t5-xl"
    assert encoder("words") == "words"
    with pytest.raises(ValueError, match="encoder: 'gs://t5' is a URL"):
      encoder("gs://t5")


def test_a_config_that_was_saved_with_a_home_is_still_the_same():
  before = {"data": {"name": "folder:~/a"}, "source": "~/b.pt"}
  now = {"data": {"name": "folder:/home/me/a"}, "source": "/home/me/b.pt"}
  assert parse.stage_of(before) == parse.stage_of(now)


def test_no_field_with_the_name_of_a_path_is_a_plain_text():
  sections = [*vars(schema).values()]
  for section in filter(
    lambda one: hasattr(one, "__dataclass_fields__"), sections
  ):
    for name, kind in values.fields(section).items():
      if name in ("init", "source", "encoder", "data_dir"):
        assert paths.unmark(kind)[1], (section, name)


# --- data files --------------------------------------------------------------

OUTSIDE = ("../secret.png", "a/../../secret.png", "/etc/secret.png")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("file", captions.FILES)
def test_metadata_that_leads_out_of_its_folder_is_refused(tmp_path, file, name):
  row = json.dumps({"file_name": name, "text": "A cat."})
  if file.endswith(".csv"):
    row = f"file_name,text\n{name},A cat."
  (tmp_path / file).write_text(row)
  with pytest.raises(ValueError) as caught:
    sources.load(f"captions:{tmp_path}", "train")
  for part in (file, name, "is not inside"):
    assert part in str(caught.value)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_leads_out_of_its_folder_is_refused(
  tmp_path, monkeypatch, name
):
  manifest = {"shards": {name: 3}}
  monkeypatch.setattr(tokens, "read_manifest", lambda folder: manifest)
  with pytest.raises(ValueError, match="manifest.json names .* not inside"):
    tokens.open_shards(tmp_path)


def test_what_stays_inside_is_allowed(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "out").symlink_to("/etc")
  for name in ("a/b.png", "a/../b.png", "..b.png", f"{tmp_path}/b.png"):
    paths.check_inside(tmp_path, name, "m")
  for name in ("out/../b.png", f"{tmp_path}x/b.png"):
    with pytest.raises(ValueError, match="m names"):
      paths.check_inside(tmp_path, name, "m")


def test_a_relative_folder_has_an_inside(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  paths.check_inside(pathlib.Path(), "a.png", "m")
  with pytest.raises(ValueError, match="m names"):
    paths.check_inside(pathlib.Path(), "../a.png", "m")
