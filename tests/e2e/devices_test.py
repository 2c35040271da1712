"""Property 7: an image is the same on one device and on eight."""

import os
import pathlib
import subprocess
import sys

SCRIPT = """
import re
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tests import tiny
from tensorar_jax import sampling
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
model, rng = tiny.wrapped(3), jax.random.key(0)
cond = tiny.cond(8)
config = sampling.SamplingConfig(guidance=1.5, return_logits=True)
run, programs = sampling._generate, []
def kept(*args, **options):
  programs.append(run.lower(*args, **options).compile().as_text())
  return run(*args, **options)
sampling._generate = kept
def draw(cond):
  return sampling.generate(model, cond, tiny.CLASSES.null(cond), rng, config)
one = draw(cond)
eight = draw(jax.device_put(cond, NamedSharding(mesh, PartitionSpec("data"))))
assert len(eight.drafts.sharding.device_set) == 8
np.testing.assert_array_equal(one.drafts, eight.drafts)
np.testing.assert_allclose(one.logits[0], eight.logits[0], atol=1e-5)
talk = "all-gather|all-reduce|all-to-all|collective-permute"
assert not re.search(talk, programs[1]), "devices wait for one another"
print("equal")
"""


def test_one_device_and_eight_draw_the_same_images():
  flags = os.environ["XLA_FLAGS"]
  flags += " --xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    cwd=pathlib.Path(__file__).parents[2],
    # It reads a compiled program, which has to be a real one.
    env={
      **os.environ,
      "XLA_FLAGS": flags,
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    },
    capture_output=True,
    text=True,
  )
  assert "equal" in done.stdout, done.stderr[-3000:]
