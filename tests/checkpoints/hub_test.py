"""Published weights by name, from a hub on this machine."""

import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import pkgutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants
from huggingface_hub.utils import _http

import tensorar_jax as tj
from tensorar_jax.checkpoints import hub, orbax_io, torch_import
from tensorar_jax.checkpoints.locations import DIGESTS, LOCATIONS
from tensorar_jax.evaluation import inception
from tensorar_jax.experiment import config_file, published
from tests.checkpoints import fake_hub
from tests.conditioning import tiny_text

ROOT = pathlib.Path(__file__).parents[2]
NAME = "hf://someone/models/w.safetensors"


def tensors(rows: int = 300) -> bytes:
  return safetensors.numpy.save({"a": np.ones((rows, 2), np.float32)})


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A hub, an empty cache, an empty directory to run in."""
  monkeypatch.chdir(tmp_path)
  with fake_hub.serve() as served:
    served.files["someone/models"] = {"w.safetensors": tensors()}
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    template = template.replace(constants.ENDPOINT, served.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield served


def test_a_file_is_downloaded_once_and_read_offline(server, monkeypatch):
  content = server.files["someone/models"]["w.safetensors"]
  path = hub.find(NAME)
  assert path.read_bytes() == content and path.name == "w.safetensors"
  assert torch_import.load_state_dict(NAME)["a"].shape == (300, 2)
  found = torch_import.describe(NAME)
  assert found["sha256"] == hashlib.sha256(content).hexdigest()
  gets = [r for r in server.requests if r.startswith("GET")]
  assert len(gets) == 1
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  server.requests.clear()
  assert hub.find(NAME) == path and not server.requests


@pytest.mark.parametrize(
  "name",
  (f"hf://someone/models@{fake_hub.COMMIT}/w.safetensors",)
  + (f"{NAME}@{fake_hub.COMMIT}", pathlib.Path(f"{NAME}@main")),
)
def test_a_revision_can_be_named(server, name):
  assert hub.find(name).is_file()
  assert server.requests[0].endswith(str(name).split("@")[1].split("/")[0])


@pytest.mark.parametrize("rows", (300, 3))  # sha256 of a large file; git's
def test_damage_is_found(server, rows):
  server.files["someone/models"]["w.safetensors"] = tensors(rows)
  server.damaged.add("w.safetensors")
  for _ in range(2):  # in the cache it is no better
    with pytest.raises(ValueError, match="digest is .*damaged. Remove") as got:
      torch_import.load_state_dict(NAME)
  for words in str(got.value).split("Remove ")[1].split(", and start")[:1]:
    for file in words.split(" and "):
      pathlib.Path(file).unlink()
  server.damaged.clear()
  assert hub.find(NAME).is_file()


def test_what_cannot_be_had_is_one_error_with_a_way_by_hand(
  server, monkeypatch, tmp_path
):
  server.files["a/gated"] = {}
  server.refused["a/gated"] = (403, "GatedRepo")
  for name, words in (
    ("hf://a/gated/w.pt", "accept the conditions on .*/a/gated and set HF_TOK"),
    ("hf://a/none/w.pt", "there is no repository a/none, or it is private"),
    ("hf://someone/models/x.pt", "the repository has no file x.pt"),
    (f"{NAME}@v7", "the repository has no revision 'v7'"),
    ("hf://someone/models", "the repository has no file config.json"),
  ):
    with pytest.raises(ValueError, match=words) as error:
      hub.find(name)
    parts = hub.parse(name)
    assert f"download {parts.url}" in str(error.value)
    assert f"put it at {parts.by_hand}." in str(error.value)
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set, and w.safet"):
    hub.find(NAME)
  place = tmp_path / "weights" / "someone" / "models" / "w.safetensors"
  assert hub.parse(NAME).by_hand == place
  place.parent.mkdir(parents=True)
  place.write_bytes(tensors())
  assert hub.find(NAME) == place  # no hub is asked
  other = hub.parse(f"{NAME}@v7").by_hand
  assert other == tmp_path / "weights/someone/models@v7/w.safetensors"


def test_a_hub_that_is_down_is_asked_a_few_times(server, monkeypatch):
  waits = []
  monkeypatch.setattr(_http.time, "sleep", waits.append)
  server.refused["someone/models"] = (503, "")
  with pytest.raises(ValueError, match="does not answer .*By hand: download"):
    hub.find(NAME)
  assert len(server.requests) < 10 and 0 < sum(waits) < 60


def test_names_are_checked(server):
  for name in ("hf://", "hf://a", "hf://a/b/../c", "hf://datasets/a/b/c.pt"):
    with pytest.raises(ValueError, match="expected .*OWNER/REPOSITORY/FILE"):
      hub.find(name)
  assert not server.requests


def test_a_divided_model_brings_its_parts(server):
  one, two = np.zeros((4, 2), np.float32), np.ones(3, np.float32)
  index = {"weight_map": {"one": "p1.safetensors", "two": "p2.safetensors"}}
  server.files["someone/models"] = {
    "deep/m.index.json": json.dumps(index).encode(),
    "deep/p1.safetensors": safetensors.numpy.save({"one": one}),
    "deep/p2.safetensors": safetensors.numpy.save({"two": two}),
  }
  name = "hf://someone/models/deep/m.index.json"
  found = torch_import.load_state_dict(name)
  np.testing.assert_array_equal(np.asarray(found["two"]), two)
  assert set(found) == {"one", "two"}
  del server.files["someone/models"]["deep/p2.safetensors"]
  with pytest.raises(ValueError, match="no file deep/p3.safetensors"):
    index["weight_map"]["two"] = "p3.safetensors"
    content = json.dumps(index).encode()
    server.files["someone/models"]["deep/n.index.json"] = content
    hub.find("hf://someone/models/deep/n.index.json")


def test_a_folder_brings_what_is_read_of_it(server, parity, tmp_path):
  folder = tiny_text.folder(parity, tmp_path / "t5")
  files = {p.name: p.read_bytes() for p in folder.iterdir()}
  files |= {"flax_model.msgpack": b"x" * 2000, "pytorch_model.bin": b"x" * 2000}
  server.files["someone/t5"] = files
  here = tj.import_text_encoder(str(folder), "float32", 7)(["a red cat"])
  there = tj.import_text_encoder("hf://someone/t5", "float32", 7)
  np.testing.assert_array_equal(here[0], there(["a red cat"])[0])
  read = {r.split("/")[-1].split("@")[0] for r in server.requests}
  assert not read & {"flax_model.msgpack", "pytorch_model.bin"}
  del files["model.safetensors"], files["pytorch_model.bin"]
  (tmp_path / "cache").rename(tmp_path / "other")
  with pytest.raises(ValueError, match="has none of .*put it at .*someone/t5"):
    hub.find("hf://someone/t5")


def test_every_published_file_has_a_place():
  names = set(inception.SOURCES)
  for kind in ("backbones", "tokenizers"):
    package = importlib.import_module(f"tensorar_jax.{kind}")
    for module in pkgutil.iter_modules(package.__path__):
      path = f"tensorar_jax.{kind}.{module.name}"
      names |= importlib.import_module(path).SOURCES.keys()
  assert all(map(hub.location, names)) and DIGESTS.keys() <= LOCATIONS.keys()
  for folder in ("Janus-Pro-1B", "weights/Janus-Pro-1B"):
    where = hub.location(f"{folder}/pytorch_model.bin")
    assert where == "hf://deepseek-ai/Janus-Pro-1B/pytorch_model.bin"
  for name, where in LOCATIONS.items():
    assert where.endswith(name), where  # and so a copy is known by its name
    if hub.is_name(where):
      parts = hub.parse(where)
      assert parts.url.startswith(f"https://huggingface.co/{parts.repository}")


def test_a_missing_file_is_told_where_to_get_it(tmp_path):
  url = "https://huggingface.co/FoundationVision/LlamaGen/resolve/main"
  words = f"Download {url}/c2i_B_256.pt and put it there, or .*hf://Foundation"
  with pytest.raises(ValueError, match=words):
    torch_import.load_state_dict(tmp_path / "c2i_B_256.pt")
  with pytest.raises(ValueError, match="huggingface.co/google/flan-t5-xl and"):
    tj.import_text_encoder(tmp_path / "flan-t5-xl")
  with pytest.raises(
    ValueError, match="fid_weights/pt_inception.* put it ther"
  ):
    inception.load(tmp_path / inception.SOURCES[0])
  (tmp_path / inception.SOURCES[0]).write_bytes(b"something else")
  with pytest.raises(ValueError, match="sha256 is .* start with 6726825d"):
    inception.load(tmp_path / inception.SOURCES[0])


def config_stages():
  return config_file.load("configs/llamagen_t2i.py").stages


def test_init_says_what_a_stage_starts_from():
  stages = config_stages()
  found = published.start_from(stages, "hf://a/b/c.pt")
  assert found["base"].source == "hf://a/b/c.pt"
  assert found["tensorar"] == stages["tensorar"]
  assert found["tokenizer"] == stages["tokenizer"]
  found = published.start_from(stages, "other/vq.pt", "tokenizer")
  assert found["tokenizer"].source == "other/vq.pt"
  found = published.start_from(stages, "runs/other/base", "tensorar")
  assert found["tensorar"].init == "runs/other/base"
  found = published.start_from(stages, "runs/other/base")
  assert found["base"].source is None
  found = published.start_from(stages, "local/Janus-Pro-1B", "base")
  assert found["base"].source == "local/Janus-Pro-1B"
  with pytest.raises(ValueError, match="--stage of --init 'bas' is unknown"):
    published.start_from(stages, "a.pt", "bas")
  wrapped = {"tensorar": stages["tensorar"]}
  with pytest.raises(ValueError, match="--stage; stages: tensorar"):
    published.start_from(wrapped, "a.pt")


def test_init_can_name_all_published_files():
  stages = published.start_from(config_stages(), "hf://")
  repository = "hf://peizesun/llamagen_t2i"
  assert stages["base"].source == f"{repository}/t2i_XL_stage1_256.pt"
  assert stages["tokenizer"].source == f"{repository}/vq_ds16_t2i.pt"
  for stage in stages.values():
    assert stage.conditioning.encoder == "hf://google/flan-t5-xl"
  stages = config_stages()
  own = dataclasses.replace(stages["base"], source="my.pt")
  with pytest.raises(ValueError, match="my.pt: no published file of this"):
    published.start_from({**stages, "base": own}, "hf://")


def test_the_command_line_imports_by_name(parity, tmp_path):
  """In a process of its own, which reads HF_ENDPOINT and HF_HOME."""
  content = (parity / "llamagen" / "gpt_c2i" / "checkpoint.pt").read_bytes()
  command = [sys.executable, "-m", "tensorar_jax.main", "--mode=import"]
  command += [f"--config=tests/e2e/tiny_published.py:{parity}"]
  command += ["--init=hf://someone/models/c.pt", f"--workdir={tmp_path}"]
  own = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
  with fake_hub.serve() as served:
    served.files["someone/models"] = {"c.pt": content}
    done = subprocess.run(
      command,
      env={**os.environ, **own, "HF_ENDPOINT": served.url},
      **dict(cwd=ROOT, capture_output=True, text=True),
    )
  assert done.returncode == 0, done.stderr[-3000:]
  assert list((tmp_path / "home" / "hub").glob("models--someone--models/blobs"))
  meta = orbax_io.read_meta(orbax_io.find(tmp_path / "base"))
  assert meta["config"]["source"] == "hf://someone/models/c.pt"
  assert meta["source"]["sha256"] == hashlib.sha256(content).hexdigest()
