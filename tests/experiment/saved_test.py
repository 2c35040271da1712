"""Work directories of earlier versions: their configs left defaults out."""

import json
import pathlib

import jax.numpy as jnp
import pytest

from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.experiment import config_file, parse, saved

# What the version before typed stages wrote for two configs, by stage.
OLD = json.loads(
  pathlib.Path(__file__).with_name("old_configs.json").read_text()
)


def checkpoint(folder, config):
  checkpoints = orbax_io.Checkpoints(folder / "checkpoints")
  state = {"params": {"w": jnp.ones(3)}}
  checkpoints.save(1, state, {}, {"config": config})
  checkpoints.close()


@pytest.mark.parametrize("name", OLD)
def test_an_old_config_is_that_of_todays_stage(name, tmp_path):
  stages = config_file.load(f"configs/{name}.py").stages
  assert list(stages) == list(OLD[name]) or name != "digits"
  for stage, old in OLD[name].items():
    read = saved.read_saved(old, tmp_path)
    assert saved.saved_config(read) == saved.saved_config(stages[stage])


def test_a_folder_of_an_old_config_goes_on(tmp_path):
  old = OLD["digits"]["tensorar"]
  assert "beta2" not in old["optim"]  # a default, which was not written
  stage = config_file.load("configs/digits.py").stages["tensorar"]
  checkpoint(tmp_path, old)
  assert saved.claim(tmp_path, stage)["optim"]["beta2"] == 0.95
  assert saved.stage_in(orbax_io.find(tmp_path)).tensorar.window == 4
  saved.claim(tmp_path, parse.changed(stage, "train.log_every", 3))
  with pytest.raises(ValueError, match="optim.beta2: was 0.95, is 0.9"):
    saved.claim(tmp_path, parse.changed(stage, "optim.beta2", 0.9))
  with pytest.raises(ValueError, match="noise.kind: was 'categorical'"):
    saved.claim(tmp_path, parse.changed(stage, "noise.kind", "none"))


def test_what_this_version_cannot_read_says_what_to_do(tmp_path):
  stage = config_file.load("configs/digits.py").stages["base"]
  old = OLD["digits"]["base"]
  checkpoint(tmp_path, {**old, "noise": {"sort": "salt"}})
  with pytest.raises(ValueError, match="another version.*'sort'.*--workdir"):
    saved.claim(tmp_path, stage)


def test_a_stage_without_data_is_refused():
  stage = config_file.load("configs/digits.py").stages["base"]
  with pytest.raises(ValueError, match="the config lacks data.name"):
    saved.saved_config(parse.changed(stage, "data.name", ""))


def test_a_stage_that_is_not_trained_yet_says_so(tmp_path):
  with pytest.raises(
    ValueError, match="stage 'base'. Train it first: --mode=tr"
  ):
    saved.trained(tmp_path / "base")
  with pytest.raises(ValueError, match="'base' is neither .*train that stage"):
    saved.resolve("base", tmp_path)
