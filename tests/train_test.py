import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tensorar_jax as tj
from tensorar_jax import build, losses, optim, train, weights
from tensorar_jax.checkpoints import orbax_io
from tests import tiny


def test_four_steps_equal_the_published_training_code(parity):
  """Gradients, clipping, AdamW with its decay groups, and EMA."""
  folder = parity / "llamagen" / "gpt_c2i"
  io, want = np.load(folder / "io.npz"), np.load(folder / "train.npz")
  model = tj.import_backbone(
    "llamagen",
    str(folder / "checkpoint.pt"),
    **dict(vocab_size=96, grid=(4, 4), width=64, num_layers=3, num_heads=4),
    num_classes=10,
    **dict(token_dropout=0.0, residual_dropout=0.0, mlp_dropout=0.0),
  )
  cond = tj.ClassConditioning(10).encode(io["class_ids"])
  tokens = jnp.asarray(io["token_ids"], jnp.int32)[..., None]

  def loss(model, context, batch, rng):
    hidden = model(cond, model.embed(tokens[:, :-1]))
    ce, _ = losses.cross_entropy(model.logits(hidden, tokens), tokens)
    return ce.mean(), {}

  settings = optim.OptimConfig(learning_rate=1e-3, ema_decay=0.9999)
  tx = optim.make(settings, 4)
  skeleton, state = train.init_state(model, tx, 0, ema=True)
  step = train.make_train_step(skeleton, loss, tx, settings.ema_decay)
  for n in range(4):
    state, metrics = step(state, None, None)
    np.testing.assert_allclose(
      metrics["loss"], want["step_losses"][n], atol=1e-4
    )
    np.testing.assert_allclose(
      metrics["grad_norm"], want["step_grad_norms_preclip"][n], atol=5e-4
    )
  for name, path, layer, axes in (
    ("tok_embeddings.weight", "token_embed/embedding", None, ()),
    ("cls_embedding.embedding_table.weight", "class_embed/embedding", None, ()),
    (
      "layers.0.attention.wqkv.weight",
      "blocks/stacked/attention/qkv/kernel",
      0,
      (1, 0),
    ),
    ("layers.0.ffn_norm.weight", "blocks/stacked/mlp_norm/scale", 0, ()),
    (
      "layers.1.feed_forward.w2.weight",
      "blocks/stacked/mlp/down/kernel",
      1,
      (1, 0),
    ),
    ("norm.weight", "norm/scale", None, ()),
    ("output.weight", "head/kernel", None, (1, 0)),
  ):
    for kind, tree in (("after", state.params), ("ema", state.ema)):
      got = np.asarray(tree[path] if layer is None else tree[path][layer])
      got = got.transpose(axes) if axes else got
      error = np.abs(got - want[f"{kind}:{name}"])
      assert np.mean(error <= 1e-5) >= 0.999, (kind, name, error.max())
      assert error.max() <= 2e-3, (kind, name)


def test_groups_have_their_own_learning_rates_and_matrices_decay():
  model = tiny.wrapped(2)
  skeleton, params, _ = weights.split(model)
  config = optim.OptimConfig(
    learning_rate=1.0,
    backbone_learning_rate=0.1,
    schedule="linear",
    backbone_schedule="constant",
    weight_decay=0.5,
    clip_norm=0.0,
  )
  tx = optim.make(config, 10)
  state = tx.init(params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, state = tx.update(zeros, state, params)
  for path, update in updates.items():
    rate = 0.1 if path.startswith("backbone/") else 1.0
    decays = not path.endswith(("scale", "gain", "pad"))
    want = -rate * 0.5 * params[path] * decays
    np.testing.assert_allclose(update, want, rtol=1e-5, atol=1e-7)
  for _ in range(9):
    updates, state = tx.update(zeros, state, params)
  assert optax.tree.norm(
    {p: u for p, u in updates.items() if p.startswith("encoder/")}
  ) < 0.11 * 0.5 * optax.tree.norm(
    {p: u for p, u in params.items() if p.startswith("encoder/")}
  )


def stage(num_steps=6, **sections):
  """A stage on the digits that trains in seconds."""
  fields = dict(width=16, num_layers=2, num_heads=2, num_classes=10)
  base = {
    "seed": 0,
    "objective": "tensorar",
    "init": None,
    "source": None,
    "data": dict(name="digits", train_split="train", test_split="test"),
    "tokenizer": dict(name="pixels", image_size=(8, 8), levels=17),
    "conditioning": dict(name="class", num_classes=10),
    "backbone": dict(
      name="llamagen", vocab_size=17, grid=(8, 8), mlp_multiple=8, **fields
    ),
    "tensorar": dict(window=3),
    "noise": dict(kind="categorical"),
    "loss": dict(weights="rdm"),
    "optim": dict(learning_rate=3e-3, ema_decay=0.9),
    "train": dict(
      batch_size=8, num_steps=num_steps, log_every=2, checkpoint_every=2
    ),
  }
  base = json.loads(json.dumps(base))
  for name, value in sections.items():
    base[name] = {**base[name], **value} if isinstance(value, dict) else value
  return base


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("train") / "stage"
  train.fit(stage(), folder)
  return folder


def test_a_run_resumed_from_a_checkpoint_equals_a_straight_one(
  trained, tmp_path
):
  """Parameters, EMA, optimiser, key and data position all come back."""
  folder = tmp_path / "stage"
  shutil.copytree(trained, folder)
  shutil.rmtree(folder / "checkpoints" / "6")
  train.fit(stage(), folder)
  assert (folder / "log.jsonl").read_text() == (
    trained / "log.jsonl"
  ).read_text()
  a = orbax_io.read_weights(orbax_io.find(folder))
  b = orbax_io.read_weights(orbax_io.find(trained))
  chex.assert_trees_all_equal(a, b)
  assert set(a) == {"params", "ema"}


def test_load_gives_the_trained_model_and_its_average(trained):
  model, average = tj.load(trained), tj.load(trained, ema=True)
  assert model.window == 3
  a, b = (weights.split(m)[1] for m in (model, average))
  path = "backbone/head/kernel"
  assert (np.asarray(a[path]) != np.asarray(b[path])).any()


def test_training_lowers_the_loss(tmp_path):
  longer = stage(
    60, train=dict(batch_size=32, log_every=10, checkpoint_every=60)
  )
  train.fit(longer, tmp_path / "stage")
  rows = (tmp_path / "stage" / "log.jsonl").read_text().splitlines()
  rows = [json.loads(row) for row in rows]
  assert rows[-1]["ce/0"] < 0.8 * rows[0]["ce/0"]
  assert rows[-1]["ce/2"] < 0.9 * rows[0]["ce/2"]


def test_a_damaged_checkpoint_is_named(trained, tmp_path):
  folder = tmp_path / "stage"
  shutil.copytree(trained, folder)
  shutil.rmtree(folder / "checkpoints" / "6")
  newest = folder / "checkpoints" / "4"
  for file in (newest / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"junk")
  with pytest.raises(ValueError, match="cannot be read.*damaged"):
    train.fit(stage(), folder)
  with pytest.raises(ValueError, match="cannot be read"):
    tj.load(folder)


def test_a_missing_checkpoint_is_named(tmp_path):
  with pytest.raises(ValueError, match="no such checkpoint"):
    tj.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="found no checkpoint"):
    tj.load(tmp_path)
  with pytest.raises(ValueError, match="train that stage first"):
    train.fit(stage(init="nowhere"), tmp_path / "stage")


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(tmp_path):
  bad = stage(8, optim=dict(learning_rate=1e30, clip_norm=0.0))
  with pytest.raises(
    ValueError, match="loss of step .* expected finite numbers"
  ):
    train.fit(bad, tmp_path / "stage")
  saved = {p.name for p in (tmp_path / "stage" / "checkpoints").iterdir()}
  assert not saved & {"4", "6", "8"}


def test_another_config_in_the_folder_is_refused(trained):
  other = stage(noise=dict(kind="gaussian"))
  with pytest.raises(ValueError, match="noise.kind: was 'categorical'"):
    train.fit(other, trained)
  # What is written how often may change.
  train.fit(stage(train=dict(log_every=1)), trained)


def test_weights_of_another_model_are_refused(trained, tmp_path):
  wider = stage(init=str(trained), backbone=dict(width=32))
  with pytest.raises(ValueError, match="does not fit"):
    train.fit(wider, tmp_path / "a")
  base = stage(init=str(trained), tensorar=dict(window=1))
  with pytest.raises(ValueError, match="encoder/gain|is not in this model"):
    train.fit(base, tmp_path / "b")


@pytest.mark.parametrize(
  "section, value, words",
  [
    ("train", dict(checkpoint_every=3), "checkpoint_every=3"),
    ("train", dict(nmu_steps=3), "Did you mean 'num_steps'"),
    ("optim", dict(schedule="steep"), "steep"),
    ("optim", dict(learning_rate="high"), "learning_rate='high'"),
    ("backbone", dict(name="lamagen"), "Did you mean 'llamagen'"),
    ("backbone", dict(variant="XS"), "XXL"),
    ("backbone", dict(num_heads=3), "num_heads=3"),
    ("tokenizer", dict(name="vqq"), "Did you mean 'vq'"),
    ("conditioning", dict(name="sound"), "class"),
    ("loss", dict(condition_dropout=2.0), "condition_dropout=2.0"),
    ("noise", dict(schedule=[0.0, 0.5]), "3 slots"),
    ("tensorar", dict(windows=3), "Did you mean 'window'"),
  ],
)
def test_bad_settings_say_what_was_expected(section, value, words):
  with pytest.raises(ValueError, match=words):
    train.check(stage(**{section: value}))


def test_stages_overlay_the_shared_sections():
  from configs import digits

  stages = build.stages(digits.get_config())
  assert stages["tensorar"]["init"] == "base"
  assert stages["drafts"]["noise"]["kind"] == "drafts"
  assert stages["drafts"]["noise"]["schedule"] == "exponential"
  assert stages["base"]["tensorar"]["window"] == 1
  for one in stages.values():
    train.check(one)
