"""The fixtures are complete, and small enough to be cloned."""

import pathlib

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
# Names that archives, copies and ignore files tend to lose.
FRAGILE = (
  "hidden/.ipynb_checkpoints/a.png",
  "hidden/__MACOSX/cat/._a.png",
)


def test_nothing_is_lost_executable_or_large():
  files = [path for path in FIXTURES.rglob("*") if path.is_file()]
  assert all((FIXTURES / "field" / name).is_file() for name in FRAGILE)
  families = {path.parent.name for path in FIXTURES.glob("parity/*/README.md")}
  assert families == {path.name for path in (FIXTURES / "parity").iterdir()}
  assert not [path for path in files if path.stat().st_mode & 0o111]
  assert sum(path.stat().st_size for path in files) < 50e6


def test_readme_of_the_field_files_names_each():
  text = (FIXTURES / "field" / "README.md").read_text()
  names = {p.name for p in (FIXTURES / "field").iterdir()} - {"README.md"}
  assert not [name for name in names if name.split(".")[0] not in text]
