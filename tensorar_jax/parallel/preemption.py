"""Treats SIGTERM, the warning of a scheduler, as a request to save and stop.

Training finishes its step, saves, and exits with EXIT_CODE. Several processes
have to stop after the same step, whichever of them got the signal and when:
there JAX's coordination service receives SIGTERM and agrees on the first step
that none of them has reached. Further signals change nothing.
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

# The service wants a number that never falls, not even at the next stage.
_calls = itertools.count(1)


@contextlib.contextmanager
def watch(name: str) -> Iterator[Callable[[], bool]]:
  """Yields `asked`, to be called once a step: whether that step is the last.

  It says the same in every process. If it has said yes, the process exits when
  the context ends; all has to be saved by then. Outside of the context, and in
  threads other than the main one, SIGTERM ends a single process at once.
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
      name,
      EXIT_CODE,
    )
    sys.exit(EXIT_CODE)
