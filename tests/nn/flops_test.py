import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from tensorar_jax.backbones import llamagen
from tensorar_jax.method import objective
from tensorar_jax.method.noising import NoiseConfig
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.nn import flops
from tensorar_jax.parallel import weights
from tests import tiny

X = jnp.zeros((3, 5))
W = jnp.zeros((5, 5))
XW = 2 * 3 * 5 * 5  # FLOPs of X @ W


loop = jax.lax.fori_loop


def twice(x, w):
  return jnp.sum(jnp.tanh(x @ w) @ w)


def with_own_derivative(x, w):
  f = jax.custom_jvp(twice)
  f.defjvp(lambda primals, tangents: (f(*primals), tangents[0].sum()))
  return f(x, w)


def sharded(x, w):
  auto = (AxisType.Auto,) * 2  # the default until JAX 0.11
  mesh = AbstractMesh((3, 2), ("rows", "others"), axis_types=auto)
  return jax.shard_map(
    jnp.matmul,
    mesh=mesh,
    in_specs=(P("rows"), P()),
    out_specs=P("rows"),
    axis_names={"rows"},
  )(x, w)


def blockwise(x, w):
  def kernel(x, w, out):
    out[...] = x[...] @ w[...]

  return pallas.pallas_call(
    kernel,
    grid=(3,),
    in_specs=[
      pallas.BlockSpec((1, 5), lambda i: (i, 0)),
      pallas.BlockSpec((5, 5), lambda i: (0, 0)),
    ],
    out_specs=pallas.BlockSpec((1, 5), lambda i: (i, 0)),
    out_shape=x,
  )(x, w)


def convolve(strides=2, **options):
  def apply(image, kernel):
    return jax.lax.conv_general_dilated(
      image,
      kernel,
      (strides, strides),
      padding=[(0, 0), (0, 0)],
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      **options,
    )

  return apply


@pytest.mark.parametrize(
  "function, args, expected",
  [
    (jnp.matmul, (X, W), XW),
    (twice, (X, W), 2 * XW),
    (jax.jit(twice), (X, W), 2 * XW),
    (jax.checkpoint(jax.jit(twice)), (X, W), 2 * XW),
    (lambda x, w: (x @ w, twice(x, w))[0], (X, W), XW),  # nobody reads it
    (with_own_derivative, (X, W), 2 * XW),
    (jax.vmap(jnp.matmul), (jnp.stack([X] * 7), jnp.stack([W] * 7)), 7 * XW),
    (
      lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, length=11),
      (X, W),
      11 * XW,
    ),
    (lambda x, w: loop(0, 4, lambda i, c: c @ w, x), (X, W), 4 * XW),
    (
      lambda x, w: jax.lax.cond(
        x[0, 0] > 0, lambda: (x @ w).sum(), lambda: (x[:1] @ w).sum()
      ),
      (X, W),
      XW,
    ),
    (sharded, (X, W), XW),
    (blockwise, (X, W), XW),
    (
      lambda x, w: jax.lax.while_loop(lambda c: c[0, 0] < 1, jnp.cos, x @ w),
      (X, W),
      XW,
    ),
    # 4 x 4 outputs of 6 features from 3 x 3 x 4 inputs; in 2 groups, half.
    (
      convolve(),
      (jnp.zeros((1, 9, 9, 4)), jnp.zeros((3, 3, 4, 6))),
      2 * 16 * 6 * 36,
    ),
    (
      convolve(feature_group_count=2),
      (jnp.zeros((1, 9, 9, 4)), jnp.zeros((3, 3, 2, 6))),
      2 * 16 * 6 * 18,
    ),
    # Spread to 8 x 8, of which a quarter are inputs; 8 x 8 outputs.
    (
      convolve(strides=1, lhs_dilation=(2, 2)),
      (jnp.zeros((1, 5, 5, 1)), jnp.zeros((2, 2, 1, 1))),
      2 * 64 * 4 // 4,
    ),
  ],
)  # fmt: skip
def test_known_programs(function, args, expected):
  assert flops.matmul_flops(function, *args) == expected


def test_a_loop_of_unknown_length_is_refused():
  with pytest.raises(ValueError, match="while.*not known"):
    flops.matmul_flops(
      lambda w: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ w, w), W
    )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_training_is_three_times_what_is_trained(wrap):
  """Recomputation counts nothing, nor do gradients that nobody asked for."""
  inner = wrap(lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w))
  # The input needs no gradient: 2 and 3 times.
  assert flops.training_flops(inner, W, X) == 5 * XW
  stop = jax.lax.stop_gradient
  half = wrap(lambda w, x: jnp.sum(stop(x @ w) @ w))
  assert flops.training_flops(half, W, X) == 3 * XW


def closed_form(model, batch: int, length: int) -> dict[str, int]:
  """Forward FLOPs by part: 2 x weights x rows, and the attention scores."""
  c, k = tiny.CONFIG, model.window
  _, params, _ = weights.split(model)
  size = lambda part: sum(
    int(np.prod(value.shape))
    for path, value in params.items()
    if path.startswith(part) and path.endswith("kernel")
  )
  blocks = size("backbone/blocks") * length
  blocks += c.num_layers * 2 * length**2 * c.width
  parts = {
    "backbone": 2 * batch * blocks,
    "head": 2 * batch * k * length * size("backbone/head"),
  }
  if k > 1:
    square, inputs = c.width**2, batch * (length - 1)
    mlp = {end: size(f"{end}/query/blocks/0/up") * 2 for end in MODULES}
    # A query of its own for all windows, k keys and values and one output each.
    rows = 1 + inputs * (2 * k + 1)
    parts["encoder"] = 2 * (square * rows + mlp["encoder"] * inputs)
    # One key, so that queries and keys do not matter.
    rows = batch * length
    parts["decoder"] = 2 * rows * (2 * square + k * mlp["decoder"])
  return parts


MODULES = ("encoder", "decoder")


@pytest.mark.parametrize("window, kind", [(1, "none"), (4, "categorical")])
def test_a_transformer_has_its_closed_form(window, kind):
  """Six FLOPs a weight and token, and attention over all rows."""
  counted, model = count_loss(window, kind)
  assert counted == 3 * sum(closed_form(model, 2, length=9).values())


def test_drafts_cost_one_forward_pass_more():
  """One row shorter, without a gradient, and slot 0 needs no logits."""
  (plain, model), (drafts, _) = (
    count_loss(4, "categorical"),
    count_loss(4, "drafts"),
  )
  parts = closed_form(model, 2, length=8)
  assert drafts - plain == sum(parts.values()) - parts["head"] // 4


def count_loss(window, kind):
  """(training FLOPs of the loss of two images, the model)."""
  config = dataclasses.replace(tiny.CONFIG, residual_dropout=0.1)
  model = weights.abstract(
    lambda rngs: TensorAR(
      llamagen.Model(config, rngs=rngs), window=window, rngs=rngs
    )
  )
  skeleton, params, frozen = weights.split(model)

  def loss(params, frozen, cond, tokens, rng):
    model = skeleton.merge(params, frozen)
    settings = NoiseConfig(kind=kind), objective.LossConfig()
    return objective.tensorar_loss(model, cond, tokens, rng, *settings)[0]

  tokens = jnp.zeros((2, model.num_tokens, 1), jnp.int32)
  inputs = frozen, tiny.cond(2), tokens, jax.random.key(0)
  return flops.training_flops(loss, params, *inputs), model
