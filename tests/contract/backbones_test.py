"""What every backbone must do, whatever its family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tensorar_jax import interfaces
from tensorar_jax.checkpoints import torch_import
from tensorar_jax.conditioning import conditions
from tensorar_jax.method import sampling, windows
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.nn import layers
from tensorar_jax.parallel import weights
from tests import programs
from tests.contract import families

pytestmark = pytest.mark.parametrize("name", families.BACKBONES)


def inputs(model, seed=0):
  return families.tokens(model.vocab_sizes, length=model.num_tokens, seed=seed)


def test_a_file_exports_what_a_family_exports(name):
  module = families.module_of(name)
  for attribute in ("Config", "VARIANTS", "Model", "import_rules", "SOURCES"):
    assert hasattr(module, attribute), attribute
  assert set(module.SOURCES.values()) <= set(module.VARIANTS)
  assert isinstance(families.backbone(name), interfaces.Backbone)


@pytest.mark.parametrize("unrolled", [False, True])
def test_cache_equals_forward(name, unrolled):
  model, cond = families.backbone(name), families.cond(name)
  x = programs.embed(model, inputs(model)[:, :-1])
  want = programs.forward(model, cond, x)
  model = layers.for_decoding(model, "cpu") if unrolled else model
  got = programs.cached(model, cond, x)
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_a_hidden_state_sees_only_what_came_before(name):
  model, cond = families.backbone(name), families.cond(name)
  x = programs.embed(model, inputs(model)[:, :-1])
  before = programs.forward(model, cond, x)
  # Not by a constant, which a LayerNorm would take out again.
  step = jax.random.normal(jax.random.key(0), (model.width,))
  for t in range(x.shape[1]):
    after = programs.forward(model, cond, x.at[:, t].add(step))
    moved = np.abs(after - before).max(axis=(0, 2))
    np.testing.assert_array_equal(moved[: t + 1], 0)
    assert moved[t + 1] > 1e-4


def test_sub_token_logits_read_only_the_sub_tokens_before(name):
  model = families.backbone(name)
  hidden = jax.random.normal(jax.random.key(0), (2, 9, model.width))
  tokens, other = inputs(model, 0), inputs(model, 1)
  before = programs.logits(model, hidden, tokens)
  assert [logits.shape[-1] for logits in before] == list(model.vocab_sizes)
  for f in range(len(model.vocab_sizes)):
    mixed = jnp.concatenate([tokens[..., :f], other[..., f:]], axis=-1)
    after = programs.logits(model, hidden, mixed)
    np.testing.assert_array_equal(after[f], before[f])


def test_the_null_condition_forgets_the_condition(name):
  model = families.backbone(name)
  x = programs.embed(model, inputs(model)[:, :-1])
  a, b = families.cond(name, [0, 1]), families.cond(name, [2, 3])
  call, null = programs.forward, conditions.null
  assert np.abs(call(model, a, x) - call(model, b, x)).max() > 1e-3
  np.testing.assert_array_equal(
    call(model, null(a), x), call(model, null(b), x)
  )


def test_dropout_is_on_with_a_key_only(name):
  model, cond = families.backbone(name, dropout=True), families.cond(name)
  x = programs.embed(model, inputs(model)[:, :-1])
  plain = programs.forward(families.backbone(name), cond, x)
  np.testing.assert_array_equal(programs.forward(model, cond, x), plain)
  draw = lambda seed: programs.forward(model, cond, x, rng=jax.random.key(seed))
  assert np.abs(draw(0) - plain).max() > 1e-3
  assert np.abs(draw(0) - draw(1)).max() > 1e-3
  np.testing.assert_array_equal(draw(0), draw(0))


def test_bfloat16_stays_bfloat16_and_near_float32(name):
  """Hidden states in the compute dtype, logits in float32."""
  half = families.backbone(name, dtype="bfloat16")
  model = TensorAR(half, window=3, rngs=nnx.Rngs(0))
  tokens, cond = inputs(model.backbone), families.cond(name)
  windows_, valid = windows.unfold(tokens, 3)
  hidden = programs.forward(model, cond, windows_[:, :-1], valid[:-1])
  assert hidden.dtype == jnp.bfloat16
  (logits, *_) = programs.logits(model, hidden[:, :, 0], tokens)
  assert logits.dtype == jnp.float32
  base = families.backbone(name)
  hidden = programs.forward(base, cond, programs.embed(base, tokens[:, :-1]))
  want = programs.logits(base, hidden, tokens)[0]
  assert np.abs(logits - want).mean() < 0.05 * np.abs(want).mean() + 0.05
  out = sampling.generate(model, cond, None, jax.random.key(0))
  assert out.tokens.shape == tokens.shape


def test_it_wraps_and_samples(name):
  base = families.backbone(name)
  model = TensorAR(base, window=3, rngs=nnx.Rngs(0))
  cond = families.cond(name)
  config = sampling.SamplingConfig(guidance=2.0)
  args = (cond, conditions.null(cond), jax.random.key(0), config)
  out = sampling.generate(model, *args)
  want = sampling.generate(TensorAR(base), *args)
  np.testing.assert_array_equal(out.tokens, want.tokens)
  assert out.drafts.shape[2] == 3


def test_import_rules_cover_every_published_manifest(name, parity):
  module, variants = families.module_of(name), families.published(name)
  files = {f: v for f, v in module.SOURCES.items() if v in variants}
  assert files
  for file, variant in files.items():
    shapes = families.manifest(parity, name, file)
    config = variants[variant]
    model = weights.abstract(
      lambda rngs, config=config: module.Model(config, rngs=rngs)
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
