"""Compiles both decoders for a GPU and counts what a step moves and launches.

  python -m studies.fewer_steps_compiled --output=runs/fewer_steps/h100

Of LlamaGen-B, guided, k = 1, in bfloat16. No GPU is needed, but its compiler
is: see --mode=compile. The bound on a step is its bytes over the memory's
bandwidth; a decoder of m rows breaks even where it commits as many tokens a
step as its step takes times that of one row. docs/fewer_steps.md has the table.
"""

from __future__ import annotations

import dataclasses
import pathlib

from absl import app, flags, logging

from tensorar_jax import paths
from tensorar_jax.checkpoints import files
from tensorar_jax.evaluation import tables
from tensorar_jax.experiment import config_file
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.parallel import sharding
from tensorar_jax.performance import compile, hlo, targets

# Instructions that are no kernel, or whose kernels are counted inside.
NO_KERNELS = (
  "parameter",
  "constant",
  "iota",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "partition-id",
  "replica-id",
)
SHARES = (0.3, 0.5)  # steps over tokens for which a gain is given


class OneMore(hlo.Program):
  """A program whose loop over the tokens takes one more trip."""

  length: int = 0

  def trips(self, loop):
    known = super().trips(loop)
    return (known or 1) + (known in (None, self.length))


def of_a_step(text: str, length: int) -> dict[str, float]:
  """{"bytes", "kernels"} of a trip of the loop over `length` tokens."""
  once = hlo.parse(text)
  more = OneMore(once.computations, once.entry)
  object.__setattr__(more, "length", length)
  inside = {
    called
    for lines in once.computations.values()
    for line in lines.values()
    if line.op == "fusion"
    for called in once.called(line)
  }

  def kernels(program):
    return sum(
      times
      * sum(
        line.op not in NO_KERNELS
        for line in program.computations[name].values()
      )
      for name, times in program.runs()[0].items()
      if name not in inside
    )

  return {
    "bytes": hlo.bytes_moved(more) - hlo.bytes_moved(once),
    "kernels": kernels(more) - kernels(once),
  }


def rows_of(record: dict) -> list[list[str]]:
  """A line for each batch and number of rows."""
  lines = [
    ["images", "rows", "kernels", "GB a step", "commits to break even"]
    + [f"gain at {share} T" for share in SHARES]
  ]
  for batch in record["batches"]:
    one = record["cases"][f"2x{batch} m=0"]
    for m in record["rows"]:
      case = record["cases"][f"2x{batch} m={m}"]
      ratio = case["bytes"] / one["bytes"]
      gains = [f"{1 / (share * ratio):.2f}" for share in SHARES]
      lines.append(
        [
          f"2x{batch}",
          str(m or 1),
          str(case["kernels"]),
          f"{case['bytes'] / 1e9:.3f}",
          *([f"{ratio:.2f}", *gains] if m else ["", "", ""]),
        ]
      )
  return lines


def main(argv: list[str]) -> None:
  """Compiles every case."""
  del argv
  given = flags.FLAGS
  output = pathlib.Path(paths.local(given.output))
  path = output / "compiled.json"
  stage = config_file.load(
    given.config, {"backbone.dtype": given.dtype}
  ).stages[given.stage]
  target = targets.find(given.target)
  mesh = sharding.make_mesh(devices=target.devices)
  rows, batches = [0, *map(int, given.rows)], list(map(int, given.batches))
  record = files.read_json(path, default={"cases": {}})
  record |= {"target": given.target, "dtype": given.dtype}
  record |= {"rows": rows, "batches": batches}
  output.mkdir(parents=True, exist_ok=True)
  length = stage.backbone.config.grid[0] * stage.backbone.config.grid[1] - 1
  for batch in batches:
    for m in rows:
      name = f"2x{batch} m={m}"
      if name in record["cases"]:
        continue
      sampling = SamplingConfig(guidance=2.0)
      if m:
        sampling = SamplingConfig(
          guidance=2.0,
          draw="gumbel",
          decoder="parallel",
          rows=m,
          first_guess="above",
        )
      chosen = dataclasses.replace(stage, sampling=sampling)
      program = compile.sampler_program(chosen, mesh, batch)
      text = program.lower().compile().as_text() or ""
      record["cases"][name] = of_a_step(text, length)
      files.write_json(path, record)
      logging.info("%s: %s", name, record["cases"][name])
  (output / "compiled.md").write_text(tables.markdown(rows_of(record)) + "\n")
  print((output / "compiled.md").read_text())


if __name__ == "__main__":
  flags.DEFINE_string("config", "configs/llamagen_b.py", "Of the model.")
  flags.DEFINE_string("stage", "base", "Whose model and precision.")
  flags.DEFINE_string("dtype", "bfloat16", "The model's.")
  flags.DEFINE_string("target", "h100:1", "As in --mode=compile.")
  flags.DEFINE_list("rows", ["4", "8", "16", "32"], "Numbers of rows.")
  flags.DEFINE_list("batches", ["1", "8", "64"], "Numbers of images.")
  flags.DEFINE_string("output", "runs/fewer_steps/h100", "A folder.")
  app.run(main)
