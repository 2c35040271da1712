"""Open-MAGVIT2 where the tiny checkpoint shows nothing: other sizes, cost."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tensorar_jax as tj
from tensorar_jax.backbones import open_magvit2
from tensorar_jax.nn import attention, layers
from tensorar_jax.parallel import weights
from tests import programs, tiny
from tests.contract import families


def model_with(**fields):
  config = open_magvit2.Config(
    **dict(
      vocab_sizes=(5, 11),
      grid=(3, 3),
      width=24,
      num_layers=2,
      num_inner_layers=2,
      num_heads=6,
      num_classes=5,
      mlp_multiple=8,
    )
    | fields
  )
  make = lambda rngs: open_magvit2.Model(config, rngs=rngs)
  return tiny.redraw(weights.abstract(make))


@pytest.mark.parametrize("fields", [{}, {"num_kv_heads": 2, "mlp_scale": 1.3}])
def test_the_inner_steps_are_a_plain_causal_transformer(fields):
  """Against blocks over two rows with rows 0 and 1 of the rotary table."""
  model = model_with(**fields)
  hidden = jax.random.normal(jax.random.key(0), (2, 3, 24))
  tokens = families.tokens(model.vocab_sizes, length=3)
  pairs = [hidden, model.token_embeds[0](tokens[..., 0])]
  x = jnp.stack(pairs, axis=2).reshape(-1, 2, 24)
  rotate = model.config.rotation(jnp.arange(2)[None], prefix=1)
  mask = attention.causal_mask(jnp.arange(2), 2, None)

  @jax.jit
  def plain(block, x):
    return layers.Block.__call__(block, x, rotate, mask)[0]

  for block in model.inner_blocks.each():
    x = plain(block, x)
  x = model.norm(x.reshape(2, 3, 2, 24))
  got = programs.logits(model, hidden, tokens)
  for f, head in enumerate(model.heads):
    np.testing.assert_allclose(got[f], head(x[:, :, f]), atol=2e-5)
  alone = programs.logits(model, hidden[0, 0], tokens[0, 0])
  np.testing.assert_allclose(alone[1], got[1][0, 0], atol=2e-5)


def test_fewer_key_heads_decode_what_they_were_taught():
  model, cond = model_with(num_kv_heads=2), tiny.cond()
  x = model.embed(families.tokens(model.vocab_sizes)[:, :-1])
  got, want = programs.cached(model, cond, x), programs.forward(model, cond, x)
  np.testing.assert_allclose(got, want, atol=5e-5)


@pytest.mark.parametrize("unrolled", [False, True])
def test_the_first_sub_token_costs_one_step(unrolled, optimised):
  """And a call for each sub-token costs no more than one for both."""
  model = model_with(width=48, mlp_multiple=64)
  model = layers.for_decoding(model, "cpu") if unrolled else model
  hidden, tokens = jnp.ones((7, 48)), jnp.zeros((7, 2), jnp.int32)

  def flops(run):
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state: run(nnx.merge(graphdef, state)))
    return call.lower(state).compile().cost_analysis()["flops"]

  def draw(model):
    first = jnp.argmax(model.logits(hidden, tokens)[0], axis=-1)
    drawn = tokens.at[:, 0].set(first.astype(jnp.int32))
    return first, model.logits(hidden, drawn)[1]

  both = flops(lambda model: model.logits(hidden, tokens))
  assert flops(lambda model: model.logits(hidden, tokens)[0]) < 0.5 * both
  assert flops(draw) < 1.02 * both


def test_dropout_in_the_head_is_on_with_a_key_only():
  model = model_with(residual_dropout=0.3, mlp_dropout=0.3)
  plain = model_with(residual_dropout=0.0, mlp_dropout=0.0)
  hidden = jax.random.normal(jax.random.key(0), (2, 9, 24))
  tokens = families.tokens(model.vocab_sizes)
  for a, b in zip(
    model.logits(hidden, tokens), plain.logits(hidden, tokens), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  one = model.logits(hidden, tokens, rng=jax.random.key(0))
  same = model.logits(hidden, 0 * tokens, rng=jax.random.key(0))
  other = model.logits(hidden, tokens, rng=jax.random.key(1))
  np.testing.assert_array_equal(one[0], same[0])
  for f in range(2):
    assert np.abs(one[f] - other[f]).max() > 1e-2
    assert np.abs(one[f] - plain.logits(hidden, tokens)[f]).max() > 1e-2


def test_a_fresh_model_starts_as_upstreams():
  config = open_magvit2.Config(
    vocab_sizes=(64, 128), width=128, num_layers=2, num_heads=4
  )
  model = open_magvit2.Model(config, rngs=nnx.Rngs(0))
  _, params, _ = weights.split(model)
  for path, value in params.items():
    if path.startswith("heads/"):
      assert not value.any(), path
    elif path.endswith("/scale"):
      assert (value == 1).all(), path
    else:
      assert abs(value.std() / 0.02 - 1) < 0.05, path
      assert abs(value.mean()) < 1e-3, path
  blocks = params["inner_blocks/stacked/mlp/up/kernel"]
  assert np.abs(blocks[0] - blocks[1]).max() > 0.01


@pytest.mark.parametrize("file, variant", open_magvit2.SOURCES.items())
def test_parameter_counts_are_the_published_ones(parity, file, variant):
  folder = parity / "open_magvit2" / "real_checkpoint_manifest"
  manifest = json.loads((folder / file.replace(".ckpt", ".json")).read_text())
  config = open_magvit2.VARIANTS[variant]
  model = weights.abstract(lambda rngs: open_magvit2.Model(config, rngs=rngs))
  counts = manifest["element_counts_by_top_level_prefix"]
  assert families.count(model) == counts["transformer"]


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(num_heads=7), "num_heads=7"),
    (dict(width=12), "width=12"),
    (dict(num_kv_heads=4), "num_kv_heads=4"),
    (dict(grid=(3, 4)), r"grid=\(3, 4\)"),
    (dict(vocab_sizes=(55,)), r"vocab_sizes=\(55,\)"),
  ],
)
def test_bad_configs_are_refused_by_value(fields, message):
  with pytest.raises(ValueError, match=message):
    model_with(**fields)


def test_conditions_that_it_does_not_know_are_refused():
  model = model_with()
  model.check(tiny.cond())
  with pytest.raises(ValueError, match="class ids 0 to 5"):
    model.check(tj.ClassConditioning(6).encode([0, 5]))
  order = jnp.zeros((2, 9), jnp.int32)
  with pytest.raises(ValueError, match="raster"):
    model.check({**tiny.cond(), "order": order})
