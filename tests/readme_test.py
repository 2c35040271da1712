"""What the pages say of the code is so."""

import pathlib
import re

import pytest

from tensorar_jax import interfaces

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *ROOT.glob("[a-z]*/**/README.md")]


def section(page: str, title: str) -> str:
  text = (ROOT / page).read_text()
  return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_page_on_backbones_names_every_member_and_is_short():
  page = section("tensorar_jax/backbones/README.md", "Add your own backbone")
  assert len(page.strip().splitlines()) < 40  # with its title
  members = {*interfaces.Backbone.__annotations__, *vars(interfaces.Backbone)}
  members = {m for m in members if not m.startswith("_")} | {"__call__"}
  assert not [m for m in members if not re.search(rf"\b{m}\b", page)]


def test_every_mode_is_explained():
  from tensorar_jax import main

  page = section("README.md", "One command, several modes")
  assert not [mode for mode in main.MODES if f"`{mode}`" not in page]
  assert not [mode for mode in main.MODES if f"  {mode} " not in main.__doc__]


def test_every_config_file_is_named():
  text = "".join(page.read_text() for page in PAGES)
  for path in (ROOT / "configs").glob("*.py"):
    family, _, size = path.stem.rpartition("_")
    assert path.stem in text or (family in text and f"_{size}`" in text), path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.parent.name)
def test_links_lead_somewhere(page):
  """Files, pictures and sections; other sites are not asked."""
  links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
  for link in (link for link in links if "://" not in link):
    file, _, anchor = link.partition("#")
    target = page.parent / file if file else page
    assert target.exists(), link
    if anchor:
      heads = re.findall(r"^#+ (.*)", target.read_text(), re.M)
      slugs = [re.sub(r"[^a-z0-9 -]", "", h.lower()) for h in heads]
      assert anchor in [slug.replace(" ", "-") for slug in slugs], link
