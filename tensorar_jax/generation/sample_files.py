"""Classes or prompts -> image files: `--mode=sample`, for ten or for 50,000.

A folder of samples holds

  settings.json   what the images depend on; claims the folder
  images-*.npy    shards, until the run is complete
  samples.npz     arr_0 uint8 [n, h, w, C], arr_1 int64 [n], not compressed:
                  the layout of the ADM evaluation suite; arr_1 holds classes,
                  or numbers of prompts where images are made from text
  manifest.json   the settings, and the digest of the npz; written last
  grid.png, refinement.png and .gif, 000000.png or prompt_000_image_00.png, ...
                  or, instead of these, the files of a benchmark's layout

Image i depends on (seed, i) and its class or prompt alone, so any process can
draw a shard on any devices, and shards that are missing after a kill are drawn
again to the same bytes. Memory holds two batches, for any number of images;
the disk holds the images twice while the npz is put together.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import math
import os
import pathlib
import platform
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

from tensorar_jax.checkpoints import files, locks, orbax_io, resumable
from tensorar_jax.data import encoder
from tensorar_jax.experiment import build, saved
from tensorar_jax.experiment.schema import Stage, choose
from tensorar_jax.generation import batches, guesses, npz, pictures
from tensorar_jax.generation.requests import Request, condition
from tensorar_jax.interfaces import Samples, Tokenizer
from tensorar_jax.parallel import sharding

MANIFEST = "manifest.json"
FORMAT = 1
SHARD_SIZE = 500  # images: what a killed run may lose
BATCH_PER_DEVICE = 32
PNGS_UP_TO = 1000  # images are also written one by one, unless told otherwise

Images = UInt8[np.ndarray, "b h w C"]
# (labels, first) -> batches of the images first, first + 1, ...
Draw = Callable[[Int[np.ndarray, "n"], int], Iterator[tuple[Images, Samples]]]
Overview = Callable[[Images, Int[np.ndarray, "n T k F"]], None]


@dataclasses.dataclass(frozen=True)
class Target:
  """Where the files of a run go."""

  folder: pathlib.Path
  npz: pathlib.Path

  @property
  def complete(self) -> bool:
    return self.npz.exists() and (self.folder / MANIFEST).exists()


def sample(
  stages: Mapping[str, Stage],
  workdir: pathlib.Path,
  request: Request,
  *,
  stage: str | None = None,
  output: str | os.PathLike | None = None,
  batch_size: int | None = None,
  pngs: bool | None = None,
) -> Target:
  """Samples a trained stage into files, or goes on where that was stopped.

  Args:
    stages: of an experiment.
    workdir: the folder that holds the stages' folders.
    request: which images.
    stage: its name; by default the last one that can be sampled.
    output: a folder, or NAME.npz with the other files in the folder NAME; by
      default `<stage>/samples/<number>`, a new number for other settings.
    batch_size: images at once, over this process's devices.
    pngs: whether to write PNGs too; a layout always does. By default up to
      PNGS_UP_TO images.

  Raises:
    ValueError: bad options, another run writes to `output` or has filled it, or
      a finished file of this run is damaged.
  """
  if batch_size is not None and batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: expected at least 1.")
  worker = resumable.Worker.of_this_process()
  if output:
    with resumable.holding(_target(output).folder, worker):
      pass  # asked at once: loading a model takes its time
  name = drawable(stages, stage)
  chosen, stage_folder = stages[name], workdir / name
  checkpoint = saved.trained(stage_folder, request.step)
  mesh = sharding.local_mesh(chosen.mesh)
  conditioning, described = condition(request, name, chosen, mesh)
  tokenizer = build.frozen_tokenizer(chosen, workdir)
  sampling = chosen.sampling
  labels = request.labels(conditioning.num_classes)
  settings = {
    "format": FORMAT,
    "stage": name,
    "shard_size": SHARD_SIZE,
    **dataclasses.asdict(request),
    **described,
    "sampling": dataclasses.asdict(sampling),
    "checkpoint": _checkpoint(chosen, checkpoint),
    "tokenizer": encoder.identity(tokenizer),
    "software": software(),
  }
  settings = files.as_json(settings)
  target = choose_target(
    output, stage_folder / "samples", settings, worker.count
  )
  with resumable.holding(target.folder, worker):
    _remove_leftovers(target)
    completes = worker.is_first
    if target.complete:
      _check_finished(target)
    else:
      model = build.load_tensorar(chosen, checkpoint, mesh)
      sampler = batches.Sampler(
        model,
        conditioning,
        sampling,
        request.seed,
        mesh,
        guesses.load(stage_folder, sampling),
      )
      draw = _drawing(
        sampler, tokenizer, len(labels), request.resize, batch_size
      )
      overview = functools.partial(
        _save_overview, target.folder, tokenizer, request
      )
      completes = write(
        draw, labels, target, settings, overview=overview, worker=worker
      )
    if pngs is None:
      pngs = len(labels) <= PNGS_UP_TO
    if completes and (pngs or request.layout):
      write_pngs(target, len(labels), request)
  if target.complete:
    print(f"{len(labels)} images of {name}: {target.npz}")
  return target


def drawable(stages: Mapping[str, Stage], stage: str | None) -> str:
  """The name of a stage that draws images, by default of the last one."""
  known = [n for n, s in stages.items() if s.objective == "tensorar"]
  return choose("--stage", stage or known[-1], known)


def _drawing(sampler, tokenizer, num_images, resize, batch_size) -> Draw:
  """A function that draws a shard, in batches of about equal size."""
  shard_size = min(SHARD_SIZE, num_images)
  largest = batch_size or BATCH_PER_DEVICE * jax.local_device_count()
  num_batches = math.ceil(shard_size / largest)
  batch_size = math.ceil(shard_size / num_batches)
  size = (resize, resize) if resize else None
  # Replicated once here, not for every shard.
  tokenizer = sharding.replicate(tokenizer, sampler.mesh)
  return lambda labels, first: sampler.images(
    tokenizer, labels, batch_size, first, size
  )


def _checkpoint(stage: Stage, checkpoint: pathlib.Path) -> dict[str, Any]:
  """Identifies the weights: step, EMA or not, metadata of the checkpoint."""
  weights = {"step": int(checkpoint.name), "ema": stage.is_averaged}
  return weights | orbax_io.read_meta(checkpoint)


def software() -> dict[str, Any]:
  """Versions and settings that the last bits of images and features need."""
  packages = ("jax", "jaxlib", "flax", "numpy")
  versions = {name: importlib.metadata.version(name) for name in packages}
  return {
    "python": platform.python_version(),
    **versions,
    "device": jax.local_devices()[0].device_kind,
    "matmul_precision": jax.config.values["jax_default_matmul_precision"],
  }


# --- files -------------------------------------------------------------------


def choose_target(
  output: str | os.PathLike | None,
  numbered: pathlib.Path,
  settings: dict[str, Any],
  process_count: int = 1,
) -> Target:
  """Where a run goes; ValueError if anything else is there.

  Without `output` it is the folder of `numbered` that has these settings, or
  else a new one.
  """
  if output is None and process_count > 1:
    raise ValueError(
      f"{process_count} processes sample together: name the folder that they"
      " share with --output."
    )
  target = _target(output or _numbered_folder(numbered, settings))
  folder = target.folder
  if not (folder / resumable.SETTINGS).exists():
    present = [target.npz] if target.npz.exists() else folder.glob("*")
    # Another process may be about to claim it for the same settings.
    ours = (resumable.SETTINGS, ".lock")
    present = [p for p in present if not p.name.startswith(ours)]
    if present:
      raise ValueError(
        f"{present[0]} is there already, and not from this run: name a new"
        " --output."
      )
  resumable.claim_settings(folder, settings, "samples")
  return target


def _target(output: str | os.PathLike) -> Target:
  """The files of --output, a folder or an .npz beside which there is one."""
  path = pathlib.Path(output).absolute()
  if path.suffix == ".npz":
    return Target(path.with_suffix(""), path)
  return Target(path, path / "samples.npz")


def _numbered_folder(
  parent: pathlib.Path, settings: dict[str, Any]
) -> pathlib.Path:
  """The folder of these settings, made and claimed if there is none."""
  parent.mkdir(parents=True, exist_ok=True)
  with locks.lock(parent / ".lock"):  # two runs with equal settings meet in one
    for folder in sorted(p for p in parent.glob("*") if p.name.isdigit()):
      file = folder / resumable.SETTINGS
      if files.read_json(file, default=None) == settings:
        return folder
    folder = resumable.new_folder(parent)
    resumable.claim_settings(folder, settings, "samples")
  return folder


def _check_finished(target: Target) -> None:
  """ValueError if the npz of a complete run is not as its manifest says."""
  manifest = files.read_json(
    target.folder / MANIFEST,
    {"npz": str, "sha256": str},
    remedy="Remove it to have the images drawn again.",
  )
  check_digest(target.npz, files.sha256(target.npz), manifest)


def check_digest(
  path: pathlib.Path, digest: str, manifest: Mapping[str, Any]
) -> None:
  """ValueError unless a sample file has the digest that its manifest says."""
  if digest != manifest["sha256"]:
    raise ValueError(
      f"{path} is damaged: its sha256 is {digest}, {MANIFEST} says"
      f" {manifest['sha256']}. Restore it, or remove it to have the images"
      " drawn again."
    )


def _remove_leftovers(target: Target) -> None:
  """Removes what killed processes left half-written, layouts included."""
  files.remove_leftovers(target.folder.rglob("*"))
  files.remove_leftovers_of(target.npz)


def write(
  draw: Draw,
  labels: Int[np.ndarray, "n"],
  target: Target,
  settings: dict[str, Any],
  *,
  overview: Overview | None = None,
  worker: resumable.Worker = resumable.Worker(),
) -> bool:
  """Draws this process's shards; joins the npz once all are there.

  Args:
    draw: yields (images, samples) in batches.
    labels: of all images of the run.
    target: of `choose_target`, for `settings`.
    settings: for the manifest; "shard_size" among them.
    overview: takes the first shard, and the drafts of the very first images.
    worker: this process, of those that work on the same run.

  Returns:
    Whether this process has completed the run; if not, others have still to
    finish or have completed it.
  """
  name, size = "images-{}.npy", settings["shard_size"]
  shards = resumable.shards(target.folder, name, len(labels), size)
  missing = resumable.to_do(shards, worker)
  # Asked last: whoever completes a run removes its shards afterwards.
  if target.complete:
    return worker.is_first
  logging.info(
    "%s: %d of %d shards are there; this process draws %d, %d images",
    target.folder,
    sum(file.exists() for file in shards),
    len(shards),
    len(missing),
    sum(map(len, missing.values())),
  )
  progress = resumable.Progress("sample", sum(map(len, missing.values())))
  for file, positions in missing.items():
    drawn_batches = draw(
      labels[positions.start : positions.stop], positions.start
    )
    first = overview if positions.start == 0 else None
    _write_shard(file, len(positions), drawn_batches, progress, first)
  # The last to draw, or the first process where nothing was left to draw.
  completes = bool(missing) or worker.is_first
  if target.complete or not resumable.all_there(target.folder, list(shards)):
    return False
  if completes:
    _complete(target, list(shards), labels, settings)
  return completes


def _write_shard(file, count, drawn_batches, progress, overview) -> None:
  """Writes one shard, or leaves a `.partial` file if it is interrupted."""
  drafts = []

  def images():
    for batch, drawn in drawn_batches:
      if overview and (rows := batches.STRIPS - sum(map(len, drafts))) > 0:
        drafts.append(np.asarray(drawn.drafts)[:rows])
      yield batch
      progress.add(len(batch))

  with files.replacing(file, sync=True) as partial:
    with partial.open("wb") as out:
      npz.write_shard(out, count, images())
    if overview:
      overview(np.load(partial, mmap_mode="r"), np.concatenate(drafts))


def _complete(target, shards, labels, settings) -> None:
  """Joins the shards to the npz, writes the manifest, removes the shards."""
  try:
    with files.replacing(target.npz, sync=True) as partial:
      shape = npz.join_shards(partial, shards, labels)
      digest = files.sha256(partial)
  except FileNotFoundError:
    if not target.complete:  # by another process, at the same moment
      raise
    return
  result = {"npz": target.npz.name, "sha256": digest, "shape": shape}
  if not settings.get("prompts"):
    counts = np.unique(labels, return_counts=True)[1]
    result["classes_drawn"] = len(counts)
    result["images_per_class"] = [int(counts.min()), int(counts.max())]
  files.write_json(target.folder / MANIFEST, settings | result)
  for file in target.folder.glob("images-*.npy"):
    file.unlink(missing_ok=True)
  _remove_leftovers(target)


# --- pictures ----------------------------------------------------------------


def write_pngs(target: Target, num_images: int, request: Request) -> None:
  """Writes the images of the npz one by one; existing files are kept."""
  parts = [
    part
    for part in resumable.positions(num_images, request.together)
    if not all((target.folder / name).exists() for name in request.names(part))
  ]
  progress = resumable.Progress("PNG files", sum(map(len, parts)))
  read = npz.SampleFile(target.npz).read(parts)

  def write_part(part: range, images: Images) -> None:
    contents = request.contents(part, images)
    for name, content in zip(request.names(part), contents, strict=True):
      _write_picture(target.folder / name, content)

  with futures.ThreadPoolExecutor() as pool:
    group_size = math.ceil(100 / request.together)
    for group in resumable.positions(len(parts), group_size):
      chosen = parts[group.start : group.stop]
      images = list(itertools.islice(read, len(chosen)))
      list(pool.map(write_part, chosen, images))
      progress.add(sum(map(len, chosen)))


def _write_picture(path: pathlib.Path, content: np.ndarray | str) -> None:
  if path.exists():
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.replacing(path) as partial:
    if isinstance(content, str):
      partial.write_text(content, "utf-8")
    else:
      pictures.save_image(partial, content)


def _save_overview(
  folder: pathlib.Path,
  tokenizer: Tokenizer,
  request: Request,
  images: Images,
  drafts: Int[np.ndarray, "n T k F"],
) -> None:
  """Draws the grid of the first images and, for k > 1, a few refinements."""
  if request.layout:
    return  # an image of the layout may have the name of one of these
  grid, titles = request.grid(images)
  pictures.save_sample_grids(folder / "grid.png", {"": grid}, titles)
  if drafts.shape[2] > 1:
    strip, changed = batches.refinement(tokenizer, drafts)
    strips, changed = {"": strip}, {"": changed}
    pictures.save_refinement(folder / "refinement.png", strips, changed)
    pictures.save_refinement_gif(folder / "refinement.gif", strips, changed)
