"""A model as (skeleton, weights): weights are a flat dict path -> array.

Flat paths such as `backbone/blocks/stacked/mlp/up/kernel` serve the optimiser's
groups, the sharding rules, the import tables and the checkpoints alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from tensorar_jax.interfaces import Frozen

# Arrays, or their shapes where a model is built abstractly.
Weights = dict[str, Array | jax.ShapeDtypeStruct]
Model = TypeVar("Model", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Skeleton(Generic[Model]):
  """A model without its arrays."""

  graphdef: nnx.GraphDef[Model]
  variables: tuple[tuple[tuple, nnx.Variable], ...]  # abstract, by path

  def merge(
    self, *weights: Mapping[str, Array | jax.ShapeDtypeStruct]
  ) -> Model:
    """The model with these weights; together they cover every path."""
    arrays = {path: array for part in weights for path, array in part.items()}
    state = [(p, v.replace(arrays[name(p)])) for p, v in self.variables]
    return nnx.merge(self.graphdef, nnx.from_flat_state(state))


def abstract(make: Callable[[nnx.Rngs], Model]) -> Model:
  """Builds the model `make(rngs)` with shapes in place of its arrays."""

  def traced():
    rngs = nnx.Rngs(0)
    # NNX asks a counter that is traced for its sharding at every draw, which
    # JAX answers by printing the whole trace: seconds for a deep tokenizer.
    count = np.zeros((), np.uint32)
    rngs.default.count = nnx.RngCount(
      count,  # pyright: ignore[reportArgumentType]: NumPy's, not traced
      tag="default",
    )
    return make(rngs)

  return nnx.eval_shape(traced)


def name(path: tuple) -> str:
  """Returns a path of NNX as one string."""
  return "/".join(map(str, path))


def split(model: Model) -> tuple[Skeleton[Model], Weights, Weights]:
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


def update(
  model: Model, weights: Mapping[str, Array | jax.ShapeDtypeStruct]
) -> Model:
  """Returns a copy of the model with the named weights replaced."""
  skeleton, params, frozen = split(model)
  return skeleton.merge({**params, **frozen, **weights})
