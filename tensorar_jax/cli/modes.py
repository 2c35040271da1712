"""The modes by name: the options of each, and what it does with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tensorar_jax.cli import (
  conversion,
  evaluation,
  sampling,
  speed,
  training,
)
from tensorar_jax.cli.options import Shared


@dataclasses.dataclass(frozen=True)
class Mode:
  """One value of --mode.

  Attributes:
    options: the dataclass of its flags.
    carry_out: takes (options, `config.Experiment`, work directory) and does the
      work; without a config, if `options.needs_config` allows that, the last
      two are None.
  """

  options: type[Shared]
  carry_out: Callable[..., None]


MODES = {
  "run": Mode(training.Run, training.run),
  "train": Mode(training.Train, training.train),
  "sample": Mode(sampling.Sample, sampling.sample),
  "evaluate": Mode(evaluation.Evaluate, evaluation.evaluate),
  "demo": Mode(sampling.Demo, sampling.serve_demo),
  "visualize": Mode(training.Visualize, training.visualize),
  "import": Mode(conversion.Import, conversion.import_weights),
  "tokenize": Mode(conversion.Tokenize, conversion.tokenize_images),
  "export": Mode(conversion.Export, conversion.export),
  "compile": Mode(speed.Compile, speed.compile_stage),
  "benchmark": Mode(speed.Benchmark, speed.run_benchmark),
}
