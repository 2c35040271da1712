"""Config files are found, and import each other, from any directory."""

import sys
import types

import pytest

from tensorar_jax.experiment import config_file

OWN = """
from configs import digits

def get_config():
  from configs.ablations import common
  assert common.DATA
  config = digits.get_config()
  config.seed = 7
  return config
"""


@pytest.mark.parametrize(
  "name", ["digits", "configs/digits.py", "fashion_mnist", "ablations/all"]
)
def test_the_projects_configs_are_found_from_anywhere(
  name, tmp_path, monkeypatch
):
  expected = config_file.load(name)
  monkeypatch.chdir(tmp_path)
  assert config_file.load(name) == expected


def test_a_misspelt_key_in_a_file_is_named_plainly_with_its_line(tmp_path):
  (tmp_path / "own.py").write_text(OWN.replace("config.seed", "config.trian.x"))
  with pytest.raises(ValueError, match="own.py, line 8: .*'trian'") as error:
    config_file.load(str(tmp_path / "own.py"))
  said = str(error.value)
  assert 'Did you mean "train"' in said and "\\" not in said
  assert len(said.splitlines()) == 1


def test_a_wrong_path_outside_of_the_project_lists_its_configs(tmp_path):
  with pytest.raises(ValueError, match="no such file.*configs/digits.py"):
    config_file.find(str(tmp_path / "absent.py"))


def test_a_file_of_the_users_may_import_them(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "own.py").write_text(OWN)
  assert config_file.load("own.py").stages["base"].seed == 7


def test_a_folder_of_the_users_comes_first_for_its_own_files(
  tmp_path, monkeypatch
):
  expected = config_file.load("fashion_mnist")
  monkeypatch.chdir(tmp_path)
  folder = tmp_path / "configs"
  folder.mkdir()
  (folder / "__init__.py").write_text("raise ImportError('not read')")
  (folder / "shared.py").write_text(OWN)
  (folder / "own.py").write_text("from configs.shared import get_config")
  (folder / "digits.py").write_text("")  # hides ours, but not from ours
  with pytest.raises(AttributeError, match="configs.digits.*get_config"):
    config_file.load("own")
  assert config_file.load("fashion_mnist") == expected
  (folder / "digits.py").unlink()
  assert config_file.load("own").stages["base"].seed == 7
  with pytest.raises(ValueError, match="mean configs/rar_xl.py"):
    config_file.load("rar_xm")


def test_an_imported_package_of_that_name_is_left_alone(monkeypatch):
  other = types.ModuleType("configs")
  monkeypatch.setitem(sys.modules, "configs", other)
  monkeypatch.delitem(sys.modules, "configs.rar_b", raising=False)
  config_file.load("rar_l")
  assert sys.modules["configs"] is other
  assert "configs.rar_b" not in sys.modules
