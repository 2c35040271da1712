"""Samples images: the sampler's public functions, for one device or many.

    prepare(model, mesh)          the form in which the devices decode fastest
    generate(model, cond, ...)    samples an image for each condition
    draft_along(model, tokens)    the windows that it would read along tokens
    advance(model, ...)           some steps of the parallel decoder, for a run
                                  that refills the places of finished images

`SamplingConfig.decoder` chooses how: `window_decoder` or `parallel_decoder`.
How a token is drawn from its logits is a rule of `drawing`.

The random numbers of image i come from (rng, i, step, slot) alone, so an image
is the same in any batch, on any number of devices, in any process.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from tensorar_jax.interfaces import Cache, Cond, Key, Samples
from tensorar_jax.method import drawing, window_decoder
from tensorar_jax.method.decoding import (
  SamplingInputs,
  SamplingProgram,
  WindowDrawer,
)
from tensorar_jax.method.marginals import Marginals
from tensorar_jax.method.parallel_decoder import ParallelDecoder, ParallelState
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.nn import checks, layers
from tensorar_jax.parallel import sharding, weights


def _platform_and_mesh(cond) -> tuple[str, Mesh | None]:
  """Returns where a condition is: (platform, its mesh if it has one)."""
  layout = getattr(jax.tree.leaves(cond)[0], "sharding", None)
  if layout is None:
    return sharding.platform(), None
  platform = sharding.platform_of(next(iter(layout.device_set)))
  if not isinstance(layout, NamedSharding):
    return platform, None
  if layout.mesh.axis_names != sharding.AXES:
    raise ValueError(
      f"the condition is on a mesh of {layout.mesh.axis_names}: expected one of"
      f" {sharding.AXES}. Make it by sharding.make_mesh."
    )
  return platform, cast(Mesh, layout.mesh)  # of devices, as they are here


# --- on one device, or split over several ------------------------------------


def _by_rows(run: Callable, program: SamplingProgram, specs: tuple) -> Callable:
  """`run(weights, *arrays)` for all devices of the program's mesh.

  `specs` are the partition specs of the arrays, the results' one last.
  """
  if program.mesh is None or program.mesh.size == 1:

    def on_one_device(*args):
      with sharding.on_one_device(program.platform, program.mesh):
        return run(*args)

    return on_one_device
  # Left to the partitioner, [cond | null] would be one batch to split, and the
  # halves of an image would meet across devices at every token. Rows are split
  # by hand, and what `fsdp` splits of the weights is gathered once; `tensor` is
  # the partitioner's.
  return jax.shard_map(
    run,
    mesh=program.mesh,
    in_specs=(PartitionSpec(), *specs[:-1]),
    out_specs=specs[-1],
    axis_names=set(sharding.ROWS),
    check_vma=False,
  )


_WHOLE, _ROWS = PartitionSpec(), PartitionSpec(sharding.ROWS)
_INPUTS = SamplingInputs(
  cond=_ROWS,
  null=_ROWS,
  rng=_WHOLE,
  image_index=_ROWS,
  scales=_WHOLE,
  committed=_ROWS,
  marginals=_WHOLE,
  group=_ROWS,
)


def _drawer(graphdef, state, inputs, program):
  """(what draws windows, the key of each image, the conditions of all rows)."""
  model = layers.for_decoding(nnx.merge(graphdef, state), program.platform)
  cond, guided = inputs.cond, inputs.null is not None
  if guided:
    cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, inputs.null)
  image_key = lambda index: jax.random.fold_in(inputs.rng, index)
  drawer = WindowDrawer(
    model=model,
    config=program.config,
    rule=drawing.find_rule(program.config.draw),
    scales=inputs.scales,
    guided=guided,
  )
  return drawer, jax.vmap(image_key)(inputs.image_index), cond


def _total(program: SamplingProgram) -> Callable:
  """Sums a number over the devices that split the rows."""
  if program.mesh is None or program.mesh.size == 1:
    return lambda number: number
  return lambda number: jax.lax.psum(number, sharding.ROWS)


@functools.partial(jax.jit, static_argnames=("graphdef", "program"))
def _generate(graphdef, state, inputs: SamplingInputs, program):
  """`generate`, compiled once for each `SamplingProgram`."""
  graphdef, state = nnx.split(in_compute_dtype(nnx.merge(graphdef, state)))

  def run(state, inputs):
    drawer, keys, cond = _drawer(graphdef, state, inputs, program)
    if program.config.decoder == "window":
      return window_decoder.generate(drawer, inputs, keys, cond)
    decoder = ParallelDecoder(drawer, inputs, keys, cond)
    total = _total(program)
    everyone = total(jnp.asarray(len(keys)))
    return decoder.samples(decoder.run(decoder.begin(), everyone, total))

  return _by_rows(run, program, (_INPUTS, _ROWS))(state, inputs)


@functools.partial(
  jax.jit,
  static_argnames=("graphdef", "program"),
  donate_argnames="parallel_state",
)
def _advance(
  graphdef, state, inputs, parallel_state, is_new, enough, program
) -> tuple[ParallelState, Samples]:
  """`advance`, compiled once for each `SamplingProgram`."""
  graphdef, state = nnx.split(in_compute_dtype(nnx.merge(graphdef, state)))

  def run(state, inputs, parallel_state, is_new, enough):
    drawer, keys, cond = _drawer(graphdef, state, inputs, program)
    decoder = ParallelDecoder(drawer, inputs, keys, cond)
    if parallel_state is None:
      parallel_state = decoder.begin()
    else:
      parallel_state = decoder.refill(parallel_state, is_new)
    total = _total(program)
    parallel_state = decoder.run(parallel_state, enough, total)
    return parallel_state, decoder.samples(parallel_state)

  # Stacked layers have the layers' axis before that of the rows.
  single = layers.is_for_decoding(nnx.merge(graphdef, state))
  single = single or program.platform != "tpu"
  arrays = _ROWS if single else PartitionSpec(None, sharding.ROWS)
  layout = ParallelState(
    cache=Cache(k=arrays, v=arrays, end=_ROWS, context=_ROWS, is_aligned=False),
    windows=_ROWS,
    count=_ROWS,
    age=_ROWS,
    steps=_ROWS,
    looks=_ROWS,
    logits=_ROWS,
  )
  before = None if parallel_state is None else layout
  specs = (_INPUTS, before, _ROWS, _WHOLE, (layout, _ROWS))
  return _by_rows(run, program, specs)(
    state, inputs, parallel_state, is_new, enough
  )


# --- weights -----------------------------------------------------------------


def in_compute_dtype(model: weights.Model) -> weights.Model:
  """Returns a copy with weights in the dtype that their module computes in.

  The results are the same. But every step reads the weights, and some compilers
  leave the conversion inside the loop.
  """
  model = nnx.merge(*nnx.split(model))
  for _, module in list(nnx.iter_modules(model)):
    dtype = jnp.dtype(getattr(module, "dtype", None) or "float32")
    for name in ("kernel", "embedding"):
      weight = getattr(module, name, None)
      if (
        isinstance(weight, nnx.Param) and dtype.itemsize < weight.dtype.itemsize
      ):
        setattr(module, name, nnx.Param(weight[...].astype(dtype)))
  return model


def prepare(model: TensorAR, mesh: Mesh) -> TensorAR:
  """Puts a model on the mesh, in the form in which its devices decode fastest.

  `generate` takes any model; one that is not prepared it converts at every
  call, which takes a CPU some 0.5 s for 100 M weights. The prepared weights are
  a copy, except on TPUs where nothing changes: drop `model` to have its memory
  back.
  """
  if layers.is_for_decoding(model):
    return model  # prepared already
  model = sharding.shard(model, mesh)
  model = in_compute_dtype(model)
  platform = sharding.platform_of(mesh.devices.flat[0])
  return layers.for_decoding(model, platform)


# --- calls -------------------------------------------------------------------


def generate(
  model: TensorAR,
  cond: Cond,
  null: Cond | None,
  rng: Key,
  config: SamplingConfig = SamplingConfig(),
  image_index: Int[Array | np.ndarray, "B"] | None = None,
  marginals: Marginals | None = None,
) -> Samples:
  """Samples one image per row of `cond`.

  Args:
    model: a `TensorAR`; window=1 samples the base model.
    cond: from `Conditioning.encode`; on a mesh (`sharding.rows`) they stay
      there, and the model has to be there too (`sharding.shard`).
    null: from `Conditioning.null`; None samples without guidance.
    rng: the key of the whole run.
    config: how tokens are drawn.
    image_index: the index of each image in the run, 0..B-1 by default; with
      `rng` it alone decides the image's random numbers.
    marginals: for `first_guess="marginals"` of the parallel decoder.
  """
  state, inputs, program = _prepare_call(
    model, cond, null, rng, config, image_index, marginals=marginals
  )
  return _generate(*state, inputs, program=program)


def advance(
  model: TensorAR,
  cond: Cond,
  null: Cond | None,
  rng: Key,
  config: SamplingConfig,
  image_index: Int[Array | np.ndarray, "B"],
  state: ParallelState | None,
  is_new: Bool[Array | np.ndarray, "B"],
  enough: int,
  marginals: Marginals | None = None,
) -> tuple[ParallelState, Samples]:
  """Takes steps of the parallel decoder until some images are finished.

  The images are in B places. Those where `is_new` are begun, in the place of
  whatever was there before; `cond`, `null` and `image_index` are those of all
  places. See `generate` for the other arguments.

  Args:
    state: of the call before, whose memory is used again; None begins with all
      places new.
    is_new: the places with another image than in the call before.
    enough: how many places are finished when it returns.

  Returns:
    (the state, samples that mean something where `state.count` is T).
  """
  if config.decoder != "parallel":
    raise ValueError(
      f"decoder={config.decoder!r}: only the decoder 'parallel' advances."
    )
  model_state, inputs, program = _prepare_call(
    model, cond, null, rng, config, image_index, marginals=marginals
  )
  return _advance(
    *model_state,
    inputs,
    parallel_state=state,
    is_new=is_new,
    enough=enough,
    program=program,
  )


def trace(
  model,
  cond,
  null,
  rng,
  config=SamplingConfig(),
  image_index=None,
  marginals=None,
) -> jax.stages.Traced:
  """Traces `generate` without running it; it takes the same arguments.

  Shapes will do in place of arrays, but for marginals, on a mesh that need not
  be here.
  """
  state, inputs, program = _prepare_call(
    model, cond, null, rng, config, image_index, marginals=marginals
  )
  return _generate.trace(*state, inputs, program=program)


def draft_along(
  model: TensorAR,
  tokens: Int[Array | np.ndarray, "B T F"],
  cond: Cond,
  null: Cond | None,
  rng: Key,
  config: SamplingConfig = SamplingConfig(),
) -> Int[Array, "B T k F"]:
  """The windows that the sampler reads if `tokens` are what it commits.

  As `generate`, but every step commits the given token in place of the one it
  drew; the slots >= 1 are the model's own drafts, each drawn after a window of
  such drafts. Along the tokens of `generate` these are its `drafts`. There is
  nothing to guess, so it takes one step for each token with either decoder.
  """
  config = dataclasses.replace(config, decoder="window")
  state, inputs, program = _prepare_call(
    model, cond, null, rng, config, committed=tokens
  )
  return _generate(*state, inputs, program=program).drafts


def _prepare_call(
  model,
  cond,
  null,
  rng,
  config,
  image_index=None,
  committed=None,
  marginals=None,
) -> tuple[tuple, SamplingInputs, SamplingProgram]:
  """((graphdef, state), inputs, program) of `_generate`, checked."""
  if not isinstance(model, TensorAR):
    raise ValueError(
      f"model is a {type(model).__name__}: wrap it, TensorAR(it, window=1)."
    )
  batch = jax.tree.leaves(cond)[0].shape[0]
  if image_index is None:
    image_index = jnp.arange(batch)
  if len(image_index) != batch:
    raise ValueError(f"{len(image_index)} image_index, {batch} conditions.")
  factors = len(model.vocab_sizes)
  expected = (batch, model.num_tokens, factors)
  if committed is not None and committed.shape != expected:
    raise ValueError(
      f"tokens of shape {committed.shape}: expected {expected}, a sequence for"
      " each condition."
    )
  if committed is not None:
    checks.tokens(committed, model.vocab_sizes)
  config.check(factors)
  group = None
  if config.decoder == "parallel":
    group, marginals = _prepare_guesses(model, cond, config, marginals)
  else:
    marginals = None
  scales = config.guidance_scales(model.num_tokens, factors)
  if null is None and config.guided:
    raise ValueError(
      f"guidance={config.guidance} needs the unconditional half: pass"
      " null=conditioning.null(cond), or set guidance=1."
    )
  if (scales == 1).all():
    null = None
  if isinstance(rng, int) or not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    raise ValueError(f"rng={rng!r}: expected a key, as jax.random.key(0).")
  if not isinstance(jax.tree.leaves(cond)[0], jax.ShapeDtypeStruct):
    model.backbone.check(cond if null is None else null)
  platform, mesh = _platform_and_mesh(cond)
  inputs = SamplingInputs(
    cond=cond,
    null=null,
    rng=rng,
    image_index=image_index,
    scales=scales,
    committed=committed,
    marginals=marginals,
    group=group,
  )
  # The scales are arrays: one program serves every guidance.
  config = dataclasses.replace(
    config,
    guidance=1.0,
    unguided_scale=None,
    guidance_power=0.0,
    guidance_interval=None,
  )
  program = SamplingProgram(config, platform=platform, mesh=mesh)
  return nnx.split(model), inputs, program


def _prepare_guesses(model, cond, config, marginals):
  """(the group of each image, the marginals' arrays), or None of both."""
  if config.rows > model.num_tokens:
    raise ValueError(
      f"rows={config.rows}: the image has {model.num_tokens} tokens. Run at"
      " most as many rows at once."
    )
  if config.first_guess != "marginals":
    return None, None
  if marginals is None:
    raise ValueError(
      "first_guess='marginals' needs how often each token occurs: pass"
      " marginals=marginals.measure(...), or choose another first_guess."
    )
  shapes = [table.shape[1:] for table in marginals.logits]
  expected = [(model.num_tokens, size) for size in model.vocab_sizes]
  if shapes != expected:
    raise ValueError(
      f"marginals of {shapes} positions and tokens: the model has {expected}."
      " Measure them with its own tokenizer."
    )
  return marginals.groups_of(cond), marginals.logits
