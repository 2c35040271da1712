"""The one train loop: anything with a loss, deterministic and resumable.

A step is a pure function of (state, batch); the key of step n is derived from
the run's key and n; the data order from (seed, position). So a run that was
killed and continues computes the same numbers, bit for bit. SIGTERM asks it to
save and stop; see `preemption`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from clu import parameter_overview
from flax import nnx
from jax.sharding import Mesh

from tensorar_jax.checkpoints import orbax_io, torch_import
from tensorar_jax.data import codes, pipeline, sources
from tensorar_jax.experiment import build, published, saved
from tensorar_jax.experiment.schema import Stage
from tensorar_jax.interfaces import Batch
from tensorar_jax.method import objective
from tensorar_jax.nn import layers
from tensorar_jax.nn.image_bytes import from_uint8
from tensorar_jax.parallel import preemption, processes, sharding, weights
from tensorar_jax.training import logs, optimizer, throughput, train_step


@dataclasses.dataclass(frozen=True)
class Task:
  """What a stage trains on.

  `loss(model, context, batch, rng, step) -> (loss, metrics)`; `context` are
  frozen modules that it reads (the tokenizer); `prepare` makes its batch from
  the pipeline's; `tokens` is the number of predictions in one image.
  """

  loss: Callable
  context: Any
  prepare: Callable[[Batch], dict]
  tokens: int


def make_task(
  stage: Stage, workdir: pathlib.Path, model: nnx.Module, *, images: bool
) -> Task:
  """The task of a stage's objective on batches of images, or of tokens."""
  if stage.objective != "tensorar":
    # Tokenizers and classifiers are `Trainable`: they carry their own loss.
    def own_loss(model, context, batch, rng, step):
      return model.loss(batch, rng)

    def images_only(batch):  # no device holds a caption
      return {n: value for n, value in batch.items() if n != "caption"}

    return Task(own_loss, None, images_only, 1)
  tokenizer = build.frozen_tokenizer(stage, workdir) if images else None
  conditioning = build.conditioning(stage.conditioning)
  encode = None  # what has tokens on disk has features there, too
  if images and conditioning.is_text:
    encode = build.text_encoder(stage.conditioning)
  noise, config = stage.noise, stage.loss

  def loss(model, tokenizer, batch, rng, step):
    rng_drop, rng_order, rng = jax.random.split(rng, 3)
    tokens = batch.get("tokens")
    if tokens is None:
      tokens = tokenizer.encode(from_uint8(batch["image"]))
    tokens = jax.lax.stop_gradient(tokens)
    cond = batch["cond"]
    cond = conditioning.drop(rng_drop, cond, config.condition_dropout)
    if config.random_order:
      rate = objective.random_rate(config, step)
      order = objective.draw_order(rng_order, tokens.shape[:2], rate)
      tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
      cond = {**cond, "order": order}
    return objective.tensorar_loss(model, cond, tokens, rng, noise, config)

  def prepare(batch):
    read = {name: batch[name] for name in ("image", "tokens") if name in batch}
    if encode and "caption" in batch:
      text, mask = encode(batch["caption"].tolist())
      batch = {**batch, "text": text, "text_mask": mask}
    return {**read, "cond": conditioning.from_batch(batch)}

  return Task(loss, tokenizer, prepare, model.num_tokens)


def check(stage: Stage) -> None:
  """Raises ValueError if anything that a stage needs cannot be built.

  No array is made: an error in the last stage should show in the first second.
  """
  saved.saved_config(stage)
  torch_import.check_dtype(stage.source_dtype)
  model = weights.abstract(lambda rngs: build.model(stage, rngs))
  if stage.objective != "tensorar":
    return
  tokenizer = build.abstract(stage.tokenizer)
  rows, cols = tokenizer.grid
  made = (rows * cols, tuple(tokenizer.vocab_sizes))
  read = (model.num_tokens, tuple(model.vocab_sizes))
  if made != read:
    raise ValueError(
      f"the tokenizer makes {made[0]} tokens of vocabulary {made[1]}, the"
      f" backbone reads {read[0]} of {read[1]}: change one of the sections."
    )
  conditioning = build.conditioning(stage.conditioning)
  loss, sampling = stage.loss, stage.sampling
  objective.slot_weights(model.window, stage.noise, loss)
  sampling.check(len(model.vocab_sizes))
  cond = conditioning.example()
  if loss.condition_dropout > 0 or sampling.guided:
    cond = conditioning.null(cond)
  if loss.random_order:
    if model.window > 1:
      raise ValueError(
        f"random_order={loss.random_order} with window={model.window}: windows"
        " are of neighbours in raster order. Set loss.random_order=None."
      )
    cond["order"] = np.arange(model.num_tokens)[None]
  model.backbone.check(cond)


def fit(
  stage: Stage, folder: pathlib.Path, profile: throughput.Steps | None = None
) -> None:
  """Trains a stage in `folder`, from its newest checkpoint if there is one.

  Args:
    stage: of an experiment.
    folder: `<workdir>/<stage name>`.
    profile: the steps of this start to trace into `<folder>/profile`.

  Raises:
    ValueError: the folder is another config's; the loss is not finite.
    SystemExit: of `preemption.EXIT_CODE`, after SIGTERM.
  """
  if stage.source:
    published.import_stage(stage, folder)
    return
  config = stage.train
  saved_config = saved.claim(folder, stage)
  lineage = _lineage(stage, folder)
  mesh = sharding.make_mesh(stage.mesh)
  sharding.check_batch(mesh, config.batch_size, config.accumulate)
  model = weights.abstract(lambda rngs: build.model(stage, rngs))
  tx, like = make_layout(stage, model, mesh)
  checkpoints = orbax_io.Checkpoints(
    folder / "checkpoints", config.keep, config.keep_every
  )
  found = checkpoints.restore(like)
  if found and found[0].step == config.num_steps:
    checkpoints.close()
    logging.info("%s: done, %d steps", folder.name, config.num_steps)
    return
  task, data = _task_and_data(stage, folder, model, mesh)
  if found:
    state, position, meta = found
    data.set_state(position)
    logging.info("%s: continues from step %d", folder.name, state.step)
  else:
    model = build.initial_model(stage, folder.parent, mesh)
    averaged = like.ema is not None
    _, state = train_step.init_state(model, tx, stage.seed, averaged, mesh)
    meta = {"seconds": 0.0, "pending": []}
  _log_sizes(folder.name, state, mesh)
  step, flops = make_step(stage, model, task, tx, like)
  dtype = model.backbone.dtype if hasattr(model, "backbone") else "float32"
  meter = throughput.Meter(folder, step, flops, profile, dtype)
  started = time.monotonic() - meta["seconds"]

  def save(state, pending):
    meta = {"config": saved_config, "lineage": lineage, "pending": pending}
    meta["seconds"] = time.monotonic() - started
    checkpoints.save(int(state.step), state, data.get_state(), meta)

  start = state, meta["pending"]
  with preemption.watch(folder.name) as asked:
    closing = contextlib.closing
    with closing(checkpoints), closing(meter), jax.set_mesh(mesh):
      _loop(start, data, task, meter, config, folder, save, asked)
    processes.wait_for_all(folder.name)


def make_layout(
  stage: Stage, model: nnx.Module, mesh: Mesh
) -> tuple[optax.GradientTransformation, train_step.TrainState]:
  """(optimiser, layout of the state) of a stage's training.

  The model may be abstract, and the mesh of devices that are not there.
  """
  tx = optimizer.make(stage.optim, stage.train.num_steps)
  averaged = stage.optim.ema_decay > 0
  return tx, train_step.state_layout(model, tx, averaged, mesh)


def make_step(
  stage: Stage, model: nnx.Module, task: Task, tx, like
) -> tuple[Callable, Callable]:
  """(jitted step, its model FLOPs at the same arguments); see `make_layout`."""
  layers.set_remat(model, stage.train.remat)
  skeleton, _, _ = weights.split(model)
  decay, accumulate = stage.optim.ema_decay, stage.train.accumulate
  return (
    train_step.make_train_step(
      skeleton, task.loss, tx, decay, like, accumulate
    ),
    functools.partial(train_step.model_flops, skeleton, task.loss),
  )


def _log_sizes(name, state, mesh):
  """How large the model is, and what of the state a device has."""
  count = parameter_overview.count_parameters(state.params)
  here, total = sharding.bytes_of(state)
  logging.info("%s: %s parameters", name, f"{count:,}")
  logging.info(
    "%s: mesh %s; a device holds %.4g of the state's %.4g MB",
    *(name, dict(mesh.shape), here / 1e6, total / 1e6),
  )


def _task_and_data(
  stage: Stage, folder: pathlib.Path, model: nnx.Module, mesh: Mesh
):
  """What to train on, and the endless iterator over this process's part."""
  read = stage.data
  source = sources.load(read.name, read.train_split, data_dir=read.data_dir)
  tokens = isinstance(source, codes.TokenSource)
  if tokens:
    reads = build.conditioning(stage.conditioning)
    source = codes.expect(
      source,
      num_tokens=model.num_tokens,
      vocab_sizes=model.vocab_sizes,
      num_classes=getattr(reads, "num_classes", None),
      text=(reads.width, reads.length) if reads.is_text else None,
    )
  share = sharding.share(mesh)
  data = pipeline.train_iterator(
    source,
    batch_size=stage.train.batch_size,
    seed=stage.seed,
    flip=read.flip,
    share=share,
  )
  task = make_task(stage, folder.parent, model, images=not tokens)

  def prepare(batch):
    return sharding.global_batch(task.prepare(batch), mesh, share)

  context = sharding.replicate(task.context, mesh)
  return dataclasses.replace(task, context=context, prepare=prepare), data


def _lineage(stage: Stage, folder: pathlib.Path) -> dict[str, str]:
  """The ids of the parents' weights; refuses others than it went on from."""
  lineage = saved.lineage(stage, folder.parent)
  if not orbax_io.steps(folder / "checkpoints"):
    return lineage
  before = orbax_io.run_meta(folder).get("lineage")
  if before != lineage:
    raise ValueError(
      f"{folder} was trained from other weights than its parents now have:"
      f" {before} then, {lineage} now. Move the folder away to train it again."
    )
  return lineage


def _loop(start, data, task, meter, config, folder, save, asked):
  """Steps, rows and checkpoints until `num_steps`, or until `asked` to stop.

  `start` is (state, the metrics of each step since the last row of the log).
  """
  log = logs.train_log(folder, config.num_steps, processes.is_first())
  state, pending = start
  first, images = int(state.step), config.batch_size
  log.resume(first)
  try:
    for step in range(first + 1, config.num_steps + 1):
      batch = meter.fetch(lambda: task.prepare(next(data)))
      state, scalars = meter.step(state, task.context, batch)
      # Were the devices given more at once, a save would have to wait for it.
      jax.block_until_ready(pending[-1:])
      pending.append(scalars)
      last, stop = step == config.num_steps, asked()
      if step % config.log_every == 0 or last:
        row = logs.means(logs.floats(pending, step, folder))
        log.write(step, row, meter.read(images, images * task.tokens))
        pending = []
      if step % config.checkpoint_every == 0 or last or stop:
        save(state, logs.floats(pending, step, folder))
      if stop:
        break
  finally:
    log.close()
