"""The weights that a stage's training starts from, on a mesh.

A stage without `init` starts from fresh weights. With `init`, whatever that
checkpoint holds is taken from it, and only TensorAR's own modules may be fresh:
so a base model becomes a TensorAR.
"""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.experiment import build, saved
from tensorar_jax.experiment.schema import Stage
from tensorar_jax.parallel import sharding, weights

NEW_MODULES = ("encoder/", "decoder/")  # what TensorAR adds to a backbone


def initial_model(
  stage: Stage, workdir: pathlib.Path, mesh: Mesh
) -> nnx.Module:
  """Returns the model a stage starts from: fresh, or with `init`'s weights.

  Weights are made, and read, where they belong on the mesh: no device ever
  holds more than its part.

  Raises:
    ValueError: the checkpoint that `init` names does not fit the model.
  """

  def fresh_weights():
    model = build.model(stage, nnx.Rngs(stage.seed))
    _, params, frozen = weights.split(model)
    # An initialiser may leave a weak type, which the first update makes strong.
    return {p: jnp.asarray(a, a.dtype) for p, a in {**params, **frozen}.items()}

  abstract = build.abstract_model(stage)
  layout = sharding.layout(jax.eval_shape(fresh_weights), abstract, mesh)
  inherited = _parent_weights(stage.init, workdir, layout) if stage.init else {}
  missing = {p: like for p, like in layout.items() if p not in inherited}

  @functools.partial(jax.jit, out_shardings=sharding.shardings(missing))
  def make_missing():
    fresh = fresh_weights()
    return {path: fresh[path] for path in missing}

  skeleton, _, _ = weights.split(abstract)
  return skeleton.merge(inherited, make_missing() if missing else {})


def _parent_weights(init: str, workdir: pathlib.Path, layout: dict) -> dict:
  """Reads the weights that `init` names; they must fit those of `layout`."""
  checkpoint = saved.resolve(init, workdir)
  shapes = orbax_io.weight_shapes(checkpoint)
  problems = [f"{path} is not in this model" for path in shapes.keys() - layout]
  problems += [
    f"{path} is missing"
    for path in layout.keys() - shapes.keys()
    if not path.startswith(NEW_MODULES)
  ]
  problems += [
    f"{path} is {shapes[path]}, the model's {layout[path].shape}"
    for path in shapes.keys() & layout.keys()
    if shapes[path] != layout[path].shape
  ]
  if problems:
    listed = "\n  ".join(sorted(problems)[:20])
    raise ValueError(
      f"init={init!r} ({checkpoint}) does not fit this stage's model"
      f" ({len(problems)} problems):\n  {listed}"
    )
  parts = orbax_io.read_weights(
    checkpoint, ("params", "frozen"), sharding.shardings(layout)
  )
  # Weights imported in another dtype are trained in the model's own.
  return {
    path: array.astype(layout[path].dtype)
    for part in parts.values()
    for path, array in part.items()
  }
