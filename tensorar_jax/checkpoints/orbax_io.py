"""Save and restore with Orbax: weights, optimiser, step, key, data position.

A checkpoint holds three items: `state` (arrays), `data` (the position of the
data iterator) and `meta` (the resolved config, so that `load` can rebuild the
model), and their digests. Saves are asynchronous and become visible only when
complete. Where several processes train, each saves and restores its own shards;
what one process reads for itself waits for no other.

Whoever reads an item compares it with its digests first. Training compares all
files, each process its share of them; all other modes compare `meta`, and all
of `state` before they read weights.
"""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from tensorar_jax.checkpoints import digests, files
from tensorar_jax.checkpoints.resumable import differences
from tensorar_jax.parallel import processes

ITEMS = ("state", "data", "meta")
# Errors of reading a sound checkpoint: too little memory, no permission.
NOT_DAMAGE = (jax.errors.JaxRuntimeError, MemoryError, PermissionError)


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step: int) -> bool:
    """False: `preemption.watch` decides, and must be the only one to do so."""
    return False


class Checkpoints:
  """The checkpoints of one run, newest last.

  The newest `keep` stay, and those whose step is a multiple of `keep_every`, if
  that is not 0. A save that the end of its process cut short is removed.
  """

  def __init__(
    self, directory: str | pathlib.Path, keep: int = 2, keep_every: int = 0
  ):
    self.directory = pathlib.Path(directory).absolute()
    self._run = uuid.uuid4().hex
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      keep_period=keep_every or None,
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(
        post_finalization_callback=self._write_digests
      ),
    )
    self._saving = 0  # the newest step that a save was begun of
    self._manager = _Manager(self.directory, options=options)

  def save(self, step: int, state: Any, data: dict, meta: dict) -> None:
    """Starts saving; the arrays may be donated as soon as this returns.

    `meta` gets an `id`, by which other files refer to these weights. It is made
    of the run, which stays the same when it continues, and of the step.
    """
    meta = {**meta, "id": f"{self._run}-{step}"}
    self._manager.wait_until_finished()
    self._saving = step
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave(data),
        meta=ocp.args.JsonSave(meta),
      ),
    )

  def _write_digests(self) -> None:
    """Orbax calls this in the first process, before the folder is named."""
    (folder,) = self.directory.glob(f"{self._saving}.*tmp*")
    digests.write(folder, ITEMS)

  def restore(self, like: Any) -> tuple[Any, dict, dict] | None:
    """(state, data, meta) of the newest checkpoint, laid out as `like`.

    `like` comes from `sharding.layout`; the state may have been saved on any
    other mesh. Returns None if nothing was saved yet. A checkpoint that one of
    the processes cannot read, or whose digests differ, is renamed, and the one
    before it is taken.

    Raises:
      ValueError: none can be read, the state is another model's, or not all
        processes see the same checkpoints. Nothing is renamed then.
    """
    damaged: dict[pathlib.Path, Exception | None] = {}
    saved = steps(self.directory)
    if not processes.all_same(saved):
      raise ValueError(
        f"{self.directory}: this process sees the checkpoints {saved}, others"
        " see others. Name a --workdir on a disk that all processes share."
      )
    for step in reversed(saved):
      path = self.directory / str(step)
      restored, error = None, _changed(path)
      if processes.all_same(error is None) and error is None:
        _check_fit(path, like)
        restored, error = _read_all(path, like)
      if processes.all_same(error is None) and restored:
        self._set_aside(damaged, path)
        self._run = restored[2]["id"].split("-")[0]
        return restored
      damaged[path] = error
      restored = None  # frees its memory before the next one is read
    for path, error in damaged.items():
      raise ValueError(_unreadable(path, error)) from error
    return None

  def _set_aside(self, damaged, used) -> None:
    """Renames damaged checkpoints, so that none is taken for the newest."""
    renamed = {path: _free_name(path) for path in damaged}
    for path, error in damaged.items():
      logging.warning(
        "DAMAGED CHECKPOINT: %s cannot be read (%s). Training continues from"
        " the one before, %s. The damaged one is kept as %s.",
        path,
        _words(error),
        used,
        renamed[path],
      )
    if damaged:
      processes.wait_for_all(f"{used}: names")  # before they change
      if processes.is_first():
        for path, new in renamed.items():
          path.rename(new)
      processes.wait_for_all(f"{used}: renamed")
      self._manager.reload()

  def close(self) -> None:
    """Waits until every process has saved, and closes."""
    self._manager.wait_until_finished()
    self._manager.close()


def steps(directory: pathlib.Path) -> list[int]:
  """The steps of the checkpoints in a folder, in order."""
  # The name of a folder that is being saved, or is damaged, has more.
  return sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())


def _free_name(path):
  names = (f".damaged{number or ''}" for number in itertools.count())
  return next(p for name in names if not (p := path.with_suffix(name)).exists())


def _changed(path) -> Exception | None:
  """Compares this process's share of the files; the error, if they differ."""
  try:
    digests.verify(path, ITEMS, (jax.process_index(), jax.process_count()))
  except (ValueError, OSError) as error:
    if isinstance(error.__cause__ or error, NOT_DAMAGE):
      raise
    return error
  return None


def _read_all(path, like):
  """((state, data, meta), None) of a checkpoint folder, or (None, why not)."""
  alone = _this_process()
  handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
  try:
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
      state = reader.restore(
        path / "state", args=ocp.args.StandardRestore(like)
      )
    data, meta = (_read_json(path / item) for item in ("data", "meta"))
    return (state, data, meta), None
  except NOT_DAMAGE:
    raise
  except Exception as error:  # Orbax and TensorStore raise many kinds
    return None, error


def _check_fit(path, like):
  """ValueError if a checkpoint is readable and not of arrays like these."""
  try:
    with _reader() as reader:
      tree = reader.metadata(path / "state").item_metadata.tree
  except Exception:  # Orbax and TensorStore raise many kinds
    return  # reading all of it will say what is wrong
  saved, wanted = _shapes(tree), _shapes(like)
  changed = [
    f"{key}: was {saved.get(key)}, is {wanted.get(key)}"
    for key in sorted(saved.keys() | wanted.keys())
    if saved.get(key) != wanted.get(key)
  ]
  if changed:
    listed = "\n  ".join(changed[:20])
    raise ValueError(
      f"{path} is not damaged, but does not fit this model's training state"
      f" ({len(changed)} arrays):\n  {listed}\nPass another --workdir, or"
      " continue with the code and config that it was saved with."
    )


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  """The shape of every array of a tree, by its path; of keys, as saved."""

  def shape(leaf):
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    return tuple(leaf.shape)

  return {
    jax.tree_util.keystr(path, simple=True, separator="."): shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _words(error: Exception | None) -> str:
  if error is None:
    return "by another process"
  first = (str(error).splitlines() or [""])[0][:150]
  return f"{type(error).__name__}: {first}"


def _unreadable(path: pathlib.Path, error: Exception | None) -> str:
  return (
    f"{path}: the checkpoint cannot be read ({_words(error)})."
    " It may be damaged. Remove this folder to continue from the checkpoint"
    " before it, or choose another --workdir to start afresh."
  )


def claim(
  folder: pathlib.Path,
  config: dict,
  free_keys: tuple[str, ...] = (),
  complete: Callable[[dict], dict] = dict,
) -> None:
  """Marks `folder` as of this config; ValueError if a run has another one.

  `free_keys` may differ. `complete` fills the config that the folder has, which
  may be of an earlier version, with what it leaves out. Without a checkpoint in
  it there is nothing to lose.
  """
  path = folder / "config.json"
  if not steps(folder / "checkpoints"):
    if processes.is_first():
      folder.mkdir(parents=True, exist_ok=True)
      files.write_json(path, config)
    return
  before = complete(run_meta(folder)["config"])
  changed = [
    f"{key}: was {old!r}, is {new!r}"
    for key, old, new in differences(before, config)
    if key not in free_keys
  ]
  if changed:
    listed = "\n  ".join(changed)
    raise ValueError(
      f"{folder} belongs to another config:\n  {listed}\nPass another"
      " --workdir, or undo the change to continue this run."
    )


def find(path: str | pathlib.Path, step: int | None = None) -> pathlib.Path:
  """The checkpoint folder of a work directory, a stage or a checkpoint.

  With `step`, `path` is the folder of a stage; without, the newest is taken.
  """
  path = pathlib.Path(path).absolute()
  if step is not None:
    path = path / "checkpoints" / str(step)
  if not path.exists():
    raise ValueError(
      f"{path}: no such checkpoint. Pass a work directory, one of its stages,"
      " or a checkpoint folder that this project saved."
    )
  if all((path / item).is_dir() for item in ITEMS):
    return path
  for folder in (path / "checkpoints", path):
    if saved := steps(folder):
      return folder / str(saved[-1])
  stages = sorted(p.parent.name for p in path.glob("*/checkpoints"))
  if len(stages) == 1:
    return find(path / stages[0])
  if stages:
    raise ValueError(
      f"{path} holds the stages {stages}: name one, such as"
      f" {path / stages[-1]}."
    )
  raise ValueError(f"{path}: found no checkpoint in this folder.")


def read_meta(path: pathlib.Path) -> dict:
  """The metadata of a checkpoint folder."""
  try:
    digests.verify(path, ["meta"])
    meta = _read_json(path / "meta")
    files.check_shape(meta, {"config": dict}, "meta", remedy="")
    return meta
  except Exception as error:  # Orbax and TensorStore raise many kinds
    raise ValueError(_unreadable(path, error)) from error


def run_meta(folder: pathlib.Path) -> dict:
  """The metadata of the newest checkpoint of a stage that has readable ones."""
  directory = folder / "checkpoints"
  for step in reversed(steps(directory)):
    with contextlib.suppress(ValueError):
      return read_meta(directory / str(step))
  return read_meta(find(folder))  # raises what is wrong with the newest


def weight_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """The shape of every weight of a checkpoint folder, by its path."""
  try:
    digests.verify(path, ["state"])
    with _reader() as reader:
      tree = reader.metadata(path / "state").item_metadata.tree
  except Exception as error:  # Orbax and TensorStore raise many kinds
    raise ValueError(_unreadable(path, error)) from error
  parts = [tree[name] or {} for name in ("params", "frozen") if name in tree]
  return {k: tuple(leaf.shape) for part in parts for k, leaf in part.items()}


def read_weights(
  path: pathlib.Path,
  parts: Sequence[str] = ("params", "frozen", "ema"),
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, dict[str, jax.Array]]:
  """Reads those of the `parts` that a checkpoint folder has: weights by path.

  `shardings` says where each path goes, for example those of
  `sharding.layout`; by default all go to this process's first device.
  """
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  sharding_of = lambda name: (shardings or {}).get(name, first)
  try:
    digests.verify(path, ["state"])
    with _reader() as reader:
      tree = reader.metadata(path / "state").item_metadata.tree
      item = {name: tree[name] for name in parts if tree.get(name)}
      if not item:
        return {}
      return reader.restore(
        path / "state",
        args=ocp.args.PyTreeRestore(
          item=item,
          restore_args={
            part: {
              name: ocp.ArrayRestoreArgs(sharding=sharding_of(name))
              for name in tree
            }
            for part, tree in item.items()
          },
          partial_restore=True,
        ),
      )
  except Exception as error:  # Orbax and TensorStore raise many kinds
    raise ValueError(_unreadable(path, error)) from error


def _read_json(path):
  content = ocp.JsonCheckpointHandler().restore(path)
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds {type(content)}, expected a JSON object")
  return content


def _this_process() -> ocp.options.MultiprocessingOptions:
  """Options for reading that waits for no other process."""
  index = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=index,
    active_processes={index},
    barrier_sync_key_prefix=f"p{index}",
  )


def _reader() -> ocp.Checkpointer:
  alone = _this_process()
  return ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
    multiprocessing_options=alone,
  )
