"""Who may import whom, and what may not appear in shared code."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "tensorar_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import from layers to its right, and from its own.
LAYERS = (
  {"main"},
  {"commands"},
  {"evaluation.progress", "ablations.runs"},
  {"report", "evaluation.protocol", "benchmark", "compile", "demo_page"},
  {
    *("demo", "evaluation.sample_files", "benchmark_report", "peer_torch"),
    "ablations.report",
  },
  {"plots", "evaluation.evaluate", "data.tokenize"},
  {"visualize"},
  {"workloads"},
  {
    *("train", "evaluation.samples", "evaluation.diagnostics"),
    *("evaluation.request", "evaluation.yardsticks", "evaluation.summary"),
  },
  {"published", "ablations.variants"},
  {"build", "objective", "metrics", "throughput", "train_step"},
  {
    "sampling",
    "optim",
    "checkpoints.hub",
    "checkpoints.locations",
    "checkpoints.orbax_io",
    "checkpoints.torch_import",
    "checkpoints.torch_export",
    "checkpoints.torch_files",
    "evaluation.npz",
    "evaluation.resize",
    "data.encoder",
    "data.cache",
    "data.captions",
    "data.codes",
    "data.images",
    "data.jsonl",
    "data.shapes",
    "data.shards",
    "data.pipeline",
    "data.sources",
    "data.webdataset",
    "evaluation.adm",
    "evaluation.scores",
    "evaluation.shapes",
    *("evaluation.geneval", "evaluation.dpg"),
    *("evaluation.prompt_scores", "evaluation.papers"),
    "evaluation.classifier",
    "evaluation.extractor",
    "evaluation.inception",
    "text.chat",
    "text.encoder",
    "text.words",
  },
  {"tensorar", "losses", "transformer", "text.t5"},
  {
    *("windows", "noising", "layers", "convolutions", "flops", "machine"),
    *("targets", "drawing", "traces"),
    *("conditioning", "preemption", "resumable", "text.captions"),
  },
  {"attention"},
  {"sharding", "processes"},
  {"weights", "hardware", "hlo"},
  {"interfaces"},
)
FAMILIES = ("backbones", "tokenizers")
FAMILIES_MAY_IMPORT = {
  *("transformer", "conditioning", "layers", "convolutions", "interfaces"),
  "sharding",
}
HEAVY = {
  "gradio": {"demo_page"},
  "tensorboard": {"metrics"},
  "tensorflow": {"data.sources"},
  "tensorflow_datasets": {"data.sources"},
  "torch": {
    *("checkpoints.torch_files", "checkpoints.torch_export", "peer_torch"),
  },
  "transformers": {"conditioning", "peer_torch"},
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


def layer(module: str) -> int | None:
  for index, names in enumerate(LAYERS):
    if module in names:
      return index
  return None


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_to_the_right(path):
  module = module_name(path)
  if path.name == "__init__.py":
    return
  for other in ours(path):
    if module.split(".")[0] in FAMILIES:
      assert other in FAMILIES_MAY_IMPORT, f"{module} -> {other}"
      continue
    assert other.split(".")[0] not in FAMILIES, f"{module} -> {other}"
    assert layer(module) is not None, f"place {module} in LAYERS"
    assert layer(other) is not None, f"place {other} in LAYERS"
    assert layer(module) <= layer(other), f"{module} -> {other}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_packages_are_imported_lazily_and_in_one_place(path):
  for name, inside in imports(path):
    root = name.split(".")[0]
    if root in HEAVY:
      assert module_name(path) in HEAVY[root] and inside, name
    # These import TensorFlow.
    assert not name.startswith(("clu.metric_writers", "clu.periodic_actions"))


# Where the published files of every family are: one table, and data alone.
TABLES = ("checkpoints.locations",)
# Modules that read what a family's authors have written, in words only.
FORMATS = ("data.codes", "data.images", "data.jsonl", "published")
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
    found = family.search(text)
    assert not found, f"{path.name} names {found[0]}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_stay_small(path):
  assert len(path.read_text().splitlines()) <= 400
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef):
      length = node.end_lineno - node.lineno + 1
      assert length <= 60, f"{node.name} has {length} lines"
