"""Every notebook of notebooks/ runs from its top to its end, in small.

Each has a kernel of its own, in a copy of the project, with the settings of the
cell tagged `parameters` overridden after it.
"""

import pathlib
import re
import shutil
import tomllib

import nbclient
import nbformat
import pytest

from tensorar_jax.checkpoints import torch_export
from tensorar_jax.parallel import weights
from tensorar_jax.tokenizers import vq
from tests import tiny
from tests.checkpoints import fake_hub
from tests.e2e.tiny_published import BACKBONE

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# What configs/llamagen_b.py would be for the tiny files that the tests have.
TINY = """
from configs import llamagen_b

def get_config():
  config = llamagen_b.get_config()
  config.backbone = dict(name="llamagen", **{backbone})
  config.tokenizer = dict(name="vq", init="tokenizer", **{tokenizer})
  config.conditioning.num_classes = 10
  return config
"""
TOKENIZER = dict(tiny.VQ, codebook_size=96, image_size=(8, 8))
SMALL = {
  "quickstart": dict(
    BASE_STEPS=2, TENSORAR_STEPS=2, WIDTH=16, LAYERS=1, PER_CLASS=1
  ),
  "published_weights": dict(
    CONFIG="tiny.py",
    BACKBONE_SIZES=BACKBONE,
    TOKENIZER_SIZES=TOKENIZER,
    NUM_CLASSES=10,
    CLASSES=[1, 2],
    STEPS=2,
    BATCH_SIZE=2,
    SAMPLES=2,
  ),
  "add_your_backbone": dict(STEPS=2, PER_CLASS=1),
  "compile_for_tpu": dict(
    TARGET="here",
    CONFIG="configs/digits.py",
    FLAGS="--batch_size=1 --config.train.batch_size=2"
    " --config.backbone.width=16 --config.backbone.num_layers=1",
  ),
}


def execute(name: str, folder: pathlib.Path) -> list[list[dict]]:
  """The outputs of every code cell, with settings of SMALL, in `folder`."""
  notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
  tagged = [
    number
    for number, cell in enumerate(notebook.cells)
    if "parameters" in cell.metadata.get("tags", ())
  ]
  assert len(tagged) == 1
  settings = "\n".join(f"{key} = {v!r}" for key, v in SMALL[name].items())
  for key in SMALL[name]:  # each is a setting of the notebook
    assert re.search(rf"\b{key}\b.* =", notebook.cells[tagged[0]].source), key
  cell = nbformat.v4.new_code_cell(settings)
  notebook.cells.insert(tagged[0] + 1, cell)
  resources = {"metadata": {"path": str(folder)}}
  nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
  return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def pictures(outputs) -> int:
  return sum("image/png" in o.get("data", ()) for cell in outputs for o in cell)


def text(outputs) -> str:
  return "".join(o.get("text", "") for cell in outputs for o in cell)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> pathlib.Path:
  """What a notebook sees of the project; it may write there."""
  folder = tmp_path_factory.mktemp("project")
  ignore = shutil.ignore_patterns("__pycache__")
  for name in ("tensorar_jax", "configs"):
    shutil.copytree(ROOT / name, folder / name, ignore=ignore)
  return folder


@pytest.mark.slow
def test_quickstart(project):
  outputs = execute("quickstart", project)
  assert "tensorar 2/2 (100%)" in text(outputs)
  assert pictures(outputs) == 5


@pytest.mark.slow
def test_published_weights(project, parity, monkeypatch):
  make = lambda rngs: vq.Model(vq.Config(**TOKENIZER), rngs=rngs)
  tokenizer = tiny.redraw(weights.abstract(make))
  rules = vq.import_rules(tokenizer.config)
  tensors = torch_export.export_state_dict(tokenizer, rules)
  torch_export.save(project / "vq.pt", tensors)
  source = parity / "llamagen" / "gpt_c2i" / "checkpoint.pt"
  config = TINY.format(backbone=BACKBONE, tokenizer=TOKENIZER)
  (project / "tiny.py").write_text(config)
  with fake_hub.serve() as served:
    served.files["FoundationVision/LlamaGen"] = {
      "c2i_B_256.pt": source.read_bytes(),
      "vq_ds16_c2i.pt": (project / "vq.pt").read_bytes(),
    }
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("HF_HOME", str(project / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    outputs = execute("published_weights", project)
  assert "100.0% of the tokens are the base's" in text(outputs)
  assert "tensorar 2/2 (100%)" in text(outputs)
  assert pictures(outputs) == 3


@pytest.mark.slow
def test_add_your_backbone(project):
  outputs = execute("add_your_backbone", project)
  assert "tensorar 2/2 (100%)" in text(outputs)
  assert pictures(outputs) == 1


def test_compile_for_tpu(project):
  outputs = execute("compile_for_tpu", project)
  assert "stage drafts on here" in text(outputs)
  assert pictures(outputs) == 1


def test_notebooks_name_one_repository_and_no_machine():
  assert {path.stem for path in NOTEBOOKS} == SMALL.keys()
  url = PROJECT["urls"]["Repository"]
  colab = f"https://colab.research.google.com/github/{url.split('.com/')[1]}"
  for path in NOTEBOOKS:
    cells = nbformat.read(path, 4).cells
    badge = f"({colab}/blob/main/notebooks/{path.name})"
    assert cells[0].source.splitlines()[0].endswith(badge)
    install = [c.source for c in cells if "git clone" in c.source]
    assert len(install) == 1 and f"git clone -q {url}\n" in install[0]
    (extra,) = re.findall(
      r"!notebooks/install.sh (?:\.|'\.\[(\w+)]')\n", install[0]
    )
    assert not extra or extra in PROJECT["optional-dependencies"]
    assert "pip install" not in path.read_text()
    content = path.read_text()
    assert path.stat().st_size < 300_000
    assert not re.search(r"/(tmp|home|root|work)/", content), path.name
