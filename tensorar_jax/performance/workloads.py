"""What a benchmark runs: generation, the tokenizer's decoder, training steps.

Every case is the program of a user, on fresh random weights, and comes with the
work that one run of it has to do, whatever the program does:

    decoding    bytes = steps x (weights that a step reads, in its dtype)
                FLOPs = steps x (products of a step on [cond | null] rows)
    tokenizer   FLOPs of the products and convolutions of its decoder
    training    FLOPs of the loss and its gradient; see `flops`

Embedding tables are not read whole, and key/value rows are not counted.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int32

from tensorar_jax.experiment import build, initial_weights
from tensorar_jax.experiment.schema import Stage
from tensorar_jax.generation import batches
from tensorar_jax.interfaces import Cond
from tensorar_jax.method import sampling, windows
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.nn import flops
from tensorar_jax.parallel import sharding
from tensorar_jax.performance import machine
from tensorar_jax.training import loop, train_step

OURS = "tensorar_jax"
GUIDANCE = 2.0  # where a config has none; the scale is an input, not the work


@dataclasses.dataclass(frozen=True)
class Work:
  """One run of a case.

  Attributes:
    kind: "decode", "tokenizer" or "train".
    batch: images.
    window, depth: of TensorAR; window 1 is the base model.
    guided: whether every image is decoded twice, with and without condition.
    tokens: of one image.
    flops: FLOPs of the matrix products of one run.
    bytes: the weights that have to be read, all steps together; 0 if the
      reading of weights is not what bounds it.
  """

  kind: str
  batch: int
  window: int = 1
  depth: int = 1
  guided: bool = False
  tokens: int = 1
  flops: int = 0
  bytes: int = 0

  @property
  def name(self) -> str:
    """As in `decode 2x8 k=4 depth 1`: 2 x 8 rows are 8 guided images."""
    rows = f"{2 if self.guided else 1}x{self.batch}"
    if self.kind == "tokenizer":
      return f"tokenizer {self.batch}"
    if self.kind == "train":
      rows = str(self.batch)
    depth = f" depth {self.depth}" if self.window > 1 else ""
    return f"{self.kind} {rows} k={self.window}{depth}"


@dataclasses.dataclass(frozen=True)
class Case:
  """Work for a program.

  `warm_up()` runs it for the first time and says {"seconds"}, and where it is
  known also {"compile_seconds"}, which are not among them. `time(repeats)` is
  {"seconds", "extra_bytes"} of so many more runs; see `machine.watched`.
  """

  work: Work
  program: str
  warm_up: Callable[[], dict[str, float]]
  time: Callable[[int], dict[str, float | None]]


def _case(work: Work, run: Callable[[], object]) -> Case:
  """A case of this process; `run` returns when all is computed."""

  def warm_up():
    with machine.compile_clock() as spent:
      first = machine.seconds(run)
    compiled = min(spent(), first)
    return {"seconds": first - compiled, "compile_seconds": compiled}

  return Case(work, OURS, warm_up, lambda count: machine.watched(run, count))


class Workloads:
  """The cases of one stage, on this process's devices by the stage's mesh."""

  def __init__(self, stage: Stage, workdir: pathlib.Path):
    self.stage = dataclasses.replace(stage, init=None)
    self.workdir = workdir
    self.mesh = sharding.local_mesh(stage.mesh)
    self.conditioning = build.conditioning(stage.conditioning)
    self.backbone = self._initial_model(self._with(1, 1)).backbone
    self._models: dict[tuple[int, int], TensorAR] = {}

  def _with(self, window: int, depth: int) -> Stage:
    own = self.stage.tensorar
    own = dataclasses.replace(own, window=window, depth=depth)
    return dataclasses.replace(self.stage, tensorar=own)

  def _initial_model(self, stage: Stage) -> TensorAR:
    model = initial_weights.initial_model(stage, self.workdir, self.mesh)
    assert isinstance(model, TensorAR)  # by the stage's objective
    return model

  def model(self, window: int, depth: int) -> TensorAR:
    """The wrapped model; all share the backbone's weights."""
    if (window, depth) not in self._models:
      options = dataclasses.asdict(self._with(window, depth).tensorar)
      rngs = nnx.Rngs(self.stage.seed)
      wrapped = TensorAR(self.backbone, **options, rngs=rngs)
      self._models[window, depth] = sharding.shard(wrapped, self.mesh)
    return self._models[window, depth]

  def rows(self, batch: int) -> Cond:
    """A random condition of so many rows, all of full length."""
    parts = sharding.row_parts(self.mesh)
    if batch % parts:
      raise ValueError(
        f"a batch of {batch} on a mesh of {dict(self.mesh.shape)}: expected a"
        f" multiple of {parts}. Change --batches, --train_batch or config.mesh."
      )
    rng, rows = np.random.default_rng(0), {}
    for name, one in self.conditioning.example().items():
      shape = (batch, *one.shape[1:])
      if one.dtype == bool:
        rows[name] = np.broadcast_to(one, shape)
      elif np.issubdtype(one.dtype, np.integer):  # the example has the highest
        rows[name] = rng.integers(one.max() + 1, size=shape, dtype=one.dtype)
      else:
        rows[name] = rng.standard_normal(shape, one.dtype)
    return rows

  def tokens(self, batch: int, model: TensorAR) -> Int32[np.ndarray, "B T F"]:
    """Random tokens: the gradients of an embedding then go to many rows."""
    rng, shape = np.random.default_rng(0), (batch, model.num_tokens)
    drawn = [rng.integers(size, size=shape) for size in model.vocab_sizes]
    return np.stack(drawn, axis=-1).astype(np.int32)

  def decode(self, batch: int, window: int, depth: int, guided: bool) -> Case:
    """The generation of a batch: prefill and all steps, one program."""
    model = self.model(window, depth)
    prepared = sampling.prepare(model, self.mesh)
    config = self.stage.sampling
    if guided != config.guided:
      scale = GUIDANCE if guided else 1.0
      config = dataclasses.replace(config, guidance=scale)
    cond = self.rows(batch)
    null = self.conditioning.null(cond) if guided else None
    cond, null, index = jax.device_put(
      (cond, null, np.arange(batch)), sharding.rows(self.mesh)
    )
    rng = jax.random.key(self.stage.seed)

    def run():
      out = sampling.generate(prepared, cond, null, rng, config, index)
      jax.block_until_ready(out.tokens)

    count, read = step_work(model, cond, guided)
    copies = self.mesh.size // self.mesh.shape["tensor"]
    size = (model.num_tokens, model.num_tokens * count)
    read *= model.num_tokens * copies
    return _case(Work("decode", batch, window, depth, guided, *size, read), run)

  def tokenizer(self, batch: int) -> Case:
    """Tokens to images, bytes on the host."""
    if not hasattr(self, "_tokenizer"):
      rngs = nnx.Rngs(self.stage.seed)
      fresh = build.component(self.stage.tokenizer, rngs)
      self._tokenizer = sharding.replicate(fresh, self.mesh)
    tokenizer = self._tokenizer
    shape = (batch, *_token_shape(tokenizer))
    tokens = jnp.zeros(shape, jnp.int32)
    work = Work(
      kind="tokenizer",
      batch=batch,
      tokens=shape[1],
      flops=flops.matmul_flops(tokenizer.decode, tokens),
    )
    return _case(work, lambda: batches.decode(tokenizer, tokens))

  def train(self, batch: int, window: int, depth: int) -> Case:
    """A training step of the stage, its dropout, noise and optimiser included.

    Only one such step may still have to be compiled; see `make_train_step`.
    """
    stage, mesh = self._with(window, depth), self.mesh
    # Its own weights: the step gives them away.
    model = self._initial_model(stage)
    task = loop.make_task(stage, self.workdir, model, images=False)
    tx, like = loop.make_layout(stage, model, mesh)
    averaged = like.ema is not None
    _, state = train_step.init_state(model, tx, stage.seed, averaged, mesh)
    step, count = loop.make_step(stage, model, task, tx, like)
    batch_ = {"tokens": self.tokens(batch, model), "cond": self.rows(batch)}
    batch_ = jax.device_put(batch_, sharding.rows(mesh))
    work = Work(
      kind="train",
      batch=batch,
      window=window,
      depth=depth,
      tokens=model.num_tokens,
      flops=count(state, task.context, batch_),
    )

    def run():
      nonlocal state
      with jax.set_mesh(mesh):
        state, _ = step(state, task.context, batch_)
      jax.block_until_ready(state)

    return _case(work, run)


def _token_shape(tokenizer) -> tuple[int, int]:
  rows, cols = tokenizer.grid
  return rows * cols, len(tokenizer.vocab_sizes)


def step_work(model: TensorAR, cond: dict, guided: bool) -> tuple[int, int]:
  """(FLOPs, bytes of weights) of one decoding step with these conditions."""
  graphdef, state = nnx.split(model)
  batch, k = jax.tree.leaves(cond)[0].shape[0], model.window
  both = lambda a: jnp.concatenate([a, a]) if guided else a

  def step(state, tokens, cache):
    model = nnx.merge(graphdef, state)
    valid = windows.valid_slots(jnp.asarray(0), k, model.num_tokens)
    h = both(model.encode_window(tokens, valid))
    hidden, _ = model.backbone.decode(h, cache)
    return model.logits(model.decode_window(hidden), both(tokens))

  rows = jax.tree.map(both, cond)
  _, cache = jax.eval_shape(model.backbone.prefill, rows)
  shape = (batch, k, len(model.vocab_sizes))
  args = (state, jax.ShapeDtypeStruct(shape, jnp.int32), cache)
  program = jax.make_jaxpr(step)(*args).jaxpr
  used = {id(v) for equation in program.eqns for v in equation.invars}
  tables = {p for p, m in nnx.iter_modules(model) if isinstance(m, nnx.Embed)}
  size = jnp.dtype(model.backbone.dtype).itemsize
  leaves = nnx.to_flat_state(state)
  read = sum(
    variable.get_value().size * min(size, variable.get_value().dtype.itemsize)
    for (path, variable), v in zip(leaves, program.invars)
    if id(v) in used and path[:-1] not in tables
  )
  return flops.matmul_flops(step, *args), read
