"""Who may import whom, and what may not appear in shared code."""

import ast
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "tensorar_jax"
FAMILIES = ("backbones", "tokenizers")
FILES = sorted(PACKAGE.rglob("*.py"))

# Packages from top to bottom. A file may import its own package and lower
# floors; packages of one floor may import each other, but not in a circle.
FLOORS = (
  {"main"},
  {"cli"},
  {"ablations", "demo", "performance"},
  {"reports"},
  {"evaluation"},
  {"generation"},
  {"training"},
  {"experiment"},
  {"data", "conditioning", "checkpoints", "method", *FAMILIES},
  {"nn"},
  {"parallel"},
  {"interfaces", "paths"},
)
# A family is reached by name, in experiment.families; it reads little itself.
FAMILIES_MAY_IMPORT = {"conditioning", "nn", "parallel", "interfaces"}
HEAVY = {
  "gradio": {"demo.page"},
  "tensorflow": {"data.sources.tfds"},
  "tensorflow_datasets": {"data.sources.tfds"},
  "torch": {
    "checkpoints.torch_files",
    "checkpoints.torch_export",
    "performance.peer_torch",
  },
  "transformers": {"performance.peer_torch"},
}


def module_name(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: pathlib.Path):
  """(module name, whether inside a function) of every import of a file."""
  tree = ast.parse(path.read_text())
  inner = {
    node
    for function in ast.walk(tree)
    if isinstance(function, ast.FunctionDef)
    for node in ast.walk(function)
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, node in inner
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield f"{node.module}.{alias.name}", node in inner


def ours(path: pathlib.Path):
  """Modules of this package that a file imports, by short name."""
  known = {module_name(p) for p in FILES}
  for name, _ in imports(path):
    short = name.removeprefix("tensorar_jax.")
    if short != name:
      yield short if short in known else short.rsplit(".", 1)[0]


def package(module: str) -> str:
  return module.split(".")[0]


def floor(module: str) -> int:
  for index, names in enumerate(FLOORS):
    if package(module) in names:
      return index
  raise AssertionError(f"{package(module)} stands on no floor of FLOORS")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path):
  module = module_name(path)
  if module == "__init__":  # the public API
    return
  for other in ours(path):
    assert floor(module) <= floor(other), f"{module} -> {other}"
    if package(other) == package(module):
      continue
    if package(module) in FAMILIES:
      assert package(other) in FAMILIES_MAY_IMPORT, f"{module} -> {other}"
    assert package(other) not in FAMILIES, f"{module} -> {other}"


def test_packages_import_each_other_in_no_circle():
  arrows = {
    (package(module_name(path)), package(other))
    for path in FILES
    if module_name(path) != "__init__"
    for other in ours(path)
  }
  graph = {name: set() for arrow in arrows for name in arrow}
  for above, below in arrows:
    if above != below:
      graph[above].add(below)
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_package_says_what_lives_in_it():
  for path in PACKAGE.glob("*/__init__.py"):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert len(text.split()) > 15, path


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_packages_are_imported_lazily_and_in_one_place(path):
  for name, inside in imports(path):
    root = name.split(".")[0]
    if root in HEAVY:
      assert module_name(path) in HEAVY[root] and inside, name
    # These import TensorFlow.
    assert not name.startswith(("clu.metric_writers", "clu.periodic_actions"))


# Modules that parse JSON: one what this project wrote, others what users or
# authors have written, or what never was in a file.
JSON = {
  "checkpoints.files",
  *("data.sources.captions", "data.sources.jsonl", "data.sources.webdataset"),
  *("generation.layouts", "cli.config", "experiment.parse"),
  *("parallel.processes", "performance.peer_torch"),
}
# Modules that write a file in its place: of the kernel, and a temporary one.
IN_PLACE = {"performance.machine", "data.sources.tfds"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_own_files_are_read_and_written_by_one_module(path):
  text, module = path.read_text(), module_name(path)
  assert module in JSON or not re.search(r"json\.loads?\(", text)
  writes = re.findall(r"(\w+|\))\.(?:write_text|write_bytes|savefig)\(", text)
  writes = {*writes} - {"partial", "files"}
  assert module in IN_PLACE | {"generation.pictures"} or not writes


# Where the published files of every family are: one table, and data alone.
TABLES = ("checkpoints.locations",)
# Modules that read what a family's authors have written, in words only.
FORMATS = (
  "data.images",
  "data.sources.codes",
  "data.sources.jsonl",
  "experiment.published",
)
PAPERS = "evaluation.papers"  # prints the rows of tables, names and all


def test_shared_code_names_no_family():
  """Not in code, and but for FORMATS not in a comment or docstring either."""
  files = [p.stem for kind in FAMILIES for p in (PACKAGE / kind).glob("*.py")]
  known = set(files) - {"__init__", "pixels"} | {"magvit", "janus"}
  family = re.compile(rf"(?<![a-z])({'|'.join(known)})(?![a-z])", re.I)
  for path in FILES:
    module = module_name(path)
    if module.split(".")[0] in FAMILIES or module in TABLES:
      continue
    if module_name(path) == PAPERS:
      continue
    text = path.read_text()
    if module in FORMATS:
      text = re.sub(r'"""(.|\n)*?"""|#.*', "", text)
    if package(module) == "cli":  # examples of commands name config files
      text = re.sub(r"configs/\w+\.py", "", text)
    found = family.search(text)
    assert not found, f"{path.name} names {found[0]}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_homes_are_expanded_in_one_place(path):
  assert module_name(path) == "paths" or "expanduser" not in path.read_text()
