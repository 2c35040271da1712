"""SIGTERM, by which schedulers say that a machine is about to go, as a request.

Training finishes its step, saves, and exits with EXIT_CODE. Several processes
have to stop behind the same step, whichever of them got the signal, and when:
JAX's coordination service, which takes SIGTERM where there are several, agrees
on the first step that none of them has reached. More signals change nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from absl import logging
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again

# The service wants a number that never falls, from one stage to the next too.
_calls = itertools.count(1)


@contextlib.contextmanager
def watch(name: str) -> Iterator[Callable[[], bool]]:
  """Gives `asked`, to be called once a step: whether that step is the last.

  It says the same in every process. If it was asked, the process exits at the
  end, by when all has to be saved. Outside of this, and in other threads than
  the main one, SIGTERM ends a process that is alone as it ends any program.
  """
  stop, before = threading.Event(), None
  together = jax.distributed.is_initialized()

  def asked() -> bool:
    if together and multihost_utils.reached_preemption_sync_point(next(_calls)):
      stop.set()
    return stop.is_set()

  if not together and threading.current_thread() is threading.main_thread():
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
  try:
    yield asked
  finally:
    if before is not None:
      signal.signal(signal.SIGTERM, before)
  if stop.is_set():
    logging.info(
      "%s: SIGTERM: saved, and exits with %d; the same command continues",
      *(name, EXIT_CODE),
    )
    sys.exit(EXIT_CODE)
