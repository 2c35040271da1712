"""Parity with the published RAR code, on a tiny random checkpoint."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tensorar_jax as tj
from tensorar_jax.backbones import rar
from tensorar_jax.checkpoints import torch_export, torch_import
from tensorar_jax.conditioning import conditions
from tensorar_jax.method import losses
from tensorar_jax.parallel import weights
from tests import programs, tiny
from tests.backbones import rar_case
from tests.contract import families


class Case:
  """The fixture: arrays, settings, and our model with its weights."""

  def __init__(self, folder):
    self.io = np.load(folder / "io.npz")
    self.meta = rar_case.settings(folder / "rar_b.bin")
    self.model = rar_case.load(folder / "rar_b.bin")
    self.rules = rar.import_rules(self.model.config)
    self.classes = tj.ClassConditioning(self.model.config.num_classes)
    self.raster = self.classes.encode(self.io["class_ids"])
    self.null = self.classes.null(self.raster)
    self.order = jnp.asarray(self.io["orders"], jnp.int32)
    self.perm = {**self.raster, "order": self.order}
    self.tokens = jnp.asarray(self.io["token_ids"], jnp.int32)[..., None]
    # What a caller does with tokens in another order.
    self.permuted = jnp.take_along_axis(
      self.tokens, self.order[..., None], axis=1
    )

  def logits(self, hidden):
    zeros = jnp.zeros((*hidden.shape[:-1], 1), jnp.int32)
    return programs.logits(self.model, hidden, zeros)[0]

  @functools.cached_property
  def states(self):
    x = self.model.embed(self.tokens)
    return programs.states(self.model, self.raster, x)

  def first_layer(self):
    """What enters it: the states of a model whose gates are all shut."""
    gates = "blocks/stacked/modulation/"
    _, params, _ = weights.split(self.model)
    shut = {gates + n: 0 * params[gates + n] for n in ("kernel", "bias")}
    model = weights.update(self.model, shut)
    x = model.embed(self.tokens)
    return programs.states(model, self.raster, x)[0][0]

  def forward(self, cond, tokens):
    x = self.model.embed(tokens)
    return self.logits(programs.forward(self.model, cond, x))

  def cached(self, cond, tokens):
    x = self.model.embed(tokens)
    return self.logits(programs.cached(self.model, cond, x))

  def first_call(self):
    none = self.model.embed(self.tokens[:, :0])
    return self.logits(programs.states(self.model, self.raster, none)[1])

  @functools.cached_property
  def training(self):
    """(loss, accuracy, gradients by published name) of the permuted tokens."""
    skeleton, params, _ = weights.split(self.model)

    def loss(params):
      model = skeleton.merge(params)
      hidden = model(self.perm, model.embed(self.permuted[:, :-1]))
      logits = model.logits(hidden, self.permuted)
      ce, correct = losses.cross_entropy(logits, self.permuted)
      return ce.mean(), correct.mean()

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, correct), grads = gradient(params)
    grads = torch_export.export_state_dict(skeleton.merge(grads), self.rules)
    return value, correct, grads

  def grad_norms(self):
    _, _, grads = self.training
    return [np.linalg.norm(grads[n]) for n in self.meta["grad_norms_order"]]

  @functools.cached_property
  def generations(self):
    """name -> (settings, guidance factors, samples)."""
    out = {}
    base = tj.TensorAR(self.model, window=1)
    for setting in self.meta["generations"]:
      scale = setting["guidance_scale"]
      config = tj.SamplingConfig(
        temperature=0.0,
        guidance=scale,
        unguided_scale=0.0,  # 0 stands for conditional sampling
        guidance_power=setting["guidance_scale_pow"],
        return_logits=True,
      )
      samples = tj.generate(
        base,
        self.raster,
        self.null if scale else None,
        jax.random.key(0),
        config,
      )
      factors = config.guidance_scales(self.model.num_tokens)
      out[setting["name"]] = setting, factors, samples
    return out

  def generated(self, name, part):
    setting, factors, samples = self.generations[name]
    logits = samples.logits[0][:, :, 0] / setting["randomize_temperature"]
    return {
      "ids": samples.tokens[..., 0],
      "logits": logits,
      "probs": jax.nn.softmax(logits, axis=-1),
      "cfg": factors[:, 0],
    }[part]


INPUTS = {"token_ids", "class_ids", "orders"}
LOGITS, GRADS = 5e-5, 5e-6
ARRAYS = {  # name -> (ours, largest difference allowed)
  "condition_ids": (lambda c: c.model.condition_ids(c.raster), 0),
  "null_condition_ids": (lambda c: c.model.condition_ids(c.null), 0),
  "labels_perm": (lambda c: c.permuted[..., 0], 0),
  "hidden_in_raster": (lambda c: c.first_layer(), 1e-5),
  "hidden_block0_raster": (lambda c: c.states[0][0], 1e-5),
  "hidden_block1_raster": (lambda c: c.states[0][1], 1e-5),
  "hidden_block2_raster": (lambda c: c.states[0][2], 1e-5),
  "head_in_raster": (lambda c: c.states[1][:, 1:], 1e-5),
  "logits_raster": (lambda c: c.forward(c.raster, c.tokens), LOGITS),
  "logits_null": (lambda c: c.forward(c.null, c.tokens), LOGITS),
  "logits_perm": (lambda c: c.forward(c.perm, c.permuted), LOGITS),
  "kv_first_call_logits": (lambda c: c.first_call(), LOGITS),
  "kv_logits_raster": (lambda c: c.cached(c.raster, c.tokens), LOGITS),
  "kv_logits_perm": (lambda c: c.cached(c.perm, c.permuted), LOGITS),
  "train_loss": (lambda c: c.training[0], 1e-5),
  "train_correct_tokens": (lambda c: c.training[1], 1e-6),
  "grad_norms": (lambda c: c.grad_norms(), GRADS),
  "grad_total_norm": (lambda c: np.linalg.norm(c.grad_norms()), GRADS),
}
for _name in (
  "cls_token",
  "pos_embed",
  "target_aware_pos_embed",
  "timesteps_embeddings",
  "embeddings.weight",
  "lm_head.weight",
  "blocks.0.attn.qkv.weight",
  "blocks.0.attn.q_norm.weight",
  "blocks.0.adaLN_modulation.1.weight",
  "adaln_before_head.adaLN_modulation.1.weight",
):
  ARRAYS[f"grad__{_name}"] = (lambda c, n=_name: c.training[2][n], GRADS)
for _name in ("noguide", "scale1", "cosine", "constant", "cosine_temp"):
  for _part, _atol in (("ids", 0), ("logits", 2e-4), ("probs", 2e-5)):
    ARRAYS[f"gen_{_name}_{_part}"] = (
      lambda c, n=_name, p=_part: c.generated(n, p),
      _atol,
    )
  if _name != "noguide":
    ARRAYS[f"gen_{_name}_cfg"] = (
      lambda c, n=_name: c.generated(n, "cfg"),
      1e-6,
    )


@pytest.fixture(scope="module")
def case(parity):
  return Case(parity / "rar" / "gpt")


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(case, name):
  ours, atol = ARRAYS[name]
  got, want = np.asarray(ours(case)), case.io[name]
  if name.startswith("grad__") and got.ndim == 3:  # the tables' first rows
    rest = got[:, want.shape[1] :]
    np.testing.assert_array_equal(rest, 0)
    got = got[:, : want.shape[1]]
  assert got.shape == want.shape
  rtol = 1e-6 if name.endswith("_cfg") else 0
  atol = 0 if name.endswith("_cfg") else atol
  np.testing.assert_allclose(got, want, atol=atol, rtol=rtol)


def test_no_array_is_left_out(case):
  assert set(case.io.files) == ARRAYS.keys() | INPUTS


def test_a_raster_order_is_no_order(case):
  order = jnp.broadcast_to(jnp.arange(16), case.order.shape)
  cond = {**case.raster, "order": order}
  got = case.forward(cond, case.tokens)
  np.testing.assert_array_equal(got, case.forward(case.raster, case.tokens))


def test_the_file_goes_out_as_it_came_in(case, parity):
  want = torch_import.load_state_dict(parity / "rar" / "gpt" / "rar_b.bin")
  got = torch_export.export_state_dict(case.model, case.rules)
  assert got.keys() == want.keys()
  for name, array in got.items():
    tensor = np.asarray(want[name])
    assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), name
    assert array.tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("file, variant", rar.SOURCES.items())
def test_published_sizes(file, variant, parity):
  folder = parity / "rar" / "real_checkpoint_manifest"
  totals = json.loads((folder / "totals.json").read_text())
  want = totals[file.removesuffix(".bin")]
  config = rar.VARIANTS[variant]
  model = weights.abstract(lambda rngs: rar.Model(config, rngs=rngs))
  assert families.count(model) == want["parameters"]
  assert len(families.manifest(parity, "rar", file)) == want["tensors"]


# --- initialisation, conditions, options -----------------------------------

TINY = dict(grid=(2, 3), vocab_size=97, width=48, num_heads=3, num_layers=2)


def test_initial_weights():
  model = rar.Model(rar.Config(**TINY, num_classes=89), rngs=nnx.Rngs(0))
  tensors = torch_export.export_state_dict(
    model, rar.import_rules(model.config)
  )
  for name, array in tensors.items():
    if "norm" in name and name.endswith("weight"):
      np.testing.assert_array_equal(array, 1, err_msg=name)
    elif name.endswith("bias") or "adaLN" in name or name == "cls_token":
      np.testing.assert_array_equal(array, 0, err_msg=name)
    else:
      assert abs(array.std() - 0.02) < 0.001, name
      assert abs(array.mean()) < 0.001, name
      assert 0.05 < np.abs(array).max() < 0.2, name  # cut far outside
  layers = (
    tensors["blocks.0.mlp.fc1.weight"],
    tensors["blocks.1.mlp.fc1.weight"],
  )
  assert np.abs(layers[0] - layers[1]).max() > 0.01


def test_a_fresh_model_hands_the_head_its_normalised_input():
  model = rar.Model(rar.Config(**TINY), rngs=nnx.Rngs(0))
  cond = conditions.ClassConditioning(1000).encode([3, 999])
  tokens = families.tokens(model.vocab_sizes, length=6)
  states, hidden = programs.states(model, cond, model.embed(tokens))
  np.testing.assert_array_equal(states[0], states[1])
  x = np.asarray(states[1], np.float64)
  x -= x.mean(-1, keepdims=True)
  want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(hidden, want, atol=2e-6)


def ordered():
  """A random model and conditions with an order for each image, one null."""
  config = rar.Config(**TINY, num_classes=5)
  model = tiny.redraw(weights.abstract(lambda r: rar.Model(config, rngs=r)))
  cond = conditions.ClassConditioning(5).encode([4, 0])
  cond["is_null"] = jnp.asarray([False, True])
  cond["order"] = jnp.asarray([[5, 0, 3, 1, 4, 2], [2, 1, 0, 5, 3, 4]])
  return model, cond


def test_cached_decoding_in_an_order_of_ones_own():
  model, cond = ordered()
  x = model.embed(families.tokens(model.vocab_sizes, length=6))
  want = programs.forward(model, cond, x)
  got = programs.cached(model, cond, x)
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_sampling_in_an_order_of_ones_own():
  """The order reaches every step of both halves of guidance."""
  model, cond = ordered()
  null = conditions.null(cond)
  config = tj.SamplingConfig(temperature=0.0, guidance=2.0, return_logits=True)
  base = tj.TensorAR(model, window=1)
  out = tj.generate(base, cond, null, jax.random.key(0), config)
  x = model.embed(out.tokens[:, :-1])
  given, free = (
    programs.logits(model, programs.forward(model, c, x), out.tokens)[0]
    for c in (cond, null)
  )
  want = free + 2 * (given - free)
  np.testing.assert_allclose(out.logits[0][:, :, 0], want, atol=5e-4)
  np.testing.assert_array_equal(out.tokens[..., 0], want.argmax(-1))


DROPOUTS = ("attention_dropout", "residual_dropout", "mlp_dropout")


@pytest.mark.parametrize("field", DROPOUTS)
def test_each_dropout_acts_and_keeps_the_mean(field):
  cond = conditions.ClassConditioning(5).encode([4] * 256)

  def hidden(rate):
    rates = {**dict.fromkeys(DROPOUTS, 0.0), field: rate}
    config = rar.Config(**{**TINY, "num_layers": 1, "num_classes": 5}, **rates)
    model = tiny.redraw(
      weights.abstract(lambda r: rar.Model(config, rngs=r)), scale=0.1
    )
    x = model.embed(families.tokens(model.vocab_sizes, batch=1, length=3))
    x = jnp.broadcast_to(x, (256, *x.shape[1:]))
    return programs.forward(model, cond, x, rng=jax.random.key(0))

  change = np.asarray(hidden(0.1) - hidden(0.0))
  assert change.std(0).min() > 1e-5
  assert np.abs(change.mean(0)).max() < 0.3 * change.std(0).max()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(width=50, num_heads=4), "width=50 is no multiple of num_heads=4"),
    (dict(num_layers=0), "num_layers=0: expected at least 1"),
    (dict(mlp_width=0), "mlp_width=0: expected at least 1"),
    (dict(grid=(16, 0)), r"grid=\(16, 0\): expected at least 1"),
    (dict(mlp_dropout=1.0), "mlp_dropout=1.0: expected 0 to < 1"),
  ],
)
def test_bad_configs(fields, message):
  with pytest.raises(ValueError, match=message):
    rar.Config(**fields)


def test_bad_conditions():
  config = rar.Config(grid=(2, 2), num_classes=5)
  model = weights.abstract(lambda rngs: rar.Model(config, rngs=rngs))
  cond = conditions.ClassConditioning(9).encode([0, 5])
  with pytest.raises(ValueError, match="class ids 0 to 5: this .* 5 classes"):
    model.check(cond)
  cond["label"] = jnp.asarray([0, 4])
  model.check({**cond, "order": jnp.asarray([[0, 1, 2, 3], [3, 1, 0, 2]])})
  for order in ([[0, 1, 2, 3]], [[0, 1, 2, 3], [0, 1, 2, 2]], [[1, 0], [0, 1]]):
    with pytest.raises(ValueError, match="expected a permutation of 0 to 3"):
      model.check({**cond, "order": jnp.asarray(order)})
