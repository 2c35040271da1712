"""Modes of the command line in the process of a test.

It saves the start of Python and JAX, and lets a test replace functions.
"""

import pathlib

from ml_collections import ConfigDict

from tensorar_jax import main
from tensorar_jax.cli import modes, parser
from tensorar_jax.experiment import parse
from tests.data.captioned_test import png, write_tar


def run(config: ConfigDict, workdir: pathlib.Path, mode: str, **given) -> None:
  """Carries out a mode with these of its options, as `main` does."""
  make = modes.MODES[mode].options
  options = make(config="unread", workdir=str(workdir), **given)
  main.carry_out(parser.Command(mode, options, {}), parse.parse(config))


class CaptionedProject:
  """A tar of captioned images, tokenized into `root / "tokens"`, and a run.

  Attributes:
    root: of everything.
    workdir: of the run.
    config: of every mode.
  """

  def __init__(
    self, root: pathlib.Path, captions: list[str], config: ConfigDict
  ):
    self.root, self.workdir, self.config = root, root / "run", config
    members = {}
    for i, caption in enumerate(captions):
      members |= {f"{i}.png": png(i), f"{i}.txt": caption.encode()}
    write_tar(root / "tars" / "000.tar", members)

  def run(self, mode: str, **given) -> None:
    """Carries out a mode with these of its options."""
    run(self.config, self.workdir, mode, **given)

  def tokenize(self, recipe: str) -> None:
    """Turns the images into the tokens that training reads."""
    self.run(
      "tokenize",
      images=f"webdataset:{self.root / 'tars'}",
      output=str(self.root / "tokens"),
      recipe=recipe,
    )
