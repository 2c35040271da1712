"""What the pages say of the code is so."""

import pathlib
import re
import shlex

import pytest

from tensorar_jax import interfaces
from tensorar_jax.cli import config, modes, parser

ROOT = pathlib.Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
PAGES += sorted(ROOT.glob("[a-z]*/**/README.md"), key=str)
PAGES = list(dict.fromkeys(PAGES))
CONFIGS = [str(p.relative_to(ROOT)) for p in ROOT.glob("configs/**/*.py")]


def section(page: str, title: str) -> str:
  text = (ROOT / page).read_text()
  return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_page_on_backbones_names_every_member_and_is_short():
  page = section("docs/extending.md", "Add a backbone")
  assert len(page.strip().splitlines()) < 40  # with its title
  members = {*interfaces.Backbone.__annotations__, *vars(interfaces.Backbone)}
  members = {m for m in members if not m.startswith("_")} | {"__call__"}
  assert not [m for m in members if not re.search(rf"\b{m}\b", page)]


def test_every_mode_is_explained():
  page = section("README.md", "One command, several modes")
  overview = parser.overview()
  assert not [mode for mode in modes.MODES if f"`{mode}`" not in page]
  assert not [mode for mode in modes.MODES if f"\n  {mode} " not in overview]


def test_every_command_on_a_page_is_understood():
  """Flags, modes and values of the config fit together; nothing is run."""
  count = 0
  for page in PAGES:
    text = page.read_text().replace("\\\n", " ")
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
      for words in commands(block):
        command = parser.parse(words)
        assert command.mode in modes.MODES
        file = str(command.options.config).partition(":")[0]
        if file in CONFIGS:  # not that of a reader
          config.read(command.options.config, command.overrides)
        count += 1
  assert count > 30


def commands(block: str):
  """The words after the program of every command line of `main` in a block."""
  variables = {}
  for line in block.splitlines():
    for name, value in variables.items():
      line = line.replace(f"${name}", value)
    if set_here := re.fullmatch(r"(\w+)=\"(.*)\"", line):
      variables[set_here[1]] = set_here[2]
      line = set_here[2]
    for part in line.split("&&"):
      if "-m tensorar_jax.main " in part:
        words = shlex.split(
          part.split("-m tensorar_jax.main ")[1], comments=True
        )
        yield [w for w in words if not w.startswith("[")]


def test_every_config_file_is_named():
  text = "".join(page.read_text() for page in PAGES)
  for path in (ROOT / "configs").glob("*.py"):
    family, _, size = path.stem.rpartition("_")
    assert path.stem in text or (family in text and f"_{size}`" in text), path


# What runs the commands of the first page, with a smaller config.
RUN_BY = {
  "make demo": "e2e/story_test.py",
  "make test": ".",
  'pip install "tensorar_jax[cuda13] @'
  ' git+https://github.com/OWNER/tensorar_jax"': "project_test.py",
  "pip install -e '.[demo]'": "e2e/demo_test.py",
  "python -m tensorar_jax.main --config=configs/digits.py --mode=demo": (
    "e2e/demo_test.py"
  ),
  "python -m tensorar_jax.main --config=configs/digits.py [--mode=...]"
  " [--workdir=...]": "e2e/story_test.py",
}


def test_every_command_of_the_first_page_is_run_by_a_test():
  text = (ROOT / "README.md").read_text().replace("\\\n  ", "")
  blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
  lines = [
    line.split("  #")[0].strip() for b in blocks for line in b.split("\n")
  ]
  assert {line for line in lines if line} == RUN_BY.keys()
  assert all((ROOT / "tests" / where).exists() for where in RUN_BY.values())
  makefile = (ROOT / "Makefile").read_text()
  assert "-m tensorar_jax.main --config=configs/digits.py\n" in makefile


def test_every_page_is_found_from_the_index():
  index = (ROOT / "docs" / "README.md").read_text()
  names = {path.name for path in DOCS} - {"README.md"}
  assert not [name for name in names if f"]({name})" not in index]


def test_tests_that_a_page_names_are_there():
  count = 0
  for page in DOCS:
    for file, test in re.findall(
      r"`(?:tests/)?(\S+_test\.py)::(\w+)`", page.read_text()
    ):
      found = [*(ROOT / "tests").rglob(file)]
      assert found, f"{page.name}: {file}"
      texts = [path.read_text() for path in found]
      assert any(f"def {test}(" in text for text in texts), test
      count += 1
  assert count > 40


def test_sections_that_the_code_cites_are_there():
  heads = re.findall(
    r"^## (\d+)\. ", (ROOT / "docs/method.md").read_text(), re.M
  )
  assert heads == [str(n) for n in range(1, 11)]
  for path in sorted(ROOT.glob("[a-z]*/**/*.py")):
    text = " ".join(path.read_text().split())
    for page, number in re.findall(r"(docs/\w+\.md),? sections? (\d+)", text):
      assert page == "docs/method.md" and number in heads, path


def test_nothing_leads_out_of_the_clone():
  """To a folder beside it, or to a machine's own paths."""
  out = re.compile(r"\.\./shared|/work/|/root/|file://")
  for path in ROOT.rglob("*"):
    place = path.relative_to(ROOT)
    first = place.parts[0] if place.parts else ""
    if first in (".git", "runs") or first.startswith(".venv"):
      continue
    if "docs/api" in str(place):
      continue
    if path.suffix in (".md", ".py", ".sh", ".toml", ".yml", ".yaml"):
      assert path == ROOT / "tests/readme_test.py" or not out.search(
        path.read_text()
      ), place


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
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
