"""`--mode=compile`, for the devices that are here and for named ones."""

import importlib.util
import json
import types

import jax
import pytest

from tensorar_jax import main
from tensorar_jax.method import sampling
from tensorar_jax.parallel import chips
from tensorar_jax.performance import compile, targets
from tensorar_jax.training import logs
from tests import tiny_configs

HERE = jax.devices()[:1]
TINY = chips.Chip("tiny", 1e9, 1e5, 1e9, 1e9, float32_flops=1e9)
STAGE = tiny_configs.stage(sampling=dict(guidance=1.5))
STAGES = {"tensorar": STAGE}


@pytest.fixture(scope="module")
def too_large(tmp_path_factory):
  """(the error, the report) of a chip whose memory is too small."""
  path = tmp_path_factory.mktemp("compile") / "report.json"
  target = targets.Target("tiny", HERE, TINY)
  with pytest.raises(ValueError) as caught:
    compile.report(STAGES, None, target, batch_size=2, output=str(path))
  return str(caught.value), json.loads(path.read_text())


def test_what_does_not_fit_is_an_error_behind_its_report(too_large):
  error, report = too_large
  assert error.startswith("tiny: train step and sampler of stage tensorar do")
  assert [one["fits"] for one in report["programs"]] == [False, False]
  assert report["target"] == "tiny" and report["hbm_bytes"] == TINY.hbm_bytes


def test_the_report_has_memory_flops_and_a_bound(too_large):
  train, sampler = too_large[1]["programs"]
  for one in (train, sampler):
    memory = one["memory"]
    parts = memory["argument"] + memory["output"] + memory["temp"]
    assert memory["peak"] >= parts - memory["alias"] > 0
    assert one["collectives"] == []  # on one device
    assert one["loops_of_unknown_length"] == []
    assert one["seconds"] == max(one["busy_seconds"].values())
    peak = one["seconds"] * TINY.peak_flops
    assert one["mfu"] == one["model_flops"] / peak
  # The state is donated: what comes out lies where it was.
  assert train["memory"]["alias"] > 0.9 * train["memory"]["output"]
  assert train["flops"] >= train["model_flops"] > 0
  assert sampler["flops"] == sampler["model_flops"] > 0


def test_the_bound_is_of_what_is_multiplied(monkeypatch):
  """Products of float32 on a GPU are of TF32, unless it is told otherwise."""
  twice = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((7, 7), "f4"))
  chip = chips.CHIPS["h100"]
  monkeypatch.setattr(compile.sharding, "platform_of", lambda device: "gpu")
  target = targets.Target("h100:1", HERE, chip)

  def busy(dtype):
    program = compile.Program("p", lambda: twice, 686, 686, 1, dtype=dtype)
    return compile.measure(program, target)["busy_seconds"]["flops"]

  assert busy("float32") == pytest.approx(686 / 494.5e12)
  assert busy("bfloat16") == pytest.approx(686 / 989e12)
  with jax.default_matmul_precision("highest"):
    assert busy("float32") == pytest.approx(686 / 67e12)


def test_the_cache_of_the_sampler_is_not_copied(too_large):
  sampler = too_large[1]["programs"][1]
  assert sampler["cache_copies"] == 0


def test_where_no_limit_is_known_it_fits():
  double = jax.jit(lambda x: 2 * x).lower(jax.ShapeDtypeStruct((7,), "float32"))
  program = compile.Program("double", lambda: double, 7, 7, images=1)
  report = compile.measure(program, targets.find("here"))
  assert report["fits"] and "mfu" not in report
  assert report["memory"]["argument"] == report["memory"]["output"] == 28


def test_what_the_compiler_says_of_memory_is_reported():
  def lower():
    words = "RESOURCE_EXHAUSTED: Ran out of memory on HBM: 80G of 15G.\nMore."
    raise jax.errors.JaxRuntimeError(words)

  lowered = types.SimpleNamespace(compile=lower)
  program = compile.Program("train step", lambda: lowered, 7, 7, images=1)
  report = compile.measure(program, targets.find("here"))
  assert report["fits"] is False
  assert report["reason"] == "Ran out of memory on HBM: 80G of 15G."


def test_a_report_is_not_overwritten(tmp_path):
  path = tmp_path / "report.json"
  path.write_text("{}")
  with pytest.raises(ValueError, match="is there already"):
    compile.report(STAGES, None, targets.find("here"), output=str(path))


@pytest.mark.parametrize(
  "name, words",
  [
    ("v5:4x4", "expected `here`, or a chip of .*'v5e', 'v5p'"),
    ("v5e", "and how many, as v5e:4x4"),
    ("h100:2x4", "or h100:8"),
  ],
)
def test_an_unknown_target_says_what_there_is(name, words):
  with pytest.raises(ValueError, match=words):
    targets.find(name)


@pytest.mark.parametrize("name", ["v5e:4x4", "h100:8"])
def test_a_missing_compiler_says_what_to_install(name, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install 'tensorar_jax\\[compile"):
    targets.find(name)


@pytest.mark.parametrize(
  "there, missing",
  [
    (["jax_cuda12_plugin", "nvidia.cuda_nvcc"], None),
    (["jax_cuda13_plugin", "nvidia.cu13"], None),
    (["jax_cuda12_plugin", "nvidia.cu13"], "nvidia.cuda_nvcc"),
    (["jax_cuda13_plugin"], "nvidia.cu13"),
    (["nvidia.cu13"], "jax_cuda13_plugin or jax_cuda12_plugin"),
  ],
)
def test_gpus_take_the_plugin_that_is_there(
  there, missing, monkeypatch, tmp_path
):
  """With stand-ins for the packages of CUDA 12 and 13."""
  (tmp_path / "bin").mkdir()
  (tmp_path / "bin" / "ptxas").touch()
  found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: found if name in there else None
  )
  monkeypatch.setattr(targets.shutil, "which", lambda name: None)
  asked = []

  def describe(**options):
    asked.append(options)
    return types.SimpleNamespace(devices=HERE)

  monkeypatch.setattr(targets.topologies, "get_topology_desc", describe)
  if missing:
    with pytest.raises(ValueError, match=f"hardware, {missing}: pip install"):
      targets.find("h100:16")
  else:
    assert targets.find("h100:16").devices == HERE
    (options,) = asked
    assert (options["platform"], options["topology"]) == ("cuda", "1x2x8")


def test_cuda_without_its_compiler_is_not_enough(monkeypatch, tmp_path):
  """PyTorch of CUDA 13 brings nvidia.cu13 without ptxas."""
  found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
  monkeypatch.setattr(targets.shutil, "which", lambda name: None)
  with pytest.raises(ValueError, match="hardware, nvidia.cu13: pip install"):
    targets.find("h100:1")


def test_the_command_ends_in_one_line(monkeypatch):
  monkeypatch.setattr(logs, "log_to_console", lambda: None)
  words = ["--config=configs/digits.py", "--mode=compile", "--target=x:1"]
  with pytest.raises(SystemExit, match="error: --target=x:1: expected"):
    main.main(["main", *words])


def test_the_table_of_chips_knows_its_devices():
  assert set(chips.KINDS.values()) == set(chips.CHIPS)
  for name, chip in chips.CHIPS.items():
    assert chip.name == name
    # FLOPs for a byte of memory, and of links: of one order for all of them.
    assert 100 < chip.peak_flops / chip.hbm_bandwidth < 700
    assert 2 < chip.hbm_bandwidth / chip.link_bandwidth < 15
  device = types.SimpleNamespace(device_kind="TPU v5 lite")
  assert chips.of(device).name == "v5e"
  assert chips.of(HERE[0]) is None


def test_the_target_decides_how_layers_are_decoded():
  """Not the devices that are here."""
  device = types.SimpleNamespace(platform="tpu")
  place = types.SimpleNamespace(device_set=[device])
  cond = {"label": types.SimpleNamespace(sharding=place)}
  assert sampling._platform_and_mesh(cond) == ("tpu", None)


# libtpu is an optional extra of 200 MB: where it is, it is asked as well.
if importlib.util.find_spec("libtpu"):

  def test_tpus_that_are_not_there():
    name = "v4:2x2x1"
    targets.stay_off_devices(name)
    target = targets.find(name)
    assert len(target.devices) == 4
    assert chips.of(target.devices[0]) == target.chip
    report = compile.report(STAGES, None, target, batch_size=4)
    train, sampler = report["programs"]
    assert train["fits"] and sampler["fits"]
    assert {row["kind"] for row in train["collectives"]} >= {"all-reduce"}
    assert sampler["collectives"] == [] and sampler["cache_copies"] == 0
