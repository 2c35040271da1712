"""Trains and samples on meshes of 8 devices; a line of JSON for each mesh.

One process for all of it, run by `devices_test.py`.
"""

import json
import pathlib
import re
import tempfile

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from tensorar_jax.conditioning import captions, encoders, t5
from tensorar_jax.experiment import initial_weights
from tensorar_jax.generation import batches
from tensorar_jax.method import sampling
from tensorar_jax.nn import attention, layers
from tensorar_jax.parallel import sharding, weights
from tensorar_jax.training import loop, optimizer, train_step
from tests import tiny, tiny_configs
from tests.conditioning import tiny_text
from tests.contract import families
from tests.nn import attention_test

# None: one device. Another family on the mesh that splits most, in two parts a
# step, whose layers keep nothing for the backward pass.
MESHES = {
  "llamagen": (None, (8, 1, 1), (1, 8, 1), (2, 2, 2)),
  "rar": (None, (2, 2, 2)),
}
# Sizes that 8 divides: what does not divide is not split.
SIZES = dict(width=32, num_layers=2, num_heads=4, grid=(3, 3))
BACKBONES = {
  "llamagen": dict(SIZES, vocab_size=24),
  "rar": dict(SIZES, vocab_size=24),
}
ACCUMULATE = {"llamagen": 1, "rar": 2}
REMAT = {"llamagen": "none", "rar": "full"}
STEPS = 3


def largest_array() -> int:
  """Returns the most bytes that any live array has on one device."""
  arrays = [
    array
    for array in jax.live_arrays()
    if not jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
  ]
  return max(a.addressable_shards[0].data.nbytes for a in arrays)


def collectives(compiled) -> dict[str, int]:
  kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
  text = compiled.as_text()
  return {k: len(re.findall(rf" {k}(?:-start)?\(", text)) for k in kinds}


def train_on(family, mesh) -> dict:
  """Trains a few steps: losses, weights, bytes and collectives."""
  config = tiny_configs.stage(
    STEPS,
    tensorar=dict(window=2),
    backbone=dict(name=family, num_classes=10, **BACKBONES[family]),
  )
  # Adam divides rounding by rounding where a gradient is nothing else.
  tx = optimizer.make(
    optimizer.OptimConfig(learning_rate=1e-2, eps=1e-3), STEPS
  )
  model = initial_weights.initial_model(config, pathlib.Path(), mesh)
  skeleton, state = train_step.init_state(model, tx, 0, ema=True, mesh=mesh)
  largest = largest_array()
  # All weights random: a zero head would hide mistakes.
  model = sharding.shard(tiny.redraw(model), mesh)
  layers.set_remat(model, REMAT[family])
  skeleton, state = train_step.init_state(model, tx, 0, ema=True, mesh=mesh)
  layout = train_step.state_layout(model, tx, ema=True, mesh=mesh)
  task = loop.make_task(config, pathlib.Path(), model, images=False)
  step = train_step.make_train_step(
    skeleton,
    task.loss,
    tx,
    ema_decay=0.9,
    layout=layout,
    accumulate=ACCUMULATE[family],
  )
  rng, losses = np.random.default_rng(0), []
  with jax.set_mesh(mesh):
    for _ in range(STEPS):
      batch = {
        "tokens": families.tokens(model.vocab_sizes, 8, seed=len(losses)),
        "label": rng.integers(0, 10, 8, np.int32),
      }
      batch = task.prepare(batch)
      batch = sharding.global_batch(batch, mesh, sharding.share(mesh))
      if not losses:
        step = step.lower(state, None, batch).compile()
      state, scalars = step(state, None, batch)
      losses.append(float(scalars["loss"]))
  same = jax.tree.map(lambda a, b: a.sharding == b.sharding, state, layout)
  here, total = sharding.bytes_of((state.params, state.opt_state, state.ema))
  return {
    "losses": losses,
    "arrays": {path: np.array(a) for path, a in state.params.items()},
    "stays": jax.tree.all(same),
    "bytes": [here, total],
    "largest_array": largest,
    "collectives": collectives(step),
  }


def sample_on(mesh) -> dict:
  """Draws eight images with guidance: tokens, logits and collectives."""
  model, cond = tiny.wrapped(3), tiny.cond(8)
  null = tiny.CLASSES.null(cond)
  config = sampling.SamplingConfig(guidance=1.5, return_logits=True)
  if mesh.size > 1:
    model = sharding.shard(model, mesh)
    cond, null = jax.device_put((cond, null), sharding.rows(mesh))
  run, programs = sampling._generate, []

  def kept(*args, **options):
    programs.append(run.lower(*args, **options).compile())
    return programs[0](*args[1:])  # without the static graphdef

  sampling._generate = kept
  out = sampling.generate(model, cond, null, jax.random.key(0), config)
  sampling._generate = run
  return {
    "arrays": {
      "drafts": np.array(out.drafts),
      "logits": np.array(out.logits[0]),
      "parallel": refilled_on(mesh),
    },
    "devices": len(out.drafts.sharding.device_set),
    "collectives": collectives(programs[0]),
  }


def refilled_on(mesh):
  """Draws 13 images in eight places by the parallel decoder: their tokens."""
  config = sampling.SamplingConfig(
    guidance=1.5, draw="gumbel", decoder="parallel", rows=3
  )
  sampler = batches.Sampler(tiny.wrapped(3), tiny.CLASSES, config, 0, mesh)
  drawn = sampler.batches(np.arange(13) % 5, batch_size=8)
  return np.concatenate([np.array(out.tokens)[:count] for out, count in drawn])


def attend_on(mesh) -> float:
  """Compares the TPU's kernel, interpreted on a mesh, with plain attention."""
  arrays = attention_test.heads(groups=4, rows=128)
  mask = attention_test.mask(True, 128)
  want = attention_test.compiled(attention.plain, arrays, mask)
  with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
    got = attention_test.compiled(attention.flash, arrays, mask)
  pairs = zip(got, want, strict=True)
  return max(float(np.abs(np.array(a) - np.array(b)).max()) for a, b in pairs)


def encode_on(mesh) -> dict:
  """Compares captions' features on a mesh with one device's."""
  config = t5.Config(
    vocab_size=64,
    width=16,
    num_layers=2,
    num_heads=4,
    head_dim=4,
    mlp_width=32,
    dtype="float32",
  )
  make = lambda rngs: t5.Model(config, rngs=rngs)
  model = tiny.redraw(weights.abstract(make))
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "tokenizer.json")
    tiny_text.tokenizer().save(str(file))
    tokenizer = captions.CaptionTokenizer(file, 7)
  texts = ["a cat", "a red cat on a mat", "red"]  # no number that divides
  want, _ = encoders.T5Encoder(model, tokenizer)(texts)
  model = sharding.shard(model, mesh)
  got, _ = encoders.T5Encoder(model, tokenizer, mesh)(texts)
  assert got.shape == want.shape
  difference = np.abs(np.array(got) - np.array(want)).max()
  here, total = sharding.bytes_of(model)
  return {"difference": float(difference), "share": here / total}


def parts(row):
  return [(name, row[name]) for name in ("train", "sample") if name in row]


def main():
  for family, meshes in MESHES.items():
    first = None
    for sizes in meshes:
      mesh = sharding.make_mesh(devices=jax.devices()[:1])
      if sizes:
        mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
      row = {"family": family, "mesh": sizes, "train": train_on(family, mesh)}
      if family == "llamagen":
        row["sample"] = sample_on(mesh)
      arrays = {name: part.pop("arrays") for name, part in parts(row)}
      first = first or arrays
      for name, part in parts(row):
        differences = jax.tree.map(
          lambda a, b: float(np.abs(a - b).max()), arrays[name], first[name]
        )
        part["difference"] = differences
      print(json.dumps(row), flush=True)
  mesh = sharding.make_mesh(sharding.MeshConfig(2, 1, 4))
  row = {"family": "kernel", "mesh": None, "difference": attend_on(mesh)}
  print(json.dumps(row), flush=True)
  mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
  row = {"family": "text", "mesh": None, **encode_on(mesh)}
  print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
