"""Sliding-window sampling: prefill, then one `lax.scan` over the tokens.

Step n turns the window drawn at step n - 1 into one backbone input, decodes one
position with the KV cache, and draws the next window; its first token is
committed. Whatever k is, there are T backbone steps. See docs/method.md,
section 6. How a token is drawn from its logits is a rule of `drawing`.

The random numbers of image i come from (rng, i, step, slot) alone, so an image
is the same in any batch, on any number of devices, in any process.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from tensorar_jax.interfaces import Cache, Cond, Key, Samples
from tensorar_jax.method import drawing
from tensorar_jax.method.drawing import DrawingRule
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.method.windows import valid_slots
from tensorar_jax.nn import checks, layers
from tensorar_jax.parallel import sharding, weights


@struct.dataclass
class SamplingState:
  """What one step of the sampler hands to the next.

  Attributes:
    cache: keys and values of all rows so far; with guidance, those of the
      conditions and after them those of the null conditions.
    window: the tokens drawn at the last step, [B, k, F]; the first of them is
      committed, the others are drafts.
    looks: for a drawing rule that asks for earlier looks, the vectors whose
      logits predicted slots 1 to k - 1 at each step, [B or 2B, T, k - 1, D];
      steps to come are 0. None for a rule that asks for none.
  """

  cache: Cache
  window: Int[Array, "B k F"]
  looks: Float[Array, "_ T _ D"] | None


@struct.dataclass
class SamplingInputs:
  """The arrays of one call of the sampler, beside the weights.

  Shapes or partition specs may stand for them.

  Attributes:
    cond: the condition of each image.
    null: their null conditions; None samples without guidance.
    rng: the key of the whole run.
    image_index: int32 [B], the index of each image in the run.
    scales: float32 [T, F], the guidance scale of each token and sub-token.
    committed: int32 [B, T, F], None, or tokens to commit as they are.
  """

  cond: Any
  null: Any
  rng: Any
  image_index: Any
  scales: Any
  committed: Any = None


@dataclasses.dataclass(frozen=True)
class SamplingProgram:
  """What a sampler is compiled for, beside the shapes of its inputs.

  Attributes:
    config: how tokens are drawn; its guidance is in the inputs' scales.
    platform: what it runs on: "cpu", "gpu" or "tpu".
    mesh: the mesh of the inputs, which splits the rows if it has several
      devices; None is one device without a mesh.
  """

  config: SamplingConfig
  platform: str
  mesh: Mesh | None


def _uniforms(
  keys: Key, step: Int[Array, ""] | int, window: int, factors: int
) -> Float[Array, "B k F"]:
  """Uniform numbers of (image, step, slot): slot 0's do not depend on k."""

  def slot(key, j):
    return jax.random.uniform(jax.random.fold_in(key, j), (factors,))

  keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
  return jax.vmap(
    lambda key: jax.vmap(lambda j: slot(key, j))(jnp.arange(window))
  )(keys)


@dataclasses.dataclass(frozen=True)
class WindowDrawer:
  """Draws windows from the vectors of `TensorAR.decode_window`.

  Attributes:
    model: its head makes logits of vectors.
    config: temperatures and filters.
    rule: how tokens are drawn.
    keys: the key of each image, [B].
    scales: the guidance scale of each token and sub-token.
    guided: whether vectors are [cond | null], 2B of them.
  """

  model: TensorAR
  config: SamplingConfig
  rule: DrawingRule
  keys: Key
  scales: Float[Array | np.ndarray, "T F"]
  guided: bool

  def init_looks(
    self, vectors: Float[Array, "rows k D"]
  ) -> Float[Array, "rows T _ D"] | None:
    """Room for earlier looks, or None if the rule asks for none."""
    rows, window, width = vectors.shape
    if self.rule.looks == 0 or window == 1:
      return None
    shape = (rows, self.model.num_tokens, window - 1, width)
    return jnp.zeros(shape, vectors.dtype)

  def keep_looks(self, looks, vectors: Float[Array, "rows k D"], step):
    """The looks with those of a step entered."""
    if looks is None:
      return None
    return jax.lax.dynamic_update_slice_in_dim(
      looks, vectors[:, None, 1:], step, axis=1
    )

  def draw(
    self,
    vectors: Float[Array, "rows k D"],
    looks: Float[Array, "rows T _ D"] | None,
    step: Int[Array, ""] | int,
  ) -> tuple[Int[Array, "B k F"], tuple[Float[Array, "B k _"], ...]]:
    """The tokens of a step's window and the guided logits they come from."""
    factors = len(self.model.vocab_sizes)
    window = self.model.window
    uniform = _uniforms(self.keys, step, window, factors)
    tokens = jnp.zeros((self.keys.shape[0], window, factors), jnp.int32)
    present = []

    def earlier(f, tokens, look=1):
      return self._earlier(looks, step, present, f, tokens, look)

    for f in range(factors):
      present.append(self._logits(vectors, tokens, f, step))
      drawn = self.rule.draw(
        f=f,
        uniform=uniform[..., f],
        logits=present[f],
        tokens=tokens,
        earlier=earlier,
        config=self.config.sub_token(f),
      )
      tokens = tokens.at[..., f].set(drawn)
    return tokens, tuple(present)

  def _logits(self, vectors, tokens, f, step):
    """Guided logits [B, m, V_f] of vectors [B or 2B, m, D]."""
    both = jnp.concatenate([tokens, tokens]) if self.guided else tokens
    logits = self.model.logits(vectors, both)[f]
    scale = self.scales[step, f]
    return drawing.guide(logits, scale) if self.guided else logits

  def _earlier(self, looks, step, present, f, tokens, look):
    """See `drawing.Earlier`."""
    if not 1 <= look <= self.rule.looks:
      raise ValueError(
        f"{self.rule} asks for look={look}: expected 1 to its"
        f" looks={self.rule.looks}. Raise `looks`."
      )
    slots = tokens.shape[1]
    now = present[f][:, :slots]
    # A slot's position was `look` slots further on, if that was in the window.
    count = min(slots, self.model.window - look)
    if count < 1:
      return now
    vectors = jax.lax.dynamic_index_in_dim(
      looks, step - look, axis=1, keepdims=False
    )[:, look - 1 : look - 1 + count]
    then = self._logits(vectors, tokens[:, :count], f, step)
    then = jnp.where(step >= look, then, now[:, :count])
    return jnp.concatenate([then, now[:, count:]], axis=1)


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


@functools.partial(jax.jit, static_argnames=("graphdef", "program"))
def _generate(graphdef, state, inputs: SamplingInputs, program):
  """`generate`, compiled once for each `SamplingProgram`."""
  graphdef, state = nnx.split(in_compute_dtype(nnx.merge(graphdef, state)))
  run = functools.partial(_generate_rows, graphdef, program)
  if program.mesh is None or program.mesh.size == 1:
    with sharding.on_one_device(program.platform, program.mesh):
      return run(state, inputs)
  # Left to the partitioner, [cond | null] would be one batch to split, and the
  # halves of an image would meet across devices at every token. Rows are split
  # by hand, and what `fsdp` splits of the weights is gathered once; `tensor` is
  # the partitioner's.
  whole, rows = PartitionSpec(), PartitionSpec(sharding.ROWS)
  split = SamplingInputs(
    cond=rows,
    null=rows,
    rng=whole,
    image_index=rows,
    scales=whole,
    committed=rows,
  )
  run = jax.shard_map(
    run,
    mesh=program.mesh,
    in_specs=(whole, split),
    out_specs=rows,
    axis_names=set(sharding.ROWS),
    check_vma=False,
  )
  return run(state, inputs)


def _generate_rows(graphdef, program, state, inputs: SamplingInputs):
  """Samples of the rows of one device, or of those that share its rows."""
  model = layers.for_decoding(nnx.merge(graphdef, state), program.platform)
  config, cond = program.config, inputs.cond
  num_tokens, window = model.num_tokens, model.window
  guided = inputs.null is not None
  if guided:
    cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, inputs.null)
  image_key = lambda index: jax.random.fold_in(inputs.rng, index)
  drawer = WindowDrawer(
    model=model,
    config=config,
    rule=drawing.find_rule(config.rule),
    keys=jax.vmap(image_key)(inputs.image_index),
    scales=inputs.scales,
    guided=guided,
  )

  def draw(vectors, cache, looks, step):
    """(the state after a step, what is kept of it) from its vectors."""
    tokens, logits = drawer.draw(vectors, looks, step)
    if inputs.committed is not None:  # in place of what was drawn
      tokens = tokens.at[:, 0].set(inputs.committed[:, step])
    looks = drawer.keep_looks(looks, vectors, step)
    kept = (tokens, logits if config.return_logits else None)
    return SamplingState(cache=cache, window=tokens, looks=looks), kept

  def decode(state, step):
    valid = valid_slots(step - 1, window, num_tokens)
    h = model.encode_window(state.window, valid)
    h = jnp.concatenate([h, h]) if guided else h
    hidden, cache = model.backbone.decode(h, state.cache)
    return draw(model.decode_window(hidden), cache, state.looks, step)

  hidden, cache = model.backbone.prefill(cond)
  vectors = model.decode_window(hidden)
  state, first = draw(vectors, cache, drawer.init_looks(vectors), 0)
  _, rest = jax.lax.scan(decode, state, jnp.arange(1, num_tokens))
  steps_second = lambda a, b: jnp.moveaxis(jnp.concatenate([a[None], b]), 0, 1)
  drafts, logits = jax.tree.map(steps_second, first, rest)
  return Samples(tokens=drafts[:, :, 0], drafts=drafts, logits=logits)


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


def generate(
  model: TensorAR,
  cond: Cond,
  null: Cond | None,
  rng: Key,
  config: SamplingConfig = SamplingConfig(),
  image_index: Int[Array | np.ndarray, "B"] | None = None,
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
  """
  state, inputs, program = _prepare_call(
    model, cond, null, rng, config, image_index
  )
  return _generate(*state, inputs, program=program)


def trace(
  model, cond, null, rng, config=SamplingConfig(), image_index=None
) -> jax.stages.Traced:
  """Traces `generate` without running it; it takes the same arguments.

  Shapes will do in place of arrays, on a mesh that need not be here.
  """
  state, inputs, program = _prepare_call(
    model, cond, null, rng, config, image_index
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
  such drafts. Along the tokens of `generate` these are its `drafts`.
  """
  state, inputs, program = _prepare_call(
    model, cond, null, rng, config, committed=tokens
  )
  return _generate(*state, inputs, program=program).drafts


def _prepare_call(
  model, cond, null, rng, config, image_index=None, committed=None
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
