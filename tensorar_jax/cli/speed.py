"""Modes that need no trained model: compile, benchmark."""

from __future__ import annotations

import dataclasses
import pathlib

from tensorar_jax.cli.config import Experiment
from tensorar_jax.cli.options import Products, Shared, option
from tensorar_jax.paths import LocalPath


@dataclasses.dataclass(frozen=True)
class Compile(Products, Shared):
  """Compiles for hardware that need not be here: memory, traffic, bounds.

  Of a stage's train step and sampler: what each device holds, computes, moves
  and sends, and a bound on the time. Fails if one of them does not fit.
  """

  example = (
    "--config=configs/llamagen_xxl.py:384 --mode=compile \\\n"
    "    --target=v5e:4x4 --config.mesh.fsdp=16 --batch_size=128"
  )

  target: str = option(
    "here",
    "The devices: v5e:4x4, v5p:2x2x2, v6e:4x4, v4:2x2x2, tpu7x:2x2x1, h100:8,"
    " a100:8, other slices of these, or those of this host. All but the last"
    " need `pip install 'tensorar_jax[compile]'`.",
    metavar="CHIP:SHAPE",
  )
  stage: str | None = option(
    None,
    "The stage to compile. Default: the last one that draws images.",
    metavar="NAME",
  )
  batch_size: int | None = option(
    None,
    "Images that the sampler draws at once, over the mesh. Default: 32 for each"
    " device.",
    least=1,
  )
  output: LocalPath | None = option(
    None, "A file for all figures. Default: none.", metavar="FILE.json"
  )


@dataclasses.dataclass(frozen=True)
class Benchmark(Products, Shared):
  """Measures speed beside the machine's own limits.

  Of drawing images, of the tokenizer's decoder and of training steps. All cases
  run in turn; figures are medians with their range. The weights are those of
  the stage if it is trained, else random ones; only the parallel decoder's
  speed depends on them.
  """

  example = (
    "--config=configs/llamagen_b.py --mode=benchmark \\\n"
    "    --batches=1,8 --windows=1,4 --parts=decode"
  )

  stage: str | None = option(
    None,
    "The stage to measure. Default: the last one that draws images.",
    metavar="NAME",
  )
  batches: tuple[int, ...] = option((1, 8), "Numbers of images at once.")
  windows: tuple[int, ...] = option((1, 2, 4, 8), "Windows k.")
  depths: tuple[int, ...] = option(
    (1, 2, 4), "Depths of the decoder that TensorAR adds, with one window."
  )
  decoders: tuple[str, ...] = option(
    ("window",),
    "How to draw: a token a step, or several rows at once.",
    choices=("window", "parallel"),
  )
  rows: tuple[int, ...] = option(
    (4, 16), "Rows that the parallel decoder tries at once."
  )
  rounds: int = option(3, "How often every case is timed.", least=1)
  train_batch: int | None = option(
    None,
    "Images of a training step. Default: the config's; on a CPU 4.",
    least=1,
  )
  parts: tuple[str, ...] = option(
    ("decode", "tokenizer", "train"),
    "What to measure.",
    choices=("decode", "tokenizer", "train"),
  )
  unguided: bool = option(
    True, "Whether to draw with the base model without guidance, too."
  )
  peer: str | None = option(
    None,
    "Another implementation to time in the same rounds; needs `pip install"
    " 'tensorar_jax[peer]'`. Default: none.",
    choices=("torch",),
  )
  peer_modes: tuple[str, ...] = option(
    ("eager", "compile"),
    "How the peer runs: as it is, compiled, or on GPUs compiled into CUDA"
    " graphs.",
    choices=("eager", "compile", "graphs"),
  )
  profile: tuple[str, ...] = option(
    (),
    "Parts whose first case is run once more under the JAX profiler, for a"
    " table of its kernels.",
    choices=("decode", "tokenizer", "train"),
  )
  seconds: float | None = option(
    None, "After so many no further case is begun. Default: all are run."
  )
  output: LocalPath | None = option(
    None,
    "The folder of the results. Default: a new one in the work directory's"
    " `benchmark`.",
    metavar="FOLDER",
  )


def compile_stage(
  options: Compile, experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Carries out --mode=compile."""
  from tensorar_jax.performance import compile, targets

  compile.report(
    experiment.stages,
    options.stage,
    targets.find(options.target),
    batch_size=options.batch_size,
    output=options.output,
  )


def run_benchmark(
  options: Benchmark, experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Carries out --mode=benchmark."""
  from tensorar_jax.performance import benchmark

  settings = benchmark.Settings(
    batches=options.batches,
    windows=options.windows,
    depths=options.depths,
    decoders=options.decoders,
    rows=options.rows,
    rounds=options.rounds,
    train_batch=options.train_batch,
    parts=options.parts,
    unguided=options.unguided,
    peer=options.peer,
    peer_modes=options.peer_modes,
    precision=options.precision,
    profile=options.profile,
    seconds=options.seconds,
  )
  benchmark.run(
    experiment.stages,
    workdir,
    settings,
    stage=options.stage,
    output=options.output,
  )
