"""What TensorAR does around every backbone, whatever its family."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tensorar_jax.conditioning import conditions
from tensorar_jax.generation import batches
from tensorar_jax.method import noising, objective, sampling, windows
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import weights
from tensorar_jax.training import train_step
from tests import programs, tiny
from tests.contract import families

pytestmark = pytest.mark.parametrize("name", families.BACKBONES)

P2, P1 = dict(depth=1, mlp_ratio=0.25), dict(depth=2, mlp_ratio=4.0)
# Parameters in millions as the papers print them: base, P2, P1.
PRINTED = {
  ("llamagen", "B"): (111, 116, 139),
  ("llamagen", "L"): (343, 352, 393),
  ("llamagen", "XL"): (775, 789, 853),
  ("llamagen", "XXL"): (1411, 1432, None),
  ("open_magvit2", "B"): (343, 352, 393),
  ("open_magvit2", "L"): (804, 820, None),
  ("rar", "B"): (261, None, 289),
  ("rar", "L"): (461, None, 511),
}


def base_and_tokens(name):
  base = families.backbone(name)
  return base, families.tokens(base.vocab_sizes, length=base.num_tokens)


def test_window_one_is_the_base_bit_for_bit(name):
  base, tokens = base_and_tokens(name)
  cond = families.cond(name)

  @jax.jit
  def both(model):
    inputs, valid = windows.unfold(tokens, 1)
    hidden = model(cond, inputs[:, :-1], valid[:-1])[:, :, 0]
    base = model.backbone
    own = base(cond, base.embed(tokens[:, :-1]))
    return model.logits(hidden, tokens), base.logits(own, tokens)

  ours, want = both(TensorAR(base, window=1))
  for f in range(len(base.vocab_sizes)):
    np.testing.assert_array_equal(ours[f], want[f])


def test_freshly_wrapped_it_is_the_base_at_slot_zero(name):
  base, tokens = base_and_tokens(name)
  cond = families.cond(name)
  model = TensorAR(base, window=3, rngs=nnx.Rngs(0), **P1)
  inputs, valid = windows.unfold(tokens, 3)
  rates = jnp.asarray([0.0, 1.0, 1.0])
  noised = noising.categorical(
    jax.random.key(0), inputs, rates, base.vocab_sizes
  )
  hidden = programs.forward(model, cond, noised[:, :-1], valid[:-1])[:, :, 0]
  got = programs.logits(model, hidden, tokens)
  x = programs.embed(base, tokens[:, :-1])
  own = programs.forward(base, cond, x)
  for f, want in enumerate(programs.logits(base, own, tokens)):
    np.testing.assert_allclose(got[f], want, atol=2e-5)


def test_a_prediction_sees_only_the_windows_before_it(name):
  base, tokens = base_and_tokens(name)
  make = lambda rngs: TensorAR(base, window=3, rngs=rngs)
  model = tiny.redraw(weights.abstract(make), 1)
  inputs, valid = windows.unfold(tokens, 3)
  inputs, valid, cond = inputs[:, :-1], valid[:-1], families.cond(name)
  predict = jax.jit(lambda m, inputs: m(cond, inputs, valid))
  before = predict(model, inputs)
  for t in (0, 3, inputs.shape[1] - 1):
    for f, size in enumerate(base.vocab_sizes):
      other = (inputs[:, t, :, f] + 1) % size
      other = inputs.at[:, t, :, f].set(other)
      moved = np.abs(predict(model, other) - before).max(axis=(0, 2, 3))
      np.testing.assert_array_equal(moved[: t + 1], 0)
      assert moved[t + 1] > 1e-4


def test_training_lowers_the_loss_of_every_slot(name):
  base, _ = base_and_tokens(name)
  model = TensorAR(base, window=3, rngs=nnx.Rngs(0))
  # Eight images to learn by heart.
  tokens = families.tokens(base.vocab_sizes, batch=8, length=base.num_tokens)
  cond = families.cond(name, range(8))

  def loss(model, context, batch, rng, step):
    noise, config = noising.NoiseConfig(), objective.LossConfig()
    return objective.tensorar_loss(model, cond, tokens, rng, noise, config)

  tx = optax.adam(1e-2)
  skeleton, state = train_step.init_state(model, tx, 0, ema=False)
  step = train_step.make_train_step(skeleton, loss, tx, 0.0)
  rows = []
  for _ in range(40):
    state, scalars = step(state, None, None)
    rows.append(scalars)
  for j in range(3):
    first, last = rows[0][f"ce/{j}"], rows[-1][f"ce/{j}"]
    assert last < 0.8 * first, (j, first, last)


def test_sampled_tokens_become_images(name):
  base, _ = base_and_tokens(name)
  tokenizer = families.tokenizer(families.TOKENIZER_OF[name])
  assert tokenizer.vocab_sizes == base.vocab_sizes
  model = TensorAR(base, window=3, rngs=nnx.Rngs(0))
  config = sampling.SamplingConfig(guidance=2.0, guidance_power=1.0, top_k=3)
  cond = families.cond(name)
  out = sampling.generate(
    model, cond, conditions.null(cond), jax.random.key(0), config
  )
  images = batches.decode(tokenizer, out.tokens)
  assert images.shape == (2, *tokenizer.config.image_size, 3)
  assert (images[0] != images[1]).any()


def test_parameter_counts_are_the_papers(name):
  """P2 adds 9 D^2, P1 48 D^2, and at most 0.1 M of small things."""
  module = families.module_of(name)
  for variant, config in families.published(name).items():

    def count(config=config, window=4, **options):
      def make(rngs):
        base = module.Model(config, rngs=rngs)
        return TensorAR(base, window=window, rngs=rngs, **options)

      return families.count(weights.abstract(make))

    counts = [count(window=1), count(**P2), count(**P1)]
    for squares, wrapped in ((9, counts[1]), (48, counts[2])):
      extra = wrapped - counts[0] - squares * config.width**2
      # Of 27 D at the most, where a model is wider than those of the papers.
      assert 0 < extra <= max(100_000, 27 * config.width), variant
    # The papers cut some figures and round others, before they add.
    base, *wrapped = PRINTED.get((name, variant), (None,))
    assert base is None or abs(counts[0] / 1e6 - base) < 1
    for printed, found in zip(wrapped, counts[1:]):
      added = (found - counts[0]) / 1e6
      assert printed is None or abs(added - (printed - base)) < 1.5, variant
