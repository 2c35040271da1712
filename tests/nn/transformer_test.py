"""What families may rely on: prefixes of unequal length, any number of rows.

The families' own tests and the contract tests hold the rest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensorar_jax.nn import attention, layers, transformer
from tensorar_jax.parallel import weights
from tests import programs, tiny

CONFIG = transformer.RotaryConfig(
  width=16, num_layers=3, num_heads=2, grid=(3, 3), mlp_multiple=8
)


class Prompted(transformer.CausalTransformer):
  """Its prefix is "text" [B, P, D] as it is."""

  def __init__(self, config, *, rngs):
    super().__init__(config)
    self.blocks = layers.Layers(
      lambda rngs: layers.Block(config.block, rngs=rngs),
      config.num_layers,
      rngs,
    )

  def embed_condition(self, cond):
    return cond["text"]

  def position_inputs(self, cond, x, rows):
    assert set(cond) <= {"text", "is_padding"}
    # The table has as many zero rows as the longest prefix here.
    return x, self.config.rotation(rows, prefix=5)


@pytest.fixture(scope="module")
def model():
  return tiny.redraw(weights.abstract(lambda r: Prompted(CONFIG, rngs=r)))


def draw(seed, *shape):
  return jax.random.normal(jax.random.key(seed), (*shape, CONFIG.width))


def prompts(*pads):
  """A batch of 5 rows each, the first `pads` of them padding."""
  is_padding = jnp.arange(5) < jnp.asarray(pads)[:, None]
  return {"text": draw(0, len(pads), 5), "is_padding": is_padding}


def test_the_mask_is_causal_and_hides_padding_from_all_but_itself():
  padding = jnp.asarray([[True, False], [False, False]])
  rows = ["1000", "0100", "0110", "0111"], ["1000", "1100", "1110", "1111"]
  want = np.asarray([[list(map(int, r)) for r in b] for b in rows], bool)
  got = attention.causal_mask(jnp.arange(4), 4, padding).visible
  np.testing.assert_array_equal(got, want)
  got = attention.causal_mask(jnp.arange(2, 4), 4, padding).visible
  np.testing.assert_array_equal(got, want[:, 2:])
  got = attention.causal_mask(jnp.arange(1, 3), 4, None).visible
  np.testing.assert_array_equal(got, want[1, 1:3])


def test_what_stands_in_the_padding_does_not_matter(model):
  cond, x = prompts(2, 0), draw(1, 2, 8)
  before = programs.forward(model, cond, x)
  noise = 9 * draw(2, 2, 5) * cond["is_padding"][..., None]
  other = {**cond, "text": cond["text"] + noise}
  np.testing.assert_array_equal(programs.forward(model, other, x), before)
  del cond["is_padding"]
  whole = programs.forward(model, cond, x)
  np.testing.assert_allclose(whole[1], before[1], atol=1e-6)
  assert np.abs(whole[0] - before[0]).max() > 1e-3


@pytest.mark.parametrize("unrolled", [False, True])
def test_cache_equals_forward_after_padding(model, unrolled):
  cond, x = prompts(2, 0, 4), draw(1, 3, 8)
  want = programs.forward(model, cond, x)
  assert want.shape == (3, 9, CONFIG.width)
  model = layers.for_decoding(model, "cpu") if unrolled else model
  np.testing.assert_allclose(programs.cached(model, cond, x), want, atol=5e-5)


def test_any_number_of_rows_and_every_state(model):
  cond, x = prompts(1, 3), draw(1, 2, 8)
  want = programs.forward(model, cond, x)
  for count in (0, 1, 5):
    got = programs.forward(model, cond, x[:, :count])
    np.testing.assert_allclose(got, want[:, : count + 1], atol=2e-5)
  states, hidden = programs.states(model, cond, x)
  assert states.shape == (CONFIG.num_layers, 2, 13, CONFIG.width)
  np.testing.assert_array_equal(hidden[:, 4:], want)
