"""`--mode=compile`: what a train step and a sampler need on named hardware.

Both programs are lowered and compiled for the devices of a target. The devices
need not be present: XLA's compilers know them by name. Nothing is allocated;
models and batches are shapes. The report has memory, traffic and an estimate,

    seconds = max(FLOPs / peak, bytes / bandwidth, bytes sent / links)

which is a bound and not a forecast: see ASSUMPTIONS.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tensorar_jax.checkpoints import files
from tensorar_jax.experiment import build
from tensorar_jax.experiment.schema import Stage, choose
from tensorar_jax.method import sampling
from tensorar_jax.nn import flops, layers
from tensorar_jax.parallel import chips, sharding, weights
from tensorar_jax.performance import hlo, targets
from tensorar_jax.training import loop

ASSUMPTIONS = (
  "The roofline is a bound, not a forecast. It is the longest of three times:"
  " FLOPs at the chip's peak, bytes at the memory's bandwidth, and bytes sent"
  " at the bandwidth of all links together. It leaves out the launch of each"
  " operation (sampling has many small ones), partly filled tiles, all"
  " arithmetic except matrix products, links that a collective does not use,"
  " and the input pipeline."
)
MEMORY = ("argument", "output", "temp", "alias")
IMAGES_PER_DEVICE = 32  # sampled at once, as by --mode=sample


@dataclasses.dataclass(frozen=True)
class Program:
  """A traced function and the work that it does.

  Attributes:
    name: for the report.
    lower: lowers the function.
    model_flops: FLOPs that the model needs, without recomputation.
    run_flops: FLOPs that the function carries out.
    images: images in a batch, over all devices.
    cache: sizes of a KV cache's arrays on one device, in elements.
    dtype: the dtype of the arrays that are multiplied.
  """

  name: str
  lower: Callable[[], jax.stages.Lowered]
  model_flops: int
  run_flops: int
  images: int
  cache: frozenset[int] = frozenset()
  dtype: str = "float32"


# --- programs ----------------------------------------------------------------


def _rows(tree: Any, count: int, mesh: Mesh) -> Any:
  """Returns shapes of `count` rows, each shaped like an array's first row."""
  rows = sharding.rows(mesh)
  shape = lambda a: (count, *a.shape[1:])
  struct = lambda a: jax.ShapeDtypeStruct(shape(a), a.dtype, sharding=rows)
  return jax.tree.map(struct, tree)


def train_program(stage: Stage, mesh: Mesh) -> Program:
  """Traces the train step of `train.fit` on batches of tokens."""
  config = stage.train
  sharding.check_batch(mesh, config.batch_size, config.accumulate)
  model = weights.abstract(lambda rngs: build.tensorar(stage, rngs))
  task = loop.make_task(stage, pathlib.Path(), model, images=False)
  tx, state = loop.make_layout(stage, model, mesh)
  step, count = loop.make_step(stage, model, task, tx, state)
  tokens = np.zeros((1, model.num_tokens, len(model.vocab_sizes)), np.int32)
  example = build.conditioning(stage.conditioning).example()
  batch = {"tokens": tokens, "cond": example}
  batch = _rows(batch, config.batch_size, mesh)
  with jax.set_mesh(mesh):
    traced = step.trace(state, None, batch)
  model_flops = count(state, None, batch)

  def lower():
    with jax.set_mesh(mesh):
      return traced.lower()

  run_flops = _flops(traced)
  return Program(
    name="train step",
    lower=lower,
    model_flops=model_flops,
    run_flops=run_flops,
    images=config.batch_size,
    dtype=model.backbone.dtype,
  )


def sampler_program(stage: Stage, mesh: Mesh, batch_size: int) -> Program:
  """Traces `sampling.generate` for `batch_size` images.

  The parallel decoder takes as many steps as its guesses ask for; one counts.
  Guesses from marginals are replaced by those from the token above.
  """
  parts = sharding.row_parts(mesh)
  if batch_size % parts:
    raise ValueError(
      f"--batch_size={batch_size} on a mesh of {dict(mesh.shape)}: expected a"
      f" multiple of data * fsdp = {parts}."
    )
  model = weights.abstract(lambda rngs: build.tensorar(stage, rngs))
  skeleton, params, frozen = weights.split(model)
  conditioning = build.conditioning(stage.conditioning)
  example = conditioning.example()
  cond, null, index = _rows(
    (example, conditioning.null(example), np.zeros(1, np.int32)),
    batch_size,
    mesh,
  )
  rng = jax.eval_shape(lambda: jax.random.key(0))
  config = stage.sampling
  if config.first_guess == "marginals":  # a table of them is not a shape
    config = dataclasses.replace(config, first_guess="above")
  placed = _decoder(stage, mesh)
  traced = sampling.trace(placed, cond, null, rng, config, index)
  both = 2 if config.guided else 1
  is_parallel = config.decoder == "parallel"
  spare = config.rows if is_parallel else 0
  _, cache = jax.eval_shape(
    lambda arrays, cond: skeleton.merge(arrays).backbone.prefill(cond, spare),
    {**params, **frozen},
    _rows(example, both * batch_size, mesh),
  )
  spec = PartitionSpec(None, *sharding.HEADS, None, None)
  sizes = set()
  for array in jax.tree.leaves((cache.k, cache.v)):
    split = NamedSharding(mesh, sharding.fit(spec, array.shape, mesh))
    whole = math.prod(split.shard_shape(array.shape))
    sizes |= {whole, whole // array.shape[0]}  # all layers, or a single one
  count = _flops(traced, while_runs=1 if is_parallel else None)
  return Program(
    name=f"sampler, one step, m={spare}" if is_parallel else "sampler",
    lower=traced.lower,
    model_flops=count,
    run_flops=count,
    images=batch_size,
    cache=frozenset(sizes),
    dtype=model.backbone.dtype,
  )


def _decoder(stage: Stage, mesh: Mesh) -> nnx.Module:
  """Builds a stage's model of shapes, its layers as `sampling.prepare` does.

  Unlike `prepare`, it neither transposes weights for a CPU nor converts dtypes.
  """
  single = sharding.platform_of(mesh.devices.flat[0]) == "gpu"

  def make(rngs):
    model = build.model(stage, rngs)
    return layers.single_layers(model) if single else model

  model = weights.abstract(make)
  skeleton, params, frozen = weights.split(model)
  return skeleton.merge(sharding.layout({**params, **frozen}, model, mesh))


def _flops(traced: jax.stages.Traced, while_runs: int | None = None) -> int:
  run = core.jaxpr_as_fun(traced.jaxpr)
  inputs = traced.jaxpr.in_avals
  return flops.matmul_flops(run, *inputs, while_runs=while_runs)


# --- reports -----------------------------------------------------------------


def measure(program: Program, target: targets.Target) -> dict:
  """Reports what a program needs on each device, or why it does not compile."""
  report = {
    **{"program": program.name, "images": program.images},
    "model_flops": program.model_flops,
    "flops": program.run_flops / len(target.devices),
    "products": chips.products_of(
      program.dtype, sharding.platform_of(target.devices[0])
    ),
  }
  started = time.monotonic()
  lowered = program.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    return {**report, "fits": False, "reason": reason}
  report["compile_seconds"] = time.monotonic() - started
  stats = compiled.memory_analysis()
  memory = {n: getattr(stats, f"{n}_size_in_bytes") for n in MEMORY}
  parts = memory["argument"] + memory["output"] + memory["temp"]
  peak = getattr(stats, "peak_memory_in_bytes", 0)
  memory["peak"] = max(peak, parts - memory["alias"])
  limit = target.chip.hbm_bytes if target.chip else math.inf
  text = hlo.parse(compiled.as_text() or "")
  collectives = hlo.collectives(text, len(target.devices))
  xla = compiled.cost_analysis() or {}
  names = {"flops": "flops", "bytes": "bytes accessed"}
  report |= {
    "fits": memory["peak"] <= limit,
    "memory": memory,
    "bytes": hlo.bytes_moved(text),
    "sent": sum(row["bytes"] for row in collectives),
    "collectives": collectives,
    "loops_of_unknown_length": sorted(text.runs()[1]),
    "xla": {k: xla[name] for k, name in names.items() if name in xla},
  }
  if program.cache:
    report["cache_copies"] = hlo.copies_in_loops(text, set(program.cache))
  return report | _roofline(report, target)


def _roofline(report: Mapping, target: targets.Target) -> dict:
  """Returns the seconds each resource is busy, the longest, and the MFU."""
  chip = target.chip
  if chip is None:
    return {}
  rate = chip.peak(report["products"])
  rates = rate, chip.hbm_bandwidth, chip.link_bandwidth
  names = "flops", "bytes", "sent"
  busy = {name: report[name] / rate for name, rate in zip(names, rates)}
  seconds = max(busy.values())
  peak = seconds * rate * len(target.devices)
  mfu = report["model_flops"] / peak
  return {"busy_seconds": busy, "seconds": seconds, "mfu": mfu}


def table(report: Mapping) -> str:
  """Formats the report of a target for a console."""
  lines = [
    f"stage {report['stage']} on {report['target']}: {report['devices']}"
    f" devices, mesh {report['mesh']}"
  ]
  for one in report["programs"]:
    lines += ["", f"{one['program']}, {one['images']} images"]
    lines += [f"  {name:<24} {value}" for name, value in _words(one, report)]
  return "\n".join([*lines, "", ASSUMPTIONS])


def _words(one: Mapping, report: Mapping):
  """Yields the (name, value) lines about a program."""
  yield "fits", "yes" if one["fits"] else f"NO {one.get('reason', '')}"
  yield "model TFLOPs", f"{one['model_flops'] / 1e12:.4g}"
  yield "TFLOPs a device", f"{one['flops'] / 1e12:.4g}"
  yield "products of", one["products"]
  if "memory" not in one:
    return
  limit = report["hbm_bytes"]
  room = f" of {limit / 1e9:.2f}" if limit else ", no limit known"
  for name, value in one["memory"].items():
    suffix = room if name == "peak" else ""
    yield f"{name}, GB a device", f"{value / 1e9:.3f}{suffix}"
  yield "GB moved a device", f"{one['bytes'] / 1e9:.4g}"
  xla = [f"{name} {value:.4g}" for name, value in one["xla"].items()]
  yield "XLA, each loop once", ", ".join(xla) or "not reported"
  for row in one["collectives"]:
    sent = f"{row['count']} times, {row['bytes'] / 1e9:.3f} GB sent"
    yield f"{row['kind']} {row['dtype']}", sent
  if one["loops_of_unknown_length"]:
    loops = one["loops_of_unknown_length"]
    yield "counted once", f"{loops}, length unknown"
  if "cache_copies" in one:
    yield "copies of the cache", f"{one['cache_copies']} in the loops"
  if "mfu" in one:
    busy = [f"{k} {v:.4g}" for k, v in one["busy_seconds"].items()]
    yield "roofline, seconds", f"{one['seconds']:.4g} ({', '.join(busy)})"
    yield "images/s", f"{one['images'] / one['seconds']:.4g}"
    yield "MFU", f"{one['mfu']:.1%}"
  yield "compiled in", f"{one['compile_seconds']:.0f} s"


def report(
  stages: Mapping[str, Stage],
  name: str | None,
  target: targets.Target,
  batch_size: int | None = None,
  output: str | None = None,
) -> dict:
  """Compiles a stage's programs for a target, prints and returns the report.

  Args:
    stages: the stages of an experiment.
    name: the stage; None is the last one that generates images.
    target: a target from `targets.find`.
    batch_size: images sampled at once; by default as many as --mode=sample.
    output: a JSON file for the report, which must not exist.

  Raises:
    ValueError: a program does not fit; the report is printed and written
      first.
  """
  path = pathlib.Path(output) if output else None
  if path and path.exists():
    raise ValueError(f"--output={path} is there already: name a new file.")
  known = [n for n, s in stages.items() if s.objective == "tensorar"]
  chosen: str = choose("--stage", name or known[-1], known)
  stage, devices = stages[chosen], len(target.devices)
  mesh = sharding.make_mesh(stage.mesh, target.devices)
  batch_size = batch_size or IMAGES_PER_DEVICE * devices
  programs = (
    train_program(stage, mesh),
    sampler_program(stage, mesh, batch_size),
  )
  results = {
    "stage": chosen,
    "target": target.name,
    "devices": devices,
    "device_kind": target.devices[0].device_kind,
    "mesh": dict(mesh.shape),
    "hbm_bytes": target.chip and target.chip.hbm_bytes,
    "jax": jax.__version__,
    "programs": [measure(program, target) for program in programs],
    "assumptions": ASSUMPTIONS,
  }
  print(table(results))
  if path:
    files.remove_leftovers_of(path)
    files.write_json(path, results, new=True)
  names = [one["program"] for one in results["programs"] if not one["fits"]]
  if names:
    raise ValueError(
      f"{target.name}: {' and '.join(names)} of stage {chosen} do not fit into"
      " a device; see above. Split the model further with config.mesh.fsdp or"
      " .tensor, set config.train.remat and .accumulate, or use a smaller"
      " batch."
    )
  return results
