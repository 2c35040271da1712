"""The benchmark's cases: generation, the tokenizer's decoder, training steps.

Every case runs the same program as a user would, on the weights of the stage if
it has been trained and on fresh random ones if not. Only the parallel decoder's
speed depends on the weights. A case comes with the work that one run needs at
least, however it is programmed:

    decoding    bytes = steps x (weights that a step reads, in its dtype)
                FLOPs = steps x (products of a step on [cond | null] rows)
    tokenizer   FLOPs of the products and convolutions of its decoder
    training    FLOPs of the loss and its gradient; see `flops`

Embedding tables, of which a step reads only a few rows, and key/value rows are
not counted. The parallel decoder's work depends on its guesses; it has none.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Int32

from tensorar_jax.experiment import build, initial_weights
from tensorar_jax.experiment.schema import Stage
from tensorar_jax.generation import batches, guesses
from tensorar_jax.interfaces import Cond
from tensorar_jax.method import sampling, windows
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.nn import flops
from tensorar_jax.parallel import sharding
from tensorar_jax.performance import machine
from tensorar_jax.training import loop, train_step

OURS = "tensorar_jax"
GUIDANCE = 2.0  # for configs without guidance; its value does not change speed


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of one run of a case.

  Attributes:
    kind: "decode", "tokenizer" or "train".
    batch: batch size, in images.
    window: TensorAR's window size; 1 is the base model.
    depth: TensorAR's depth.
    guided: whether every image is decoded twice, with and without condition.
    rows: steps that the parallel decoder tries at once; 0: window decoder.
    tokens: tokens in an image.
    flops: FLOPs of the matrix products of one run.
    bytes: bytes of weights that all steps together must read; 0 for work that
      is not bound by reading weights.
  """

  kind: str
  batch: int
  window: int = 1
  depth: int = 1
  guided: bool = False
  rows: int = 0
  tokens: int = 1
  flops: int = 0
  bytes: int = 0

  @property
  def name(self) -> str:
    """A name such as `decode 2x8 k=4 depth 1`; 2x8 means 8 guided images."""
    rows = f"{2 if self.guided else 1}x{self.batch}"
    if self.kind == "tokenizer":
      return f"tokenizer {self.batch}"
    if self.kind == "train":
      rows = str(self.batch)
    depth = f" depth {self.depth}" if self.window > 1 else ""
    at_once = f" m={self.rows}" if self.rows else ""
    return f"{self.kind} {rows} k={self.window}{depth}{at_once}"


@dataclasses.dataclass(frozen=True)
class Case:
  """Work and the program that does it.

  Attributes:
    work: the work of one run.
    program: the program's name.
    warm_up: runs it for the first time and returns {"seconds"}; where compile
      time is known, "compile_seconds" is separate from these. The parallel
      decoder adds "steps", see `steps_of`.
    time: runs it a given number of times; {"seconds", "extra_bytes"} as in
      `machine.watched`.
  """

  work: Work
  program: str
  warm_up: Callable[[], dict[str, Any]]
  time: Callable[[int], dict[str, float | None]]


def _case(work: Work, run: Callable[[], object]) -> Case:
  """Makes a case of this process; `run` must wait for its results."""

  def warm_up():
    with machine.compile_clock() as spent:
      first = machine.seconds(run)
    compiled = min(spent(), first)
    return {"seconds": first - compiled, "compile_seconds": compiled}

  return Case(work, OURS, warm_up, lambda count: machine.watched(run, count))


def steps_of(steps: Int[Array | np.ndarray, "B T"]) -> dict[str, Any]:
  """Summarises how many backbone steps images took, of `Samples.steps`.

  Returns:
    {"mean", "min", "max"} over the images, and {"commits": a list}, how many
    steps after the first committed 1, 2, ... tokens.
  """
  steps = np.asarray(steps)
  taken = steps.max(axis=1) + 1
  commits = [np.unique(row[row > 0], return_counts=True)[1] for row in steps]
  counts = np.bincount(np.concatenate(commits))[1:]
  return {
    "mean": float(taken.mean()),
    "min": int(taken.min()),
    "max": int(taken.max()),
    "commits": counts.tolist(),
  }


class Workloads:
  """Builds the cases of one stage, on this process's devices in its mesh.

  `checkpoint` has its trained weights; None takes fresh ones.
  """

  def __init__(
    self,
    stage: Stage,
    workdir: pathlib.Path,
    checkpoint: pathlib.Path | None = None,
  ):
    self.stage = dataclasses.replace(stage, init=None)
    self.workdir, self.checkpoint = workdir, checkpoint
    self.mesh = sharding.local_mesh(stage.mesh)
    self.conditioning = build.conditioning(stage.conditioning)
    self._models: dict[tuple[int, int], TensorAR] = {}
    self.marginals = None
    if checkpoint is None:
      self.backbone = self._initial_model(self._with(1, 1)).backbone
    else:
      self.marginals = guesses.load(checkpoint.parents[1], stage.sampling)
      trained = build.load_tensorar(stage, checkpoint, self.mesh)
      self.backbone = trained.backbone
      options = stage.tensorar
      self._models[trained.window, options.depth] = trained

  def _with(self, window: int, depth: int) -> Stage:
    options = dataclasses.replace(
      self.stage.tensorar, window=window, depth=depth
    )
    return dataclasses.replace(self.stage, tensorar=options)

  def _initial_model(self, stage: Stage) -> TensorAR:
    model = initial_weights.initial_model(stage, self.workdir, self.mesh)
    assert isinstance(model, TensorAR)  # the stage's objective is TensorAR
    return model

  def model(self, window: int, depth: int) -> TensorAR:
    """Returns the wrapped model; all of them share the backbone's weights."""
    if (window, depth) not in self._models:
      options = dataclasses.asdict(self._with(window, depth).tensorar)
      rngs = nnx.Rngs(self.stage.seed)
      wrapped = TensorAR(self.backbone, **options, rngs=rngs)
      self._models[window, depth] = sharding.shard(wrapped, self.mesh)
    return self._models[window, depth]

  def rows(self, batch: int) -> Cond:
    """Draws a random condition of `batch` rows, all of full length."""
    parts = sharding.row_parts(self.mesh)
    if batch % parts:
      raise ValueError(
        f"a batch of {batch} on a mesh of {dict(self.mesh.shape)}: expected a"
        f" multiple of {parts}. Change --batches, --train_batch or config.mesh."
      )
    rng, rows = np.random.default_rng(0), {}
    for name, row in self.conditioning.example().items():
      shape = (batch, *row.shape[1:])
      if row.dtype == bool:
        rows[name] = np.broadcast_to(row, shape)
      elif np.issubdtype(row.dtype, np.integer):  # the example is the maximum
        rows[name] = rng.integers(row.max() + 1, size=shape, dtype=row.dtype)
      else:
        rows[name] = rng.standard_normal(shape, row.dtype)
    return rows

  def tokens(self, batch: int, model: TensorAR) -> Int32[np.ndarray, "B T F"]:
    """Draws random tokens, so that embedding gradients reach many rows."""
    rng, shape = np.random.default_rng(0), (batch, model.num_tokens)
    drawn = [rng.integers(size, size=shape) for size in model.vocab_sizes]
    return np.stack(drawn, axis=-1).astype(np.int32)

  def decode(
    self, batch: int, window: int, depth: int, guided: bool, rows: int = 0
  ) -> Case:
    """Makes a case that generates a batch: prefill and steps in one program.

    With `rows`, by the parallel decoder, which draws by Gumbel noise.
    """
    model = self.model(window, depth)
    prepared = sampling.prepare(model, self.mesh)
    config = self.stage.sampling
    if guided != config.guided:
      scale = GUIDANCE if guided else 1.0
      config = dataclasses.replace(config, guidance=scale)
    config = dataclasses.replace(config, decoder="window")
    if rows:
      config = dataclasses.replace(
        config, draw="gumbel", decoder="parallel", rows=rows
      )
    marginals = self.marginals if rows else None
    cond = self.rows(batch)
    null = self.conditioning.null(cond) if guided else None
    cond, null, index = jax.device_put(
      (cond, null, np.arange(batch)), sharding.rows(self.mesh)
    )
    rng = jax.random.key(self.stage.seed)

    def generate():
      out = sampling.generate(
        prepared, cond, null, rng, config, index, marginals
      )
      return jax.block_until_ready(out)

    work = Work(
      kind="decode",
      batch=batch,
      window=window,
      depth=depth,
      guided=guided,
      rows=rows,
      tokens=model.num_tokens,
    )
    if rows:
      case = _case(work, generate)

      def warm_up():
        return {**case.warm_up(), "steps": steps_of(generate().steps)}

      return dataclasses.replace(case, warm_up=warm_up)
    count, read = step_work(model, cond, guided)
    copies = self.mesh.size // self.mesh.shape["tensor"]
    work = dataclasses.replace(
      work,
      flops=model.num_tokens * count,
      bytes=model.num_tokens * copies * read,
    )
    return _case(work, generate)

  def tokenizer(self, batch: int) -> Case:
    """Makes a case that decodes tokens to images, as bytes on the host."""
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
    """Makes a case of a training step, with dropout, noise and optimiser.

    Compile one such step before building the next.
    """
    stage, mesh = self._with(window, depth), self.mesh
    # The step donates its weights, so it needs a model of its own.
    model = self._initial_model(stage)
    task = loop.make_task(stage, self.workdir, model, images=False)
    tx, layout = loop.make_layout(stage, model, mesh)
    averaged = layout.ema is not None
    _, state = train_step.init_state(
      model, tx, stage.seed, averaged, mesh, copy=False
    )
    step, count = loop.make_step(stage, model, task, tx, layout)
    inputs = {"tokens": self.tokens(batch, model), "cond": self.rows(batch)}
    inputs = jax.device_put(inputs, sharding.rows(mesh))
    work = Work(
      kind="train",
      batch=batch,
      window=window,
      depth=depth,
      tokens=model.num_tokens,
      flops=count(state, task.context, inputs),
    )

    def run():
      nonlocal state
      with jax.set_mesh(mesh):
        state, _ = step(state, task.context, inputs)
      jax.block_until_ready(state)

    return _case(work, run)


def _token_shape(tokenizer) -> tuple[int, int]:
  rows, cols = tokenizer.grid
  return rows * cols, len(tokenizer.vocab_sizes)


def step_work(model: TensorAR, cond: dict, guided: bool) -> tuple[int, int]:
  """Returns (FLOPs, bytes of weights) of one decoding step for `cond`."""
  graphdef, state = nnx.split(model)
  batch, k = jax.tree.leaves(cond)[0].shape[0], model.window
  both = lambda a: jnp.concatenate([a, a]) if guided else a

  def step(state, tokens, cache):
    model = nnx.merge(graphdef, state)
    valid = windows.valid_slots(jnp.asarray(0), k, model.num_tokens)
    h = both(model.encode_window(tokens, valid))
    hidden, _ = model.backbone.decode(h[:, None], cache)
    return model.logits(model.decode_window(hidden[:, 0]), both(tokens))

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
