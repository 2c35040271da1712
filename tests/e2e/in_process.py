"""Modes of the command line in the process of a test."""

import pathlib

from ml_collections import ConfigDict

from tensorar_jax import main
from tensorar_jax.cli import modes, parser
from tensorar_jax.experiment import parse


def run(config: ConfigDict, workdir: pathlib.Path, mode: str, **given) -> None:
  """Carries out a mode with these of its options, as `main` does."""
  make = modes.MODES[mode].options
  options = make(config="unread", workdir=str(workdir), **given)
  main.carry_out(parser.Command(mode, options, {}), parse.parse(config))
