"""One step of training, as a pure function, and the state that it takes.

The layout of a state says where on a mesh each of its arrays lies, before there
is one: they are made there, or read from a checkpoint, part by part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from tensorar_jax.interfaces import Key
from tensorar_jax.nn import checks, flops
from tensorar_jax.parallel import sharding, weights


@struct.dataclass
class TrainState:
  """Everything a checkpoint holds.

  Its leaves are arrays; those of a layout are shapes with shardings.

  Attributes:
    step: int32 [], completed steps.
    params: trained weights by path, float32.
    frozen: saved but untrained weights by path.
    opt_state: of `optimizer.make`.
    ema: average of params, or None.
    rng: the run's key; step n uses fold_in(rng, n).
  """

  step: Any
  params: Any
  frozen: Any
  opt_state: Any
  ema: Any
  rng: Any


def _first_state(params, frozen, tx, seed, ema) -> TrainState:
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    frozen=frozen,
    opt_state=tx.init(params),
    ema=jax.tree.map(jnp.copy, params) if ema else None,
    rng=jax.random.key(seed),
  )


def state_layout(
  model: nnx.Module, tx: optax.GradientTransformation, ema: bool, mesh: Mesh
) -> TrainState:
  """Makes the layout of the state; the model may be abstract."""
  _, params, frozen = weights.split(model)
  state = jax.eval_shape(
    lambda p, f: _first_state(p, f, tx, 0, ema), params, frozen
  )
  return sharding.layout(state, model, mesh)


def init_state(
  model: nnx.Module,
  tx: optax.GradientTransformation,
  seed: int,
  ema: bool,
  mesh: Mesh | None = None,
  *,
  copy: bool = True,
) -> tuple[weights.Skeleton, TrainState]:
  """Makes the skeleton of a model, and the state before the first step.

  Args:
    model: with its initial weights.
    tx: the optimiser.
    seed: of the run's key; see `checks.seed`.
    ema: whether to keep an average of the weights.
    mesh: where the state lies; by default one device has it all.
    copy: whether the state has weights of its own. If not, it takes those of
      the model that are in their place, which saves the memory of a copy: the
      first step donates them, and the model cannot be used any more.
  """
  checks.seed(seed)
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  skeleton, params, frozen = weights.split(model)
  # An initialiser may leave a weak type, which the first update makes strong.
  params = {path: jnp.asarray(p, p.dtype) for path, p in params.items()}
  shardings = sharding.shardings(state_layout(model, tx, ema, mesh))
  may_alias = None if not copy else False
  params = jax.device_put(params, shardings.params, may_alias=may_alias)
  frozen = jax.device_put(frozen, shardings.frozen, may_alias=may_alias)

  def all_but_weights(params):
    state = _first_state(params, {}, tx, seed, ema)
    return dataclasses.replace(state, params=None, frozen=None)

  shardings = shardings.replace(params=None, frozen=None)
  state = jax.jit(all_but_weights, out_shardings=shardings)(params)
  return skeleton, state.replace(params=params, frozen=frozen)


def make_train_step(
  skeleton: weights.Skeleton,
  loss: Callable,
  tx: optax.GradientTransformation,
  ema_decay: float,
  layout: TrainState | None = None,
  accumulate: int = 1,
) -> Callable:
  """Makes the jitted step (state, context, batch) -> (state, metrics).

  It donates the state: the old one's arrays are deleted, and with them those of
  a model that it was made of without a copy; see `init_state`. Metrics are
  scalars: "loss", "grad_norm", the loss's.

  Args:
    skeleton: of the model.
    loss: (model, context, batch, rng, step) -> (loss, metrics).
    tx: the optimiser.
    ema_decay: of the average of the weights, if the state keeps one.
    layout: of `state_layout`; keeps the new state where the old one is, and
      metrics on all devices. Without it the compiler chooses.
    accumulate: parts of a batch that are computed one after another, each with
      the memory of its part; loss and gradients are the means over them.
  """
  out_shardings = None
  if layout is not None:
    out_shardings = sharding.shardings(layout), layout.step.sharding

  def gradients(state, context, batch, rng):
    def compute(params):
      model = sharding.gather(skeleton.merge(params, state.frozen))
      return loss(model, context, batch, rng, state.step)

    (value, scalars), grads = jax.value_and_grad(compute, has_aux=True)(
      state.params
    )
    if out_shardings:  # summed over the devices into the parts that they have
      state_shardings, _ = out_shardings
      grads = jax.lax.with_sharding_constraint(grads, state_shardings.params)
    return {"loss": value, **scalars}, grads

  def train_step(state: TrainState, context, batch):
    rng = jax.random.fold_in(state.rng, state.step)
    gradients_of = functools.partial(gradients, state, context)
    if accumulate == 1:
      scalars, grads = gradients_of(batch, rng)
    else:
      scalars, grads = _mean_over_parts(gradients_of, batch, rng, accumulate)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, state.params)
    ema = state.ema
    if ema is not None:
      ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
    scalars = {**scalars, "grad_norm": optax.tree.norm(grads)}
    state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=params,
      opt_state=opt_state,
      ema=ema,
    )
    return state, scalars

  # Batches have one shape: a second trace would be a bug, and a slow one. chex
  # counts by source line, so the count starts again for every stage.
  chex.clear_trace_counter()
  once = chex.assert_max_traces(train_step, n=1)
  return jax.jit(once, donate_argnums=0, out_shardings=out_shardings)


def _mean_over_parts(
  compute: Callable, batch: Any, rng: Key, parts: int
) -> Any:
  """Averages `compute(part, rng)` over `parts` equal parts of a batch."""

  def split(array):
    # Part i is every parts-th row: all devices have rows of every part.
    rows = array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)
    return sharding.constrain(rows, None, sharding.ROWS)

  def add(total, numbered):
    i, part = numbered
    values = compute(part, jax.random.fold_in(rng, i))
    return jax.tree.map(lambda t, v: t + v / parts, total, values), None

  batch = jax.tree.map(split, batch)
  first_part = jax.tree.map(lambda a: a[0], batch)
  shapes = jax.eval_shape(compute, first_part, rng)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(add, zeros, (jnp.arange(parts), batch))[0]


def model_flops(
  skeleton: weights.Skeleton,
  loss: Callable,
  state: TrainState,
  context: Any,
  batch: Any,
) -> int:
  """Counts the model FLOPs of one step; see `flops`.

  They are those of the program without hand-written kernels, whose FLOPs
  cannot be counted, on any hardware. Arrays may be their shapes.
  """

  def compute(params, frozen, context, batch, rng, step):
    return loss(skeleton.merge(params, frozen), context, batch, rng, step)[0]

  args = (state.params, state.frozen, context, batch, state.rng, state.step)
  args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
  with sharding.as_if_plain():
    return flops.training_flops(compute, *args)
