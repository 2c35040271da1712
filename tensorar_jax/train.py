"""The one train loop: anything with a loss, deterministic and resumable.

A step is a pure function of (state, batch); the key of step n is derived from
the run's key and n; the data order from (seed, position). So a run that was
killed and continues computes the same numbers, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu import parameter_overview
from flax import nnx
from jaxtyping import Array

from tensorar_jax import (
  build,
  layers,
  metrics,
  objective,
  optim,
  processes,
  published,
  sharding,
  throughput,
  train_step,
  weights,
)
from tensorar_jax.checkpoints import orbax_io, torch_import
from tensorar_jax.data import codes, pipeline, sources
from tensorar_jax.interfaces import Batch
from tensorar_jax.noising import NoiseConfig
from tensorar_jax.sampling import SamplingConfig

# Keys of the `train` section that change what is written, not what is learned.
# (`accumulate` changes which noise is drawn, `remat` the last digits.)
FREE_KEYS = tuple(
  f"train.{key}"
  for key in ("log_every", "checkpoint_every", "keep", "accumulate", "remat")
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How long, how much at once, and how often to write.

  Attributes:
    batch_size: images of a step, over all devices.
    accumulate: parts of a batch that run one after another, in less memory.
    remat: what of the activations the backward pass computes again: "none" of
      them, all but the products with weights ("dots"), or "full", all.
  """

  batch_size: int = 256
  num_steps: int = 1000
  log_every: int = 50
  checkpoint_every: int = 500
  keep: int = 2
  accumulate: int = 1
  remat: str = "none"

  def __post_init__(self):
    if self.remat not in layers.REMAT:
      raise ValueError(
        f"train.remat={self.remat!r}: choose one of {tuple(layers.REMAT)}."
      )
    if self.batch_size % max(self.accumulate, 1):
      raise ValueError(
        f"train.batch_size={self.batch_size} is no multiple of"
        f" accumulate={self.accumulate}: a batch has equal parts."
      )
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, int) and value < 1:
        raise ValueError(f"train.{field.name}={value}: expected at least 1.")
    if self.checkpoint_every % self.log_every:
      raise ValueError(
        f"train.checkpoint_every={self.checkpoint_every} is no multiple of"
        f" log_every={self.log_every}: a resumed run could not repeat the row"
        " of the log that the checkpoint cuts in two."
      )


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


def to_float(images: Array) -> Array:
  """uint8 images as float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def make_task(
  stage: Mapping, workdir: pathlib.Path, model: nnx.Module, *, images: bool
) -> Task:
  """The task of a stage's objective on batches of images, or of tokens."""
  if stage["objective"] != "tensorar":
    # Tokenizers and classifiers are `Trainable`: they carry their own loss.
    def own_loss(model, context, batch, rng, step):
      return model.loss(batch, rng)

    return Task(own_loss, None, lambda batch: batch, 1)
  tokenizer = build.frozen_tokenizer(stage, workdir) if images else None
  conditioning = build.conditioning(stage["conditioning"])
  noise = build.call(NoiseConfig, stage["noise"], "noise")
  config = build.call(objective.LossConfig, stage["loss"], "loss")

  def loss(model, tokenizer, batch, rng, step):
    rng_drop, rng_order, rng = jax.random.split(rng, 3)
    tokens = batch.get("tokens")
    if tokens is None:
      tokens = tokenizer.encode(to_float(batch["image"]))
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
    return {**read, "cond": conditioning.from_batch(batch)}

  return Task(loss, tokenizer, prepare, model.num_tokens)


def check(stage: Mapping) -> None:
  """Raises ValueError if anything in a stage's config cannot be built.

  No array is made: an error in the last stage should show in the first second.
  """
  build.training_config(stage)
  torch_import.check_dtype(stage["source_dtype"])
  if not stage["source"]:
    config = build.call(TrainConfig, stage["train"], "train")
    optimiser = build.call(optim.OptimConfig, stage["optim"], "optim")
    optim.make(optimiser, config.num_steps)
  model = weights.abstract(lambda rngs: build.model(stage, rngs))
  if stage["objective"] != "tensorar":
    return
  tokenizer = build.abstract("tokenizers", stage["tokenizer"])
  rows, cols = tokenizer.grid
  made = (rows * cols, tuple(tokenizer.vocab_sizes))
  read = (model.num_tokens, tuple(model.vocab_sizes))
  if made != read:
    raise ValueError(
      f"the tokenizer makes {made[0]} tokens of vocabulary {made[1]}, the"
      f" backbone reads {read[0]} of {read[1]}: change one of the sections."
    )
  conditioning = build.conditioning(stage["conditioning"])
  noise = build.call(NoiseConfig, stage["noise"], "noise")
  loss = build.call(objective.LossConfig, stage["loss"], "loss")
  objective.slot_weights(model.window, noise, loss)
  sampling = build.call(SamplingConfig, stage.get("sampling", {}), "sampling")
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


def is_done(folder: pathlib.Path, num_steps: int) -> bool:
  """Whether the stage's last checkpoint is there."""
  steps = [p.name for p in (folder / "checkpoints").glob("*")]
  return str(num_steps) in steps


def fit(
  stage: Mapping, folder: pathlib.Path, profile: throughput.Steps | None = None
) -> None:
  """Trains a stage in `folder`, from its newest checkpoint if there is one.

  Args:
    stage: a full stage config, of `build.stages`.
    folder: `<workdir>/<stage name>`.
    profile: the steps of this start to trace into `<folder>/profile`.

  Raises:
    ValueError: the folder is another config's; the loss is not finite.
  """
  if stage["source"]:
    published.import_stage(stage, folder)
    return
  config = build.call(TrainConfig, stage["train"], "train")
  saved_config = build.training_config(stage)
  orbax_io.claim(folder, saved_config, FREE_KEYS)
  lineage = build.lineage(stage, folder.parent)
  _check_lineage(folder, lineage)
  if is_done(folder, config.num_steps):
    logging.info("%s: done, %d steps", folder.name, config.num_steps)
    return
  mesh = sharding.make_mesh(build.mesh_config(stage))
  sharding.check_batch(mesh, config.batch_size, config.accumulate)
  optimiser = build.call(optim.OptimConfig, stage["optim"], "optim")
  tx, ema = optim.make(optimiser, config.num_steps), optimiser.ema_decay > 0
  model = weights.abstract(lambda rngs: build.model(stage, rngs))
  task, data = _task_and_data(stage, folder.parent, model, config, mesh)
  like = train_step.state_layout(model, tx, ema, mesh)
  checkpoints = orbax_io.Checkpoints(folder / "checkpoints", config.keep)
  before = 0.0
  if checkpoints.latest_step() is None:
    model = build.initial_model(stage, folder.parent, mesh)
    _, state = train_step.init_state(model, tx, stage["seed"], ema, mesh)
  else:
    state, position, meta = checkpoints.restore(like)
    data.set_state(position)
    before = meta["seconds"]
    logging.info("%s: continues from step %d", folder.name, state.step)
  _log_sizes(folder.name, state, mesh)
  step, flops = _step_and_flops(model, task, tx, optimiser, like, config)
  meter = throughput.Meter(folder, step, flops, profile)
  started = time.monotonic()

  def save(state):
    seconds = before + time.monotonic() - started
    meta = {"config": saved_config, "lineage": lineage, "seconds": seconds}
    checkpoints.save(int(state.step), state, data.get_state(), meta)

  try:
    with jax.set_mesh(mesh):
      _loop(state, data, task, meter, config, folder, save)
  finally:
    meter.close()
    checkpoints.close()
  processes.wait_for_all(folder.name)


def _step_and_flops(model, task, tx, optimiser, like, config):
  """The jitted step, and what counts its model FLOPs, of the same arguments."""
  layers.set_remat(model, config.remat)
  skeleton, _, _ = weights.split(model)
  settings = optimiser.ema_decay, like, config.accumulate
  return (
    train_step.make_train_step(skeleton, task.loss, tx, *settings),
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


def _task_and_data(stage, workdir, model, config, mesh):
  """What to train on, and the endless iterator over this process's part."""
  section = stage["data"]
  source = sources.load(
    section["name"], section["train_split"], data_dir=section.get("data_dir")
  )
  tokens = isinstance(source, codes.TokenSource)
  if tokens:
    source = codes.expect(
      source,
      num_tokens=model.num_tokens,
      vocab_sizes=model.vocab_sizes,
      num_classes=stage["conditioning"].get("num_classes"),
    )
  share = sharding.share(mesh)
  data = pipeline.train_iterator(
    source,
    batch_size=config.batch_size,
    seed=stage["seed"],
    flip=section.get("flip", False),
    share=share,
  )
  task = make_task(stage, workdir, model, images=not tokens)

  def prepare(batch):
    return sharding.global_batch(task.prepare(batch), mesh, share)

  context = sharding.replicate(task.context, mesh)
  return dataclasses.replace(task, context=context, prepare=prepare), data


def _check_lineage(folder: pathlib.Path, lineage: dict[str, str]) -> None:
  """Refuses to go on from weights whose parents have been trained again."""
  if not any((folder / "checkpoints").glob("[0-9]*")):
    return
  before = orbax_io.read_meta(orbax_io.find(folder)).get("lineage")
  if before != lineage:
    raise ValueError(
      f"{folder} was trained from other weights than its parents now have:"
      f" {before} then, {lineage} now. Move the folder away to train it again."
    )


def _loop(state, data, task, meter, config, folder, save):
  """Steps, rows of the log, and checkpoints until `num_steps`."""
  log = metrics.train_log(folder, config.num_steps, processes.is_first())
  start, images = int(state.step), config.batch_size
  log.resume(start)
  pending = []  # the metrics of each step since the last row, on the device
  try:
    for step in range(start + 1, config.num_steps + 1):
      batch = meter.fetch(lambda: task.prepare(next(data)))
      state, scalars = meter.step(state, task.context, batch)
      pending.append(scalars)
      last = step == config.num_steps
      if step % config.log_every == 0 or last:
        row = _interval_means(pending, step, folder)
        log.write(step, row, meter.read(images, images * task.tokens))
        pending = []
      if step % config.checkpoint_every == 0 or last:
        save(state)
  finally:
    log.close()


def _interval_means(pending, step, folder) -> dict[str, float]:
  """Means over the steps since the last row; refuses a loss gone bad."""
  pending = jax.device_get(pending)
  for offset, scalars in enumerate(pending):
    if not np.isfinite([scalars["loss"], scalars["grad_norm"]]).all():
      bad = step - len(pending) + 1 + offset
      raise ValueError(
        f"{folder.name}: the loss of step {bad} is {scalars['loss']}, its"
        f" gradient's norm {scalars['grad_norm']}; expected finite numbers."
        " Nothing was saved since the last checkpoint in"
        f" {folder / 'checkpoints'}. Lower optim.learning_rate or"
        " optim.clip_norm, or look at the data of that step."
      )
  return {
    name: float(np.mean([scalars[name] for scalars in pending], dtype=float))
    for name in pending[0]
  }
