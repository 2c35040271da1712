"""The one training loop: for anything with a loss, deterministic and resumable.

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

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from clu import parameter_overview
from flax import nnx
from jax.sharding import Mesh

from tensorar_jax.checkpoints import files, orbax_io, resumable, torch_import
from tensorar_jax.conditioning.conditions import TextConditioning
from tensorar_jax.data import codes, fingerprints, pipeline, sources
from tensorar_jax.experiment import build, initial_weights, published, saved
from tensorar_jax.experiment.schema import Stage, TrainConfig
from tensorar_jax.interfaces import Batch, Tokenizer
from tensorar_jax.method import objective
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.nn import layers
from tensorar_jax.nn.image_bytes import from_uint8
from tensorar_jax.parallel import preemption, processes, sharding, weights
from tensorar_jax.training import logs, optimizer, throughput, train_step


@dataclasses.dataclass(frozen=True)
class Task:
  """What a stage trains on.

  Attributes:
    loss: (model, context, batch, rng, step) -> (loss, metrics).
    context: frozen modules that the loss reads, such as the tokenizer.
    prepare: makes the loss's batch from the pipeline's.
    tokens: predictions in one image.
  """

  loss: Callable
  context: Any
  prepare: Callable[[Batch], dict]
  tokens: int


@dataclasses.dataclass
class Training:
  """A stage's training under way: what its steps need, and how far it is.

  Attributes:
    folder: of the stage.
    config: when to stop, to log and to save.
    mesh: that its arrays are split over.
    task: what it trains on.
    data: endless iterator over this process's part of the batches.
    meter: runs the steps and times them.
    checkpoints: where it saves.
    origin: what every checkpoint says of it: its config, its parents' ids, a
      digest of its data.
    began: `time.monotonic()` at its start, had it never been interrupted.
    state: after the newest step.
    pending: metrics of each step since the last row of the log.
  """

  folder: pathlib.Path
  config: TrainConfig
  mesh: Mesh
  task: Task
  data: grain.DatasetIterator
  meter: throughput.Meter
  checkpoints: orbax_io.Checkpoints
  origin: dict
  began: float
  state: train_step.TrainState
  pending: list[dict]

  def run(self, stop_asked: Callable[[], bool]) -> None:
    """Steps, logs and saves until `num_steps`, or until asked to stop."""
    config, images = self.config, self.config.batch_size
    log = logs.train_log(self.folder, config.num_steps, processes.is_first())
    first = int(self.state.step)
    log.resume(first)
    try:
      for step in range(first + 1, config.num_steps + 1):
        self._take_step()
        last, stop = step == config.num_steps, stop_asked()
        if step % config.log_every == 0 or last:
          row = logs.means(logs.floats(self.pending, step, self.folder))
          speeds = self.meter.read(images, images * self.task.tokens)
          log.write(step, row, speeds)
          self.pending = []
        if step % config.checkpoint_every == 0 or last or stop:
          self._save(step)
        if stop:
          break
    finally:
      log.close()

  def _take_step(self) -> None:
    batch = self.meter.fetch(lambda: self.task.prepare(next(self.data)))
    self.state, scalars = self.meter.step(self.state, self.task.context, batch)
    # Were the devices given more at once, a save would have to wait for it.
    jax.block_until_ready(self.pending[-1:])
    self.pending.append(scalars)

  def _save(self, step: int) -> None:
    meta = {
      **self.origin,
      "pending": logs.floats(self.pending, step, self.folder),
      "seconds": time.monotonic() - self.began,
    }
    self.checkpoints.save(step, self.state, self.data.get_state(), meta)


def make_task(
  stage: Stage, workdir: pathlib.Path, model: nnx.Module, *, images: bool
) -> Task:
  """Makes the task of a stage's objective, on batches of images or tokens."""
  if not isinstance(model, TensorAR):
    # Tokenizers and classifiers are `Trainable`: they carry their own loss.
    def own_loss(model, context, batch, rng, step):
      return model.loss(batch, rng)

    def without_captions(batch):  # no device holds one
      return {name: a for name, a in batch.items() if name != "caption"}

    return Task(loss=own_loss, context=None, prepare=without_captions, tokens=1)
  tokenizer = build.frozen_tokenizer(stage, workdir) if images else None
  conditioning = build.conditioning(stage.conditioning)
  encode_text = None  # data that has tokens on disk has features there, too
  if images and conditioning.is_text:
    encode_text = build.text_encoder(stage.conditioning)
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
    inputs = {n: batch[n] for n in ("image", "tokens") if n in batch}
    if encode_text and "caption" in batch:
      text, mask = encode_text(batch["caption"].tolist())
      batch = {**batch, "text": text, "text_mask": mask}
    return {**inputs, "cond": conditioning.from_batch(batch)}

  return Task(
    loss=loss, context=tokenizer, prepare=prepare, tokens=model.num_tokens
  )


def check(stage: Stage) -> None:
  """Raises ValueError if anything that a stage needs cannot be built.

  No array is made: an error in the last stage should show in the first second.
  """
  saved.saved_config(stage)
  torch_import.check_dtype(stage.source_dtype)
  model = build.abstract_model(stage)
  if not isinstance(model, TensorAR):
    return
  tokenizer: Tokenizer = build.abstract(stage.tokenizer)
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
    stage: of an experiment; one with a `source` is imported instead.
    folder: `<workdir>/<stage name>`.
    profile: the steps of this start to trace into `<folder>/profile`.

  Raises:
    ValueError: another run trains there; the folder is another config's; the
      loss is not finite.
    SystemExit: of `preemption.EXIT_CODE`, after SIGTERM.
  """
  worker = resumable.Worker.of_this_process()
  with resumable.holding(folder, worker, name="train.lock"):
    files.remove_leftovers(folder.iterdir())
    _fit(stage, folder, profile)


def _fit(
  stage: Stage, folder: pathlib.Path, profile: throughput.Steps | None
) -> None:
  """Trains or imports a stage whose folder this run holds."""
  if stage.source:
    published.import_stage(stage, folder)
    return
  training = _prepare(stage, folder, profile)
  if training is None:
    logging.info("%s: done, %d steps", folder.name, stage.train.num_steps)
    return
  with preemption.watch(folder.name) as stop_asked:
    with (
      contextlib.closing(training.checkpoints),
      contextlib.closing(training.meter),
      jax.set_mesh(training.mesh),
    ):
      training.run(stop_asked)
    processes.wait_for_all(folder.name)


def _prepare(
  stage: Stage, folder: pathlib.Path, profile: throughput.Steps | None
) -> Training | None:
  """Restores a stage's training, or begins it; None if it is complete."""
  config = stage.train
  origin = {
    "config": saved.claim(folder, stage),
    "lineage": saved.check_lineage(stage, folder),
  }
  model = build.abstract_model(stage)
  mesh = sharding.make_mesh(stage.mesh)
  sharding.check_batch(mesh, config.batch_size, config.accumulate)
  tx, layout = make_layout(stage, model, mesh)
  checkpoints = orbax_io.Checkpoints(
    folder / "checkpoints", config.keep, config.keep_every
  )
  restored = checkpoints.restore(layout)
  if restored and restored[0].step == config.num_steps:
    checkpoints.close()
    return None
  task, data, trained_on = _task_and_data(stage, folder, model, mesh)
  before = restored[2].get("trained_on") if restored else None
  origin["trained_on"] = saved.check_data(stage, folder, before, trained_on)
  if restored:
    state, position, meta = restored
    data.set_state(position)
    logging.info("%s: continues from step %d", folder.name, state.step)
  else:
    model = initial_weights.initial_model(stage, folder.parent, mesh)
    averaged = layout.ema is not None
    _, state = train_step.init_state(
      model, tx, stage.seed, averaged, mesh, copy=False
    )
    meta = {"seconds": 0.0, "pending": []}
  _log_sizes(folder.name, state, mesh)
  step, count_flops = make_step(stage, model, task, tx, layout)
  dtype = model.backbone.dtype if isinstance(model, TensorAR) else "float32"
  return Training(
    folder=folder,
    config=config,
    mesh=mesh,
    task=task,
    data=data,
    meter=throughput.Meter(folder, step, count_flops, profile, dtype),
    checkpoints=checkpoints,
    origin=origin,
    began=time.monotonic() - meta["seconds"],
    state=state,
    pending=meta["pending"],
  )


def _task_and_data(
  stage: Stage, folder: pathlib.Path, model: nnx.Module, mesh: Mesh
) -> tuple[Task, grain.DatasetIterator, dict[str, Any]]:
  """Makes what to train on: (task, this process's part, digest of the data)."""
  config = stage.data
  source = sources.load(
    config.name, config.train_split, data_dir=config.data_dir
  )
  trained_on = fingerprints.of(source)
  if jax.process_count() > 1:
    resumable.check_same("data set", trained_on)
  images = not isinstance(source, codes.TokenSource)
  if not images:
    if not isinstance(model, TensorAR):
      raise ValueError(
        f"data.name={config.name!r} holds tokens: a {stage.objective} is"
        " trained on images. Name a data set of images."
      )
    conditioning = build.conditioning(stage.conditioning)
    text = None
    if isinstance(conditioning, TextConditioning):
      text = conditioning.width, conditioning.length
    source = codes.expect(
      source,
      num_tokens=model.num_tokens,
      vocab_sizes=model.vocab_sizes,
      num_classes=getattr(conditioning, "num_classes", None),
      text=text,
    )
  share = sharding.share(mesh)
  data = pipeline.train_iterator(
    source,
    batch_size=stage.train.batch_size,
    seed=stage.seed,
    flip=config.flip,
    share=share,
  )
  task = make_task(stage, folder.parent, model, images=images)

  def prepare(batch):
    return sharding.global_batch(task.prepare(batch), mesh, share)

  context = sharding.replicate(task.context, mesh)
  placed = dataclasses.replace(task, context=context, prepare=prepare)
  return placed, data, trained_on


def make_layout(
  stage: Stage, model: nnx.Module, mesh: Mesh
) -> tuple[optax.GradientTransformation, train_step.TrainState]:
  """Makes a stage's optimiser, and the layout of the state of its training.

  The model may be abstract, and the mesh of devices that are not there.
  """
  tx = optimizer.make(stage.optim, stage.train.num_steps)
  averaged = stage.optim.ema_decay > 0
  return tx, train_step.state_layout(model, tx, averaged, mesh)


def make_step(
  stage: Stage,
  model: nnx.Module,
  task: Task,
  tx: optax.GradientTransformation,
  layout: train_step.TrainState,
) -> tuple[Callable, Callable]:
  """Makes the jitted step, and what counts its model FLOPs.

  Both take (state, context, batch); `tx` and `layout` are of `make_layout`.
  """
  layers.set_remat(model, stage.train.remat)
  skeleton, _, _ = weights.split(model)
  step = train_step.make_train_step(
    skeleton,
    task.loss,
    tx,
    ema_decay=stage.optim.ema_decay,
    layout=layout,
    accumulate=stage.train.accumulate,
  )
  return step, functools.partial(train_step.model_flops, skeleton, task.loss)


def _log_sizes(name: str, state: train_step.TrainState, mesh: Mesh) -> None:
  """Logs how large the model is, and what of the state a device holds."""
  count = parameter_overview.count_parameters(state.params)
  here, total = sharding.bytes_of(state)
  logging.info("%s: %s parameters", name, f"{count:,}")
  logging.info(
    "%s: mesh %s; a device holds %.4g of the state's %.4g MB",
    name,
    dict(mesh.shape),
    here / 1e6,
    total / 1e6,
  )
