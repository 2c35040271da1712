"""Published files: which weights are taken, and what to do if none fit."""

import json

import numpy as np
import pytest

import tensorar_jax as tj
from tensorar_jax.backbones import llamagen
from tensorar_jax.checkpoints import orbax_io, torch_import
from tensorar_jax.experiment import published
from tests import tiny
from tests.contract import families
from tests.e2e.tiny_published import BACKBONE
from tests.tiny_configs import stage

pytestmark = pytest.mark.torch  # their files are PyTorch's


@pytest.fixture(scope="module")
def base(parity):
  return parity / "llamagen" / "gpt_c2i" / "checkpoint.pt"


@pytest.fixture(scope="module")
def training(base, tmp_path_factory):
  """A training checkpoint: the weights, and their average beside them."""
  import torch

  state = torch.load(base, weights_only=True)["model"]
  average = {name: tensor + 1 for name, tensor in state.items()}
  path = tmp_path_factory.mktemp("training") / "training.pt"
  torch.save({"model": state, "ema": average, "steps": 3}, path)
  return path


def norm(path, **options) -> np.ndarray:
  model = tj.import_backbone("llamagen", str(path), **BACKBONE, **options)
  return np.asarray(model.norm.scale[...])


def test_a_compiled_models_names_are_read_without_the_wrapper(field):
  assert norm(field / "compiled.pt").shape == (64,)


def test_the_average_is_taken_on_request_and_named(training, caplog):
  plain = norm(training)
  assert "of the entry 'model'" in caplog.text
  assert "source_key=ENTRY" in caplog.text
  assert "others under ['ema']" in caplog.text
  caplog.clear()
  np.testing.assert_allclose(norm(training, key="ema"), plain + 1, rtol=1e-2)
  assert not caplog.text
  with pytest.raises(ValueError, match=r"Choose one of \['model', 'ema'\]"):
    norm(training, key="average")


def test_a_stage_takes_the_entry_that_it_names(training, tmp_path, caplog):
  imported = stage(
    source=str(training),
    source_key="ema",
    tensorar=dict(window=1),
    backbone=dict(BACKBONE, name="llamagen", mlp_multiple=256),
  )
  with caplog.at_level("INFO"):
    published.import_stage(imported, tmp_path / "base")
  assert "its entry 'ema'" in caplog.text
  meta = orbax_io.read_meta(orbax_io.find(tmp_path / "base"))
  assert meta["source"]["container"] == "ema"
  assert meta["config"]["source_key"] == "ema"
  with pytest.raises(ValueError, match="source_key: was 'ema', is None"):
    published.import_stage(
      stage(
        source=str(training),
        tensorar=dict(window=1),
        backbone=dict(BACKBONE, name="llamagen", mlp_multiple=256),
      ),
      tmp_path / "base",
    )


def test_a_foreign_prefix_is_named_in_one_line(base, tmp_path):
  import torch

  state = torch.load(base, weights_only=True)["model"]
  torch.save({f"net.gpt.{n}": t for n, t in state.items()}, tmp_path / "a.pt")
  with pytest.raises(ValueError, match="begins with 'net.gpt.'") as error:
    norm(tmp_path / "a.pt")
  assert len(str(error.value).splitlines()) == 1


def test_a_tokenizer_inside_another_models_file_says_so(parity):
  """Without `weights` the average is looked for, which the file lacks."""
  folder = parity / "open_magvit2" / "gpt"
  meta = json.loads((folder / "config.json").read_text())["model_init_args"]
  meta = meta["first_stage_config"]["params"]["ddconfig"]
  sizes = dict(
    channels=meta["ch"],
    channel_multipliers=tuple(meta["ch_mult"]),
    num_res_blocks=meta["num_res_blocks"],
    bits=(3, 5),
    image_size=(meta["resolution"],) * 2,
  )
  path = str(folder / "model.ckpt")
  words = "weights='first_stage'. .*--config.tokenizer.weights=first_stage"
  with pytest.raises(ValueError, match=words) as error:
    tj.import_tokenizer("lfq", path, **sizes)
  assert len(str(error.value).splitlines()) == 1


def test_another_published_size_is_named(parity):
  """By the names and shapes of a published file alone."""
  shapes = families.manifest(parity, "llamagen", "c2i_L_256.pt")
  advice = published._what_fits(llamagen, tiny.CONFIG, shapes)
  assert "variant='L'" in advice and "--config.backbone.variant=L" in advice


def test_what_fits_nothing_is_listed(base, tmp_path, monkeypatch):
  import torch

  monkeypatch.setattr(llamagen, "VARIANTS", {})  # each takes a second to try
  state = torch.load(base, weights_only=True)["model"]
  torch.save({**state, "odd": torch.zeros(1)}, tmp_path / "a.pt")
  with pytest.raises(ValueError, match="a.pt: .*1 problems.*\n.*claims odd"):
    norm(tmp_path / "a.pt")


def test_prefixes_are_foreign_only_where_the_rest_is_known():
  rules = llamagen.import_rules(llamagen.Config())
  known = ["a.b.norm.weight", "a.b.layers.0.ffn_norm.weight"]
  assert torch_import.foreign_prefix(rules, known) == "a.b."
  assert not torch_import.foreign_prefix(rules, [*known, "a.b.odd"])
  assert not torch_import.foreign_prefix(rules, ["norm.weight"])
