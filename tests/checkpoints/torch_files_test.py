"""Files are read in every form that weights come in, or refused."""

import argparse
import hashlib
import json
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from tensorar_jax.checkpoints import torch_files


def assert_holds(path, state):
  """A file gives the names, shapes, types and bits of a state dict."""
  found = torch_files.load_state_dict(path)
  assert found.keys() == state.keys()
  for name, tensor in state.items():
    assert found[name].shape == tuple(tensor.shape), name
    assert found[name].dtype == str(tensor.dtype).removeprefix("torch."), name
    array = np.asarray(found[name])
    assert array.dtype == found[name].dtype
    np.testing.assert_array_equal(
      array.astype(np.float32), tensor.float().numpy(), err_msg=name
    )


def test_formats_agree_bit_for_bit(state, tmp_path):
  state["norm.weight"] = state["norm.weight"].bfloat16()
  paths = [tmp_path / name for name in ("a.pt", "old.bin", "a.safetensors")]
  torch.save({"model": state}, paths[0])
  torch.save(state, paths[1], _use_new_zipfile_serialization=False)
  safetensors.torch.save_file(state, paths[2])
  for path in paths:
    assert_holds(path, state)


def test_parameters_and_views_are_tensors_like_others(state, tmp_path):
  views, storage = {}, torch.cat([t.flatten() for t in state.values()])
  start = 0
  for name, tensor in state.items():
    views[name] = storage[start : start + tensor.numel()].view(tensor.shape)
    start += tensor.numel()
  name = "output.weight"
  views[name] = torch.nn.Parameter(state[name].T.contiguous().T)
  assert not views[name].is_contiguous()
  torch.save(views, tmp_path / "views.pt")
  old = dict(_use_new_zipfile_serialization=False)
  torch.save(views, tmp_path / "old.pt", **old)
  assert_holds(tmp_path / "views.pt", state)
  assert_holds(tmp_path / "old.pt", state)


@pytest.mark.parametrize(
  "wrap",
  [
    lambda n: f"_orig_mod.{n}",
    lambda n: f"module.{n}",
    lambda n: f"module._orig_mod.{n}",
    lambda n: f"_orig_mod.module.{n}",
    lambda n: f"_fsdp_wrapped_module.{n}",
    lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    lambda n: n.replace("layers.0.", "layers.0._orig_mod."),
  ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_wrappers_leave_nothing_in_the_names(wrap, suffix, state, tmp_path):
  path, wrapped = tmp_path / f"a.{suffix}", {wrap(n): state[n] for n in state}
  save = torch.save if suffix == "pt" else safetensors.torch.save_file
  save(wrapped, path)
  assert_holds(path, state)


def test_a_name_that_only_some_have_is_no_wrapper(state, tmp_path):
  mixed = {
    f"module.{n}" if i else n: t for i, (n, t) in enumerate(state.items())
  }
  torch.save(mixed, tmp_path / "a.pt")
  assert torch_files.load_state_dict(tmp_path / "a.pt").keys() == mixed.keys()
  twice = {**state, "_orig_mod.norm.weight": state["norm.weight"]}
  torch.save(twice, tmp_path / "a.pt")
  with pytest.raises(ValueError, match="one name but for a wrapper's prefix"):
    torch_files.load_state_dict(tmp_path / "a.pt")


def divided(state, folder, suffix=".safetensors"):
  """An index of the state dict in two files."""
  files = {}
  for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2])):
    part, file = {name: state[name] for name in names}, f"{number}{suffix}"
    save = torch.save if suffix == ".bin" else safetensors.torch.save_file
    save(part, folder / file)
    files |= dict.fromkeys(names, file)
  index = folder / f"model{suffix}.index.json"
  index.write_text(json.dumps({"weight_map": files}))
  return index


def test_an_index_stands_for_its_files(state, tmp_path):
  for suffix in (".safetensors", ".bin"):
    index = divided(state, tmp_path, suffix)
    assert_holds(index, state)
    found = torch_files.describe(index)
    parts = [index, *(tmp_path / f"{n}{suffix}" for n in (0, 1))]
    content = b"".join(part.read_bytes() for part in parts)
    assert found["file"] == index.name and found["size"] == len(content)
    assert found["sha256"] == hashlib.sha256(content).hexdigest()
    assert found["num_tensors"] == len(state)


def test_an_index_and_its_files_agree_or_are_refused(state, tmp_path):
  index = divided(state, tmp_path)
  files = json.loads(index.read_text())["weight_map"]

  def refuses(content, words):
    index.write_text(content)
    with pytest.raises(ValueError, match=words):
      torch_files.load_state_dict(index)

  def mapped(**changes):
    return json.dumps({"weight_map": {**files, **changes}})

  name = sorted(state)[0]
  refuses(mapped(odd="0.safetensors"), r"do not agree on the tensors \['odd'\]")
  refuses(mapped(**{name: "1.safetensors"}), f"do not agree .*{name}")
  refuses(mapped(odd="2.safetensors"), "2.safetensors: no such file")
  wrong = mapped(odd="../x.pt"), mapped(odd=index.name), mapped(odd=1)
  for content in (*wrong, "[]", "{", "{}", '{"weight_map": {}}'):
    refuses(content, "index.json: no index of a divided model")


def test_describe_says_where_weights_come_from(tmp_path):
  path = tmp_path / "a.safetensors"
  tensors = {"a": torch.zeros(2), "b": torch.zeros(3).bfloat16()}
  safetensors.torch.save_file(tensors, path)
  found = torch_files.describe(path)
  digest = found.pop("sha256")
  shell = subprocess.run(["sha256sum", path], capture_output=True, check=True)
  assert shell.stdout.decode().startswith(f"{digest} ")
  assert found == {
    "file": "a.safetensors",
    "size": path.stat().st_size,
    "container": None,
    "num_tensors": 2,
    "dtypes": {"bfloat16": 1, "float32": 1},
  }
  assert json.loads(json.dumps(found)) == found


# --- files that are refused ------------------------------------------------


class Malicious:
  """Unpickling it creates the file `marker`."""

  def __init__(self, marker):
    self.marker = str(marker)

  def __reduce__(self):
    return open, (self.marker, "w")


class Innocent(argparse.Namespace):
  """Not the class that is allowed, though it looks like it."""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", 0, 2, 4])
def test_code_in_a_pickle_is_refused_and_never_runs(form, state, tmp_path):
  path, marker = tmp_path / "a.pt", tmp_path / "marker"
  content = {"model": state, "args": Malicious(marker)}
  if isinstance(form, int):
    path.write_bytes(pickle.dumps(Malicious(marker), protocol=form))
  else:
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
  with pytest.raises(ValueError, match="refused.*code.*never run"):
    torch_files.load_state_dict(path)
  assert not marker.exists()
  if form in ("zip", 2):  # what the test would miss if the file were harmless
    load = pickle.load if form == 2 else torch.load
    with path.open("rb") as file:
      load(file, **({} if form == 2 else {"weights_only": False}))
    assert marker.exists()


@pytest.mark.parametrize(
  "entry", [Innocent(a=1), pathlib.PurePosixPath("a"), torch.nn.Linear(1, 1)]
)
def test_other_classes_are_refused_by_name(entry, state, tmp_path):
  torch.save({"model": state, "args": entry}, tmp_path / "a.pt")
  with pytest.raises(ValueError, match=f"refused.*{type(entry).__name__}"):
    torch_files.load_state_dict(tmp_path / "a.pt")


def test_parsed_arguments_are_plain_data(state, tmp_path):
  content = {"model": state, "args": argparse.Namespace(lr=1e-4)}
  torch.save(content, tmp_path / "a.pt")
  assert torch_files.load_state_dict(tmp_path / "a.pt").keys() == state.keys()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "old.pt"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.95])
def test_a_truncated_file_is_refused(name, kept, state, tmp_path):
  path = tmp_path / name
  if path.suffix == ".safetensors":
    safetensors.torch.save_file(state, path)
  else:
    torch.save(state, path, _use_new_zipfile_serialization=name != "old.pt")
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * kept)])
  want = "truncated.*[Dd]ownload it again" if kept else "is empty"
  with pytest.raises(ValueError, match=want):
    torch_files.load_state_dict(path)


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
def test_a_file_of_another_kind_is_refused(suffix, tmp_path):
  path = tmp_path / f"a.{suffix}"
  for data in (b"<html>Not found</html>\n", b"\x89PNG\r\n\x1a\n" + bytes(99)):
    path.write_bytes(data)
    with pytest.raises(ValueError, match="truncated"):
      torch_files.load_state_dict(path)
  with pytest.raises(ValueError, match="no such file"):
    torch_files.load_state_dict(tmp_path)


@pytest.mark.parametrize(
  "content", [{}, {"model": {}, "steps": 3}, [1, 2], torch.zeros(3), "text"]
)
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
  torch.save(content, tmp_path / "a.pt")
  with pytest.raises(ValueError, match="found no tensors"):
    torch_files.load_state_dict(tmp_path / "a.pt")


def test_a_safetensors_file_without_tensors_or_with_a_key(tmp_path):
  path = tmp_path / "a.safetensors"
  safetensors.torch.save_file({}, path)
  with pytest.raises(ValueError, match="holds no tensors"):
    torch_files.load_state_dict(path)
  with pytest.raises(ValueError, match="Leave the key out"):
    torch_files.load_state_dict(path, key="ema")


def test_what_is_no_tensor_is_named(state, tmp_path):
  torch.save({"model": {**state, "scale": 2.0}}, tmp_path / "a.pt")
  with pytest.raises(ValueError, match=r"\['scale'\].*no tensors"):
    torch_files.load_state_dict(tmp_path / "a.pt")


def test_without_torch_the_reader_says_so(state, tmp_path, monkeypatch):
  torch.save(state, tmp_path / "a.pt")
  safetensors.torch.save_file(state, tmp_path / "a.safetensors")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ValueError, match="need the package torch.*pip install"):
    torch_files.load_state_dict(tmp_path / "a.pt")
  torch_files.load_state_dict(tmp_path / "a.safetensors")


def test_a_file_with_nothing_but_an_average_is_no_model(state, tmp_path):
  torch.save({"ema": state, "steps": 7}, tmp_path / "a.pt")
  with pytest.raises(ValueError, match="found no tensors"):
    torch_files.load_state_dict(tmp_path / "a.pt")
