"""Measures whether sampling slows down with longer images, or with many.

  python -m studies.sampling_growth --batches=200

Times generation of one guided image of 256, 576 and 1,024 tokens by a model of
--width and --layers. Then draws many batches of one size, and compares the
second tenth of them with the last one: seconds a batch, memory of the process,
compiled programs.
"""

from __future__ import annotations

import json
import time

import jax
import numpy as np
from absl import app, flags
from flax import nnx

from tensorar_jax.backbones import llamagen
from tensorar_jax.conditioning import conditions
from tensorar_jax.generation import batches
from tensorar_jax.method import sampling
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import sharding
from tensorar_jax.performance import machine

SIDES = (16, 24, 32)
CLASSES = conditions.ClassConditioning(10)


def model_of(side: int, width: int, layers: int) -> TensorAR:
  """Makes a wrapped model of random weights with side x side tokens."""
  config = llamagen.Config(
    grid=(side, side),
    width=width,
    num_layers=layers,
    num_heads=width // 64,
    num_classes=10,
  )
  rngs = nnx.Rngs(0)
  return TensorAR(llamagen.Model(config, rngs=rngs), window=4, rngs=rngs)


def by_length(width: int, layers: int, rounds: int) -> list[dict]:
  """Times one image at each length, the lengths in turn."""
  cond = CLASSES.encode([0])
  null, config = CLASSES.null(cond), SamplingConfig(guidance=2.0)
  mesh = sharding.local_mesh()
  models = {
    side: sampling.prepare(model_of(side, width, layers), mesh)
    for side in SIDES
  }

  def run(side):
    key = jax.random.key(0)
    out = sampling.generate(models[side], cond, null, key, config)
    jax.block_until_ready(out.tokens)

  seconds = {side: [] for side in SIDES}
  for turn in range(rounds + 1):
    for side in SIDES:
      spent = machine.seconds(lambda side=side: run(side))
      if turn:  # the first one compiles
        seconds[side].append(spent)
  return [
    {
      "tokens": side**2,
      "seconds": float(np.median(times)),
      "milliseconds_a_token": 1e3 * float(np.median(times)) / side**2,
      "lowest": min(times),
      "highest": max(times),
    }
    for side, times in seconds.items()
  ]


def by_number(count: int, width: int) -> dict:
  """Compares seconds and memory of the second and the last tenth of batches."""
  sampler = batches.Sampler(
    model_of(4, width, 2), CLASSES, SamplingConfig(guidance=2.0), seed=0
  )
  seconds, memory, part = [], [], max(count // 10, 1)
  last = time.monotonic()
  for out, _ in sampler.batches(np.arange(8 * count) % 10, 8):
    jax.block_until_ready(out.tokens)
    now = time.monotonic()
    seconds.append(now - last)
    memory.append(machine.resident())
    last = now
  # The first batch compiles, and memory settles in those after it.
  first, end = slice(part, 2 * part), slice(-part, None)
  return {
    "batches": count,
    "seconds": [float(np.median(seconds[p])) for p in (first, end)],
    "megabytes": [max(memory[p]) / 1e6 for p in (first, end)],
    # JAX has no other way to ask how often something was compiled.
    "programs": sampling._generate._cache_size(),  # pyright: ignore[reportAttributeAccessIssue]
  }


def main(argv: list[str]) -> None:
  """Measures both, and prints the record."""
  del argv
  given = flags.FLAGS
  record = {
    "machine": machine.describe(),
    "by_length": by_length(given.width, given.layers, given.rounds),
    "by_number": by_number(given.batches, given.width),
  }
  print(json.dumps(record, indent=2))


if __name__ == "__main__":
  flags.DEFINE_integer("width", 768, "Of the model; heads have 64.")
  flags.DEFINE_integer("layers", 12, "Of the model that is timed by length.")
  flags.DEFINE_integer("rounds", 3, "How often every length is timed.")
  flags.DEFINE_integer("batches", 200, "How many, of 8 images.", lower_bound=20)
  app.run(main)
