"""Model FLOPs: the multiplications that a program needs, without repetitions.

Two for each multiply-add of the matrix products and convolutions in the traced
program. Elementwise work, gathers (embeddings) and sorts do not count.

    training = FLOPs of the loss together with its directional derivative

A matrix product x W has the derivative dx W + x dW, and the backward pass is
its transpose, with as many FLOPs. So trained layers count three times their
forward pass, and frozen ones, or those before a `stop_gradient`, once. What a
checkpointed layer computes again does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.core
from jax.extend import core
from jax.interpreters import partial_eval


def matmul_flops(
  function: Callable, *args: Any, while_runs: int | None = None
) -> int:
  """Counts the FLOPs of one call of `function`, traced at arrays or shapes.

  `while_runs` is how often every `while` of unknown length runs.

  Operations that no result depends on do not count. A `cond` counts its largest
  branch, a `shard_map` every shard, a convolution its border as well.

  Raises:
    ValueError: a `while` of unknown length holds any, without `while_runs`.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(live, while_runs)


def training_flops(loss: Callable, params: Any, *args: Any) -> int:
  """Counts the FLOPs of `loss(params, *args)` and its gradient by `params`.

  The loss is a scalar, or a tuple or tree with one; it may not hold functions
  with a backward pass of their own (`jax.custom_vjp`).
  """

  def derivative(params, *args):
    return jax.jvp(lambda p: loss(p, *args), (params,), (params,))

  return matmul_flops(derivative, params, *args)


def _count(jaxpr: core.Jaxpr, while_runs: int | None) -> int:
  return sum(_count_equation(line, while_runs) for line in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn, while_runs: int | None) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    left = _shape(equation.invars[0])
    (contracted, _), _ = params["dimension_numbers"]
    inner = math.prod(left[axis] for axis in contracted)
    return 2 * inner * math.prod(_shape(equation.outvars[0]))
  if name == "conv_general_dilated":
    return _count_convolution(equation)
  inner = [_count(jaxpr, while_runs) for jaxpr in core.jaxprs_in_params(params)]
  if name == "cond":
    return max(inner)
  if name == "while" and any(inner) and while_runs is None:
    raise ValueError(
      "a `while` loop around matrix products: how often it runs is not known"
      " before it runs. Use `jax.lax.scan`, or a `fori_loop` of fixed length."
    )
  if name == "while":
    return (while_runs or 0) * sum(inner)
  return _repeats(name, params) * sum(inner)


def _shape(operand: core.Var | core.Literal) -> tuple[int, ...]:
  return cast(jax.core.ShapedArray, operand.aval).shape


def _count_convolution(equation: core.JaxprEqn) -> int:
  kernel = _shape(equation.invars[1])
  features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
  # Of an input spread out by zeros, the zeros are not multiplied.
  spread = math.prod(equation.params["lhs_dilation"])
  inner = math.prod(kernel) // features
  return 2 * inner * math.prod(_shape(equation.outvars[0])) // spread


def _repeats(name: str, params: dict) -> int:
  """Returns how often an equation runs the programs that it holds."""
  if name == "scan":
    return params["length"]
  if name == "shard_map":
    sizes = params["mesh"].shape
    return math.prod(sizes[axis] for axis in params["newly_manual_axes"])
  if name == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  return 1
