"""The command line: `python -m tensorar_jax.main --config=configs/digits.py`.

`--help` lists the modes, `--mode=sample --help` the flags of one. What a mode
does is in `cli`; here are the order of the start and the exit codes: 0 when all
is done, 75 when training was stopped and has saved, 1 after an error.
"""

from __future__ import annotations

import signal
import sys
import traceback

from absl import app, flags, logging

from tensorar_jax.cli import config, parser
from tensorar_jax.cli.modes import MODES
from tensorar_jax.cli.speed import Compile


def main(argv: list[str]) -> None:
  """Carries out a command line, or ends with one line that says why not."""
  try:
    command = parser.parse(argv[1:])
  except ValueError as error:
    sys.exit(f"error: {error}")
  options = command.options
  # JAX is loaded from here on: help and wrong flags do not wait for it.
  from tensorar_jax.parallel import processes
  from tensorar_jax.performance import targets
  from tensorar_jax.training import logs

  logs.log_to_console()
  if isinstance(options, Compile):
    targets.stay_off_devices(options.target)
  try:
    values = None
    if options.needs_config():
      values = config.read(str(options.config), command.overrides)
    processes.join_processes(
      options.coordinator, options.num_processes, options.process_id
    )
    if command.mode not in ("run", "train"):
      # With several processes JAX takes it, for training to see.
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not processes.is_first():
      logging.set_verbosity(logging.WARNING)
    carry_out(command, values)
  except (ValueError, OSError) as error:
    # These are messages to the user: a traceback would bury them.
    processes.fail(
      traceback.format_exc() if options.debug else f"error: {error}"
    )
  except Exception:
    # Raised, it would end one of several processes only with the others, which
    # may be waiting for it. Nothing is hidden: the whole traceback is printed.
    processes.fail(traceback.format_exc())


def carry_out(command: parser.Command, values) -> None:
  """Carries out a command.

  Args:
    command: of `parser.parse`.
    values: the config, of `config.read`; None if the mode needs none.
  """
  import jax

  from tensorar_jax.parallel import chips

  options, mode = command.options, MODES[command.mode]
  count = jax.process_count()
  if count > 1:
    config.check_processes(command.mode, options, values)
  if count > 1 and not options.shares_work():
    raise ValueError(
      f"--mode={command.mode} in {count} processes: expected train, sample,"
      " import, tokenize, or evaluate with --reference. Run the other modes in"
      " one process."
    )
  with chips.precision(getattr(options, "precision", None)):
    if values is None:
      return mode.carry_out(options, None, None)
    experiment = config.check(values, options)
    mode.carry_out(options, experiment, config.workdir(options, values))


def start(argv: list[str]) -> list[str]:
  """Leaves all flags to `main`; sets absl's own, which Grain's workers read."""
  flags.FLAGS(argv[:1])
  return argv


def run() -> None:
  """Runs the command line; the program `tensorar` of an installed package."""
  app.run(main, flags_parser=start)


if __name__ == "__main__":
  run()
