"""What the README says of the code is so."""

import pathlib
import re

from tensorar_jax import interfaces

README = pathlib.Path(__file__).parents[1] / "README.md"


def section(title: str) -> str:
  return README.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_page_on_backbones_names_every_member_and_is_short():
  page = section("Add your own backbone")
  assert len(page.strip().splitlines()) < 40  # with its title
  members = {*interfaces.Backbone.__annotations__, *vars(interfaces.Backbone)}
  members = {m for m in members if not m.startswith("_")} | {"__call__"}
  assert not [m for m in members if not re.search(rf"\b{m}\b", page)]


def test_every_mode_is_explained():
  from tensorar_jax import main

  page = section("One command, several modes")
  assert not [mode for mode in main.MODES if f"`{mode}`" not in page]
  assert not [mode for mode in main.MODES if f"  {mode} " not in main.__doc__]


def test_every_config_file_is_named():
  text = README.read_text()
  for path in (README.parent / "configs").glob("*.py"):
    family, _, size = path.stem.rpartition("_")
    assert path.stem in text or (family in text and f"_{size}`" in text), path
