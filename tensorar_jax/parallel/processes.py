"""Several processes that are one run: how they join, wait and end.

They communicate through `jax.distributed` alone.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

# Environments that JAX can ask for the coordinator and the processes.
CLUSTERS = {
  "SLURM_STEP_NUM_TASKS": lambda value: int(value) > 1,
  "OMPI_COMM_WORLD_SIZE": lambda value: int(value) > 1,
  "TPU_WORKER_HOSTNAMES": lambda value: "," in value,
}
SHUTDOWN_SECONDS = 24 * 3600  # processes that sample end at different times


def join_processes(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the other processes of a run, if there are to be any.

  Args:
    coordinator: HOST:PORT of process 0; "auto" asks the cluster. None asks it
      too if it is one of CLUSTERS; otherwise this process stays alone.
    num_processes: needed with HOST:PORT, as is process_id.
    process_id: 0 to num_processes - 1.

  Raises:
    ValueError: only some are given, or the others cannot be reached.
  """
  given = num_processes, process_id
  by_hand = coordinator not in (None, "auto")
  if (None in given) if by_hand else given != (None, None):
    raise ValueError(
      f"--coordinator={coordinator} --num_processes={num_processes}"
      f" --process_id={process_id}: expected all three, or --coordinator=auto"
      " alone."
    )
  known = any(is_set(os.environ.get(k, "0")) for k, is_set in CLUSTERS.items())
  if coordinator is None and not known:
    return
  try:
    jax.distributed.initialize(
      coordinator if by_hand else None,
      num_processes,
      process_id,
      # A cluster that JAX sees as well would leave this process one GPU.
      cluster_detection_method="deactivate" if by_hand else None,
      shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
  except (RuntimeError, ValueError, TypeError) as error:
    raise ValueError(
      f"cannot join the other processes (--coordinator={coordinator},"
      f" --num_processes={num_processes}, --process_id={process_id}): {error}"
    ) from error


def fail(message: str) -> NoReturn:
  """Ends the process with a message and exit code 1.

  One of several does not wait for the others, as JAX would: they may be waiting
  for it. The launcher sees that it has ended.
  """
  if jax.distributed.is_initialized():
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(1)
  sys.exit(message)


def is_first() -> bool:
  """Whether this process is the one that writes logs and JSON."""
  return jax.process_index() == 0


def wait_for_all(where: str) -> None:
  """Waits until every process has called this."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(where)


def all_same(value: object) -> bool:
  """Whether every process has this value; all of them have to call it."""
  checksum = np.array(zlib.crc32(repr(value).encode()), np.uint32)
  checksums = np.ravel(multihost_utils.process_allgather(checksum))
  return bool((checksums == checksums[0]).all())


def gather(value: Any) -> list[Any]:
  """The JSON value of every process, in order; all of them have to call it.

  If all are equal to the first one's, none is sent.
  """
  if jax.process_count() == 1 or all_same(text := json.dumps(value)):
    return [value] * jax.process_count()
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = np.ravel(multihost_utils.process_allgather(np.int32(data.size)))
  padded = np.pad(data, (0, int(sizes.max()) - data.size))
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(bytes(row[:n])) for row, n in zip(rows, sizes)]


def raise_together(error: str | None) -> None:
  """ValueError in all processes if one has an error; all have to call it."""
  for index, other in enumerate(gather(error)):
    if other:
      raise ValueError(f"process {index}: {other}" if index else other)
