"""A model as (skeleton, weights): weights are a flat dict path -> array.

Flat paths such as `backbone/blocks/stacked/mlp/up/kernel` serve the optimiser's
groups, the sharding rules, the import tables and the checkpoints alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from tensorar_jax.interfaces import Frozen

# Arrays, or their shapes where a model is built abstractly.
Weights = dict[str, Array | jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Skeleton:
  """A model without its arrays."""

  graphdef: nnx.GraphDef
  variables: tuple[tuple[tuple, nnx.Variable], ...]  # abstract, by path

  def merge(self, *weights: Weights) -> nnx.Module:
    """The model with these weights; together they cover every path."""
    arrays = {path: array for part in weights for path, array in part.items()}
    state = [(p, v.replace(arrays[name(p)])) for p, v in self.variables]
    return nnx.merge(self.graphdef, nnx.from_flat_state(state))


def abstract(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
  """Builds the model `make(rngs)` with shapes in place of its arrays."""

  def traced():
    rngs = nnx.Rngs(0)
    # NNX asks a counter that is traced for its sharding at every draw, which
    # JAX answers by printing the whole trace: seconds for a deep tokenizer.
    rngs.default.count = nnx.RngCount(np.zeros((), np.uint32), tag="default")
    return make(rngs)

  return nnx.eval_shape(traced)


def name(path: tuple) -> str:
  """Returns a path of NNX as one string."""
  return "/".join(map(str, path))


def split(model: nnx.Module) -> tuple[Skeleton, Weights, Weights]:
  """Splits a model into (skeleton, trained weights, frozen weights)."""
  graphdef, state = nnx.split(model)
  flat = list(nnx.to_flat_state(state))
  abstract = tuple(
    (path, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), v))
    for path, v in flat
  )
  params, frozen = {}, {}
  for path, variable in flat:
    part = frozen if isinstance(variable, Frozen) else params
    part[name(path)] = variable.get_value()
  return Skeleton(graphdef, abstract), params, frozen


def update(model: nnx.Module, weights: Weights) -> nnx.Module:
  """Returns a copy of the model with the named weights replaced."""
  skeleton, params, frozen = split(model)
  return skeleton.merge({**params, **frozen, **weights})
