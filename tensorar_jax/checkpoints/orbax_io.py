"""Save and restore with Orbax: weights, optimiser, step, key, data position.

A checkpoint holds three items: `state` (arrays), `data` (the position of the
data iterator) and `meta` (the resolved config, so that `load` can rebuild the
model). Saves are asynchronous and become visible only when complete. Where
several processes train, each saves and restores the shards that it has; what is
read for one process alone waits for no other.
"""

from __future__ import annotations

import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from tensorar_jax import processes
from tensorar_jax.resumable import differences, write_json

ITEMS = ("state", "data", "meta")


class Checkpoints:
  """The checkpoints of one run, newest last."""

  def __init__(self, directory: str | pathlib.Path, keep: int = 2):
    self.directory = pathlib.Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data: dict, meta: dict) -> None:
    """Starts saving; the arrays may be donated as soon as this returns.

    `meta` gets an `id` of its own, by which other files refer to these weights.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave(data),
        meta=ocp.args.JsonSave({**meta, "id": uuid.uuid4().hex}),
      ),
    )

  def restore(self, like: Any) -> tuple[Any, dict, dict]:
    """(state, data, meta) of the newest checkpoint, laid out as `like`.

    `like` is of `sharding.layout`; the state may come from any other mesh.
    """
    step = self._manager.latest_step()
    try:
      found = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(like),
          data=ocp.args.JsonRestore(),
          meta=ocp.args.JsonRestore(),
        ),
      )
    except Exception as error:  # whatever Orbax and TensorStore raise
      raise ValueError(
        _unreadable(self.directory / str(step), error)
      ) from error
    return found.state, found.data, found.meta

  def close(self) -> None:
    """Waits for what is being saved, by any process."""
    self._manager.wait_until_finished()
    self._manager.close()


def _unreadable(path: pathlib.Path, error: Exception) -> str:
  first = (str(error).splitlines() or [""])[0][:300]
  return (
    f"{path}: the checkpoint cannot be read ({type(error).__name__}: {first})."
    " It may be damaged. Remove this folder to continue from the checkpoint"
    " before it, or choose another --workdir to start afresh."
  )


def claim(
  folder: pathlib.Path, config: dict, free_keys: tuple[str, ...] = ()
) -> None:
  """Makes `folder` this config's; one that holds another's is an error.

  `free_keys` may differ. Without a checkpoint in it there is nothing to lose.
  """
  path = folder / "config.json"
  saved = any(p.name.isdigit() for p in (folder / "checkpoints").glob("*"))
  if not saved:
    if processes.is_first():
      folder.mkdir(parents=True, exist_ok=True)
      write_json(path, config)
    return
  before = read_meta(find(folder))["config"]
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


def find(path: str | pathlib.Path) -> pathlib.Path:
  """The checkpoint folder that a work directory, a stage or a step names."""
  path = pathlib.Path(path).absolute()
  if not path.exists():
    raise ValueError(
      f"{path}: no such checkpoint. Pass a work directory, one of its stages,"
      " or a checkpoint folder that this project saved."
    )
  if all((path / item).is_dir() for item in ITEMS):
    return path
  for folder in (path / "checkpoints", path):
    steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    if steps:
      return folder / str(max(steps))
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
    return ocp.JsonCheckpointHandler().restore(path / "meta")
  except Exception as error:  # whatever Orbax and TensorStore raise
    raise ValueError(_unreadable(path, error)) from error


def weight_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """The shape of every weight of a checkpoint folder, by its path."""
  try:
    with _reader() as reader:
      tree = reader.metadata(path / "state").item_metadata.tree
  except Exception as error:  # whatever Orbax and TensorStore raise
    raise ValueError(_unreadable(path, error)) from error
  parts = [tree[name] or {} for name in ("params", "frozen") if name in tree]
  return {k: tuple(leaf.shape) for part in parts for k, leaf in part.items()}


def read_weights(
  path: pathlib.Path,
  parts: Sequence[str] = ("params", "frozen", "ema"),
  shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, dict[str, jax.Array]]:
  """Those of the `parts` that a checkpoint folder has: weights by path.

  `shardings` says where each path goes, for example of `sharding.layout`; by
  default all go to this process's first device.
  """
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  place = lambda name: (shardings or {}).get(name, first)
  try:
    with _reader() as reader:
      tree = reader.metadata(path / "state").item_metadata.tree
      item = {name: tree[name] for name in parts if tree.get(name)}
      return reader.restore(
        path / "state",
        args=ocp.args.PyTreeRestore(
          item=item,
          restore_args={
            part: {
              name: ocp.ArrayRestoreArgs(sharding=place(name)) for name in tree
            }
            for part, tree in item.items()
          },
          partial_restore=True,
        ),
      )
  except Exception as error:  # whatever Orbax and TensorStore raise
    raise ValueError(_unreadable(path, error)) from error


def _reader() -> ocp.Checkpointer:
  """A checkpointer that waits for no other process."""
  own = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"p{own}"
  )
  return ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(multiprocessing_options=options),
    multiprocessing_options=options,
  )
