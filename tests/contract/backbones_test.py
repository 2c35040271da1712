"""What every backbone must do, whatever its family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tensorar_jax import interfaces, layers, sampling, windows
from tensorar_jax.build import family
from tensorar_jax.checkpoints import torch_import
from tensorar_jax.tensorar import TensorAR
from tests import tiny
from tests.contract import families

pytestmark = pytest.mark.parametrize("name", families.BACKBONES)


def inputs(model, seed=0):
  return families.tokens(model.vocab_sizes, length=model.num_tokens, seed=seed)


def test_a_file_exports_what_a_family_exports(name):
  module = family("backbones", name)
  for attribute in ("Config", "VARIANTS", "Model", "import_rules", "SOURCES"):
    assert hasattr(module, attribute), attribute
  assert set(module.SOURCES.values()) <= set(module.VARIANTS)
  assert isinstance(families.backbone(name), interfaces.Backbone)


@pytest.mark.parametrize("unrolled", [False, True])
def test_cache_equals_forward(name, unrolled):
  model, cond = families.backbone(name), tiny.cond()
  x = model.embed(inputs(model)[:, :-1])
  want = model(cond, x)
  model = layers.unroll(model) if unrolled else model
  decode = jax.jit(lambda model, x, cache: model.decode(x, cache))
  hidden, cache = model.prefill(cond)
  rows = [hidden]
  for t in range(x.shape[1]):
    hidden, cache = decode(model, x[:, t], cache)
    rows.append(hidden)
  np.testing.assert_allclose(jnp.stack(rows, axis=1), want, atol=5e-5)


def test_a_hidden_state_sees_only_what_came_before(name):
  model, cond = families.backbone(name), tiny.cond()
  x = model.embed(inputs(model)[:, :-1])
  before = model(cond, x)
  # Not by a constant, which a LayerNorm would take out again.
  step = jax.random.normal(jax.random.key(0), (model.width,))
  for t in range(x.shape[1]):
    moved = np.abs(model(cond, x.at[:, t].add(step)) - before).max(axis=(0, 2))
    np.testing.assert_array_equal(moved[: t + 1], 0)
    assert moved[t + 1] > 1e-4


def test_sub_token_logits_read_only_the_sub_tokens_before(name):
  model = families.backbone(name)
  hidden = jax.random.normal(jax.random.key(0), (2, 9, model.width))
  tokens, other = inputs(model, 0), inputs(model, 1)
  before = model.logits(hidden, tokens)
  assert [logits.shape[-1] for logits in before] == list(model.vocab_sizes)
  for f in range(len(model.vocab_sizes)):
    mixed = jnp.concatenate([tokens[..., :f], other[..., f:]], axis=-1)
    np.testing.assert_array_equal(model.logits(hidden, mixed)[f], before[f])


def test_the_null_condition_forgets_the_condition(name):
  model = families.backbone(name)
  x = model.embed(inputs(model)[:, :-1])
  a, b = tiny.CLASSES.encode([0, 1]), tiny.CLASSES.encode([2, 3])
  assert np.abs(model(a, x) - model(b, x)).max() > 1e-3
  null = tiny.CLASSES.null
  np.testing.assert_array_equal(model(null(a), x), model(null(b), x))


def test_dropout_is_on_with_a_key_only(name):
  model, cond = families.backbone(name, dropout=True), tiny.cond()
  x = model.embed(inputs(model)[:, :-1])
  plain = families.backbone(name)(cond, x)
  np.testing.assert_array_equal(model(cond, x), plain)
  one = model(cond, x, rng=jax.random.key(0))
  assert np.abs(one - plain).max() > 1e-3
  assert np.abs(one - model(cond, x, rng=jax.random.key(1))).max() > 1e-3
  np.testing.assert_array_equal(one, model(cond, x, rng=jax.random.key(0)))


def test_bfloat16_stays_bfloat16_and_near_float32(name):
  """Hidden states in the compute dtype, logits in float32."""
  model = TensorAR(
    families.backbone(name, dtype="bfloat16"), window=3, rngs=nnx.Rngs(0)
  )
  tokens, cond = inputs(model.backbone), tiny.cond()
  windows_, valid = windows.unfold(tokens, 3)
  hidden = model(cond, windows_[:, :-1], valid[:-1])
  assert hidden.dtype == jnp.bfloat16
  (logits, *_) = model.logits(hidden[:, :, 0], tokens)
  assert logits.dtype == jnp.float32
  base = families.backbone(name)
  want = base.logits(base(cond, base.embed(tokens[:, :-1])), tokens)[0]
  assert np.abs(logits - want).mean() < 0.05 * np.abs(want).mean() + 0.05
  out = sampling.generate(model, cond, None, jax.random.key(0))
  assert out.tokens.shape == tokens.shape


def test_it_wraps_and_samples(name):
  base = families.backbone(name)
  model = TensorAR(base, window=3, rngs=nnx.Rngs(0))
  cond = tiny.cond()
  config = sampling.SamplingConfig(guidance=2.0)
  args = (cond, tiny.CLASSES.null(cond), jax.random.key(0), config)
  out = sampling.generate(model, *args)
  want = sampling.generate(TensorAR(base), *args)
  np.testing.assert_array_equal(out.tokens, want.tokens)
  assert out.drafts.shape[2] == 3


def test_import_rules_cover_every_published_manifest(name, parity):
  module = family("backbones", name)
  for file, variant in module.SOURCES.items():
    shapes = families.manifest(parity, name, file)
    config = module.VARIANTS[variant]
    model = nnx.eval_shape(
      lambda config=config: module.Model(config, rngs=nnx.Rngs(0))
    )
    rules = module.import_rules(config)
    planned = torch_import.plan(model, rules, shapes).values()
    needed = next(parts[0][0] for parts in planned if len(parts) == 1)
    # Strict: one name too few, too many, or of another shape is an error.
    missing = {key: shape for key, shape in shapes.items() if key != needed}
    with pytest.raises(ValueError, match="nothing fills"):
      torch_import.plan(model, rules, missing)
    with pytest.raises(ValueError, match="no rule claims odd"):
      torch_import.plan(model, rules, {**shapes, "odd": (1,)})
