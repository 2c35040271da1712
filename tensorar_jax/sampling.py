"""Sliding-window sampling: prefill, then one `lax.scan` over the tokens.

Step n turns the window drawn at step n - 1 into one backbone input, decodes one
position with the KV cache, and draws the next window; its first token is
committed. Whatever k is, there are T backbone steps. Spec: section 6.

The random numbers of image i come from (rng, i, step, slot) alone, so an image
is the same in any batch, on any number of devices, in any process.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from tensorar_jax import drawing, layers, sharding
from tensorar_jax.drawing import SamplingConfig
from tensorar_jax.interfaces import Cond, Key, Samples
from tensorar_jax.tensorar import TensorAR
from tensorar_jax.windows import valid_slots


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


def _draw_window(model, hidden, keys, step, scale, config):
  """(tokens [B, k, F], guided logits) from hidden states [B or 2B, D]."""
  u = model.decode_window(hidden)
  guided = hidden.shape[0] != keys.shape[0]
  factors = len(model.vocab_sizes)
  uniform = _uniforms(keys, step, model.window, factors)
  tokens = jnp.zeros((keys.shape[0], model.window, factors), jnp.int32)
  kept = []
  for f in range(factors):
    both = jnp.concatenate([tokens, tokens]) if guided else tokens
    logits = model.logits(u, both)[f]
    logits = drawing.guide(logits, scale[f]) if guided else logits
    kept.append(logits)
    new = drawing.draw_slots(uniform[..., f], logits, config.sub_token(f))
    tokens = tokens.at[..., f].set(new)
  return tokens, tuple(kept)


def _place(cond) -> tuple[str, Mesh | None]:
  """(platform, mesh) that a condition is on; None is a single device."""
  place = getattr(jax.tree.leaves(cond)[0], "sharding", None)
  if place is None:
    return sharding.platform(), None
  platform = sharding.platform_of(next(iter(place.device_set)))
  if not isinstance(place, NamedSharding) or place.num_devices == 1:
    return platform, None
  if place.mesh.axis_names != sharding.AXES:
    raise ValueError(
      f"the condition is on a mesh of {place.mesh.axis_names}: expected one of"
      f" {sharding.AXES}. Make it by sharding.make_mesh."
    )
  return platform, place.mesh


_UNGUIDED = dict(guidance=1.0, guidance_power=0.0, guidance_interval=None)


@functools.partial(jax.jit, static_argnames=("graphdef", "how"))
def _generate(graphdef, state, cond, null, rng, image_index, scales, path, how):
  """`how` is (SamplingConfig, the platform that it is for, mesh)."""
  config, platform, mesh = how
  graphdef, state = nnx.split(in_compute_dtype(nnx.merge(graphdef, state)))
  on_cpu = platform == "cpu"
  run = functools.partial(_generate_rows, graphdef, config, on_cpu)
  args = state, cond, null, rng, image_index, scales, path
  if not mesh:
    with sharding.on_one_device(platform):
      return run(*args)
  # Left to the partitioner, [cond | null] would be one batch to split, and the
  # halves of an image would meet across devices at every token. Rows are split
  # by hand, and what `fsdp` splits of the weights is gathered once; `tensor` is
  # the partitioner's.
  one, rows = PartitionSpec(), PartitionSpec(sharding.ROWS)
  run = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(one, rows, rows, one, rows, one, rows),
    out_specs=rows,
    axis_names=set(sharding.ROWS),
    check_vma=False,
  )
  return run(*args)


def _generate_rows(
  graphdef, config, on_cpu, state, cond, null, rng, image_index, scales, path
):
  """Samples of the rows of one device, or of those that share its rows."""
  model = nnx.merge(graphdef, state)
  model = layers.for_decoding(model) if on_cpu else model
  keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(image_index)
  guided = null is not None
  if guided:
    cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
  num_tokens, window = model.num_tokens, model.window

  def draw(hidden, n):
    tokens, logits = _draw_window(model, hidden, keys, n, scales[n], config)
    if path is not None:  # commit what is given, keep the drafts
      tokens = tokens.at[:, 0].set(path[:, n])
    return tokens, logits

  def emit(tokens, logits):
    return (tokens, logits) if config.return_logits else (tokens,)

  # Carry: the KV cache and the last window drawn, tokens [B, k, F].
  def step(carry, n):
    cache, tokens = carry
    h = model.encode_window(tokens, valid_slots(n - 1, window, num_tokens))
    h = jnp.concatenate([h, h]) if guided else h
    hidden, cache = model.backbone.decode(h, cache)
    tokens, logits = draw(hidden, n)
    return (cache, tokens), emit(tokens, logits)

  hidden, cache = model.backbone.prefill(cond)
  tokens, logits = draw(hidden, 0)
  first = emit(tokens, logits)
  _, rest = jax.lax.scan(step, (cache, tokens), jnp.arange(1, num_tokens))
  join = lambda a, b: jnp.moveaxis(jnp.concatenate([a[None], b]), 0, 1)
  out = jax.tree.map(join, first, rest)
  drafts = out[0]  # [B, T, k, F]
  return Samples(
    tokens=drafts[:, :, 0],
    drafts=drafts,
    logits=out[1] if config.return_logits else None,
  )


def in_compute_dtype(model: nnx.Module) -> nnx.Module:
  """A copy with weights in the dtype that their module computes in.

  It computes the same; but every step reads the weights, and some compilers
  leave a conversion in the loop.
  """
  model = nnx.merge(*nnx.split(model))
  for _, module in list(nnx.iter_modules(model)):
    size = jnp.dtype(getattr(module, "dtype", None) or "float32").itemsize
    for name in ("kernel", "embedding"):
      weight = getattr(module, name, None)
      if isinstance(weight, nnx.Param) and size < weight.dtype.itemsize:
        setattr(module, name, nnx.Param(weight[...].astype(module.dtype)))
  return model


def prepare(model: TensorAR, mesh: Mesh) -> TensorAR:
  """The model on the mesh, in the form in which its devices decode fastest.

  `generate` takes any model; it gives one that is not prepared this form first,
  at every call: on a CPU some 0.5 s for 100 M weights.
  """
  linear = (
    m for _, m in nnx.iter_modules(model) if isinstance(m, layers.Linear)
  )
  if any(module.kernel is None for module in linear):
    return model  # it is prepared
  model = sharding.shard(model, mesh)
  model = in_compute_dtype(model)
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  return layers.for_decoding(model) if on_cpu else model


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
  args, how = _arguments(model, (cond, null), rng, config, image_index)
  return _generate(*args, how=how)


def trace(model, cond, null, *args) -> jax.stages.Traced:
  """`generate`, not run, of its arguments or of their shapes on a mesh."""
  args, how = _arguments(model, (cond, null), *args)
  return _generate.trace(*args, how=how)


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
  drew; the slots >= 1 are the model's own drafts, each drawn behind a window
  of such drafts. Along the tokens of `generate` these are its `drafts`.
  """
  args, how = _arguments(model, (cond, null), rng, config, path=tokens)
  return _generate(*args, how=how).drafts


def _arguments(model, conds, rng, config, image_index=None, path=None):
  """What `_generate` takes, checked; `path` are tokens to commit, or None."""
  cond, null = conds
  if not isinstance(model, TensorAR):
    raise ValueError(
      f"model is a {type(model).__name__}: wrap it, TensorAR(it, window=1)."
    )
  batch = jax.tree.leaves(cond)[0].shape[0]
  if image_index is None:
    image_index = jnp.arange(batch)
  if len(image_index) != batch:
    raise ValueError(f"{len(image_index)} image_index, {batch} conditions.")
  given = (batch, model.num_tokens, len(model.vocab_sizes))
  if path is not None and path.shape != given:
    raise ValueError(
      f"tokens of shape {path.shape}: expected {given}, a sequence for each"
      " condition."
    )
  config.check(len(model.vocab_sizes))
  scales = drawing.guidance_scales(
    config, model.num_tokens, len(model.vocab_sizes)
  )
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
  # The scales are an array of their own: one program serves every guidance.
  config = dataclasses.replace(config, **_UNGUIDED)
  platform, mesh = _place(cond)
  args = (*nnx.split(model), cond, null, rng, image_index, scales, path)
  return args, (config, platform, mesh)
