"""Classes or prompts -> image files: `--mode=sample`, for ten or for 50,000.

A folder of samples holds

  settings.json   what the images depend on; claims the folder
  images-*.npy    shards, until the run is complete
  samples.npz     arr_0 uint8 [n, h, w, C], arr_1 int64 [n], not compressed:
                  the layout of the ADM evaluation suite; for classes read
                  numbers of prompts where images are made from text
  manifest.json   the settings, and the digest of the npz; written last
  grid.png, refinement.png and .gif, 000000.png or prompt_000_image_00.png, ...
                  or, instead of these, the files of a benchmark's layout

Image i comes from (seed, i) and its class or prompt alone, so shards can be
drawn by any process on any devices, and what is missing after a kill is drawn
again to the same bytes. Memory holds two batches, whatever the number of
images; the disk twice the images while the npz is put together.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
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

from tensorar_jax.checkpoints import files, orbax_io, resumable
from tensorar_jax.data import encoder
from tensorar_jax.experiment import build
from tensorar_jax.experiment.schema import Stage
from tensorar_jax.generation import batches, npz, pictures
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
class Place:
  """Where the files of a run are."""

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
) -> Place:
  """Samples a trained stage into files, or goes on where that was stopped.

  Args:
    stages: of an experiment.
    workdir: the folder that holds the stages'.
    request: which images.
    stage: its name; by default the last one that can be sampled.
    output: a folder, or NAME.npz with the other files in the folder NAME; by
      default `<stage>/samples/<number>`, a new number for other settings.
    batch_size: images at once, over this process's devices.
    pngs: whether images are PNGs too; default: up to PNGS_UP_TO, and layouts.
  """
  if batch_size is not None and batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: expected at least 1.")
  name = drawable(stages, stage)
  chosen, home = stages[name], workdir / name
  found = orbax_io.find(home, request.step)
  mesh = sharding.local_mesh(chosen.mesh)
  conditioning, made_of = condition(request, name, chosen, mesh)
  tokenizer = build.frozen_tokenizer(chosen, workdir)
  sampling = chosen.sampling
  labels = request.labels(conditioning.num_classes)
  settings = {
    **{"format": FORMAT, "stage": name, "shard_size": SHARD_SIZE},
    **dataclasses.asdict(request),
    **made_of,
    "sampling": dataclasses.asdict(sampling),
    "checkpoint": _checkpoint(chosen, found),
    "tokenizer": encoder.identity(tokenizer),
    "software": software(),
  }
  settings = files.as_json(settings)
  share = jax.process_index(), jax.process_count()
  place = choose_place(output, home / "samples", settings, share[1])
  last = share[0] == 0
  if not place.complete:
    sampler = batches.Sampler(
      build.load_stage(chosen, found, mesh),
      conditioning,
      sampling,
      request.seed,
      mesh,
    )
    draw = _drawing(sampler, tokenizer, len(labels), request.resize, batch_size)
    overview = functools.partial(
      _save_overview, place.folder, tokenizer, request
    )
    last = write(draw, labels, place, settings, overview=overview, share=share)
  few = len(labels) <= PNGS_UP_TO if pngs is None else pngs
  if last and (few or request.layout):
    write_pngs(place, len(labels), request)
  if place.complete:
    print(f"{len(labels)} images of {name}: {place.npz}")
  return place


def drawable(stages: Mapping[str, Stage], stage: str | None) -> str:
  """The stage, by default the last one that draws images."""
  known = [n for n, s in stages.items() if s.objective == "tensorar"]
  return build.choose("--stage", stage or known[-1], known)


def _drawing(sampler, tokenizer, num_images, resize, batch_size) -> Draw:
  """What draws the images of a shard, in batches of about equal size."""
  shard = min(SHARD_SIZE, num_images)
  most = batch_size or BATCH_PER_DEVICE * jax.local_device_count()
  batch_size = -(-shard // -(-shard // most))
  size = (resize, resize) if resize else None
  # Once here, and not for every shard.
  tokenizer = sharding.replicate(tokenizer, sampler.mesh)
  return lambda labels, first: sampler.images(
    tokenizer, labels, batch_size, first, size
  )


def _checkpoint(stage: Stage, found: pathlib.Path) -> dict[str, Any]:
  """Which weights: the metadata of the checkpoint, its step, EMA or not."""
  own = {"step": int(found.name), "ema": stage.is_averaged}
  return own | orbax_io.read_meta(found)


def software() -> dict[str, Any]:
  """What else the last bits of an image, or of its features, depend on."""
  packages = ("jax", "jaxlib", "flax", "numpy")
  versions = {name: importlib.metadata.version(name) for name in packages}
  return {
    "python": platform.python_version(),
    **versions,
    "device": jax.local_devices()[0].device_kind,
    "matmul_precision": jax.config.jax_default_matmul_precision,
  }


# --- files -------------------------------------------------------------------


def choose_place(
  output: str | os.PathLike | None,
  numbered: pathlib.Path,
  settings: dict[str, Any],
  process_count: int = 1,
) -> Place:
  """The place of a run; ValueError if it holds anything else.

  Without `output` it is the folder of `numbered` that has these settings, or
  else a new one.
  """
  if output is None and process_count > 1:
    raise ValueError(
      f"{process_count} processes sample together: name the folder that they"
      " share with --output."
    )
  path = pathlib.Path(output or _number(numbered, settings))
  path = path.expanduser().absolute()
  is_file = path.suffix == ".npz"
  folder = path.with_suffix("") if is_file else path
  place = Place(folder, path if is_file else folder / "samples.npz")
  if not (folder / resumable.SETTINGS).exists():
    there = [place.npz] if place.npz.exists() else folder.glob("*")
    # Another process may be about to claim it for the same settings.
    there = [p for p in there if not p.name.startswith(resumable.SETTINGS)]
    if there:
      raise ValueError(
        f"{there[0]} is there already, and not from this run: name a new"
        " --output."
      )
  resumable.claim_settings(folder, settings, "samples")
  return place


def _number(parent: pathlib.Path, settings: dict[str, Any]) -> pathlib.Path:
  folders = sorted(p for p in parent.glob("*") if p.name.isdigit())
  for folder in folders:
    file = folder / resumable.SETTINGS
    if files.read_json(file, default=None) == settings:
      return folder
  last = max((int(folder.name) for folder in folders), default=-1)
  return parent / f"{last + 1:03d}"


def write(
  draw: Draw,
  labels: Int[np.ndarray, "n"],
  place: Place,
  settings: dict[str, Any],
  *,
  overview: Overview | None = None,
  share: tuple[int, int] = (0, 1),
) -> bool:
  """Draws this process's shards; puts the npz together once all are there.

  Args:
    draw: yields (images, samples) in batches.
    labels: of all images of the run.
    place: of `choose_place`, for `settings`.
    settings: what the manifest says, and "shard_size".
    overview: takes the first shard, and the drafts of the very first images.
    share: (index, count) of the processes that work on the same place.

  Returns:
    Whether this process has completed the run. Others have still to finish, or
    have completed it, if not.
  """
  resumable.check_share(*share)
  name, size = "images-{}.npy", settings["shard_size"]
  shards = resumable.shards(place.folder, name, len(labels), size)
  missing = resumable.to_do(shards, *share)
  # Asked last: who completes a run removes its shards after that.
  if place.complete:
    return share[0] == 0
  logging.info(
    "%s: %d of %d shards of %d images are there, this process draws %d",
    place.folder,
    sum(file.exists() for file in shards),
    len(shards),
    size,
    len(missing),
  )
  progress = resumable.Progress("sample", sum(map(len, missing.values())))
  for file, positions in missing.items():
    drawn_batches = draw(
      labels[positions.start : positions.stop], positions.start
    )
    first = overview if positions.start == 0 else None
    _write_shard(file, len(positions), drawn_batches, progress, first)
  # The last to draw, or the first process where nothing was left to draw.
  last = bool(missing) or share[0] == 0
  if place.complete or not resumable.all_there(place.folder, list(shards)):
    return False
  if last:
    _complete(place, list(shards), labels, settings)
  return last


def _write_shard(file, count, drawn_batches, progress, overview) -> None:
  """One shard under its name, or nothing but a `.partial` file."""
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


def _complete(place, shards, labels, settings) -> None:
  """Joins the shards to the npz, writes the manifest, removes the shards."""
  try:
    with files.replacing(place.npz, sync=True) as partial:
      shape = npz.join(partial, shards, labels)
      with partial.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
  except FileNotFoundError:
    if not place.complete:  # by another process, at the same moment
      raise
    return
  result = {"npz": place.npz.name, "sha256": digest, "shape": shape}
  if not settings.get("prompts"):
    counts = np.unique(labels, return_counts=True)[1]
    result["classes_drawn"] = len(counts)
    result["images_per_class"] = [int(counts.min()), int(counts.max())]
  files.write_json(place.folder / MANIFEST, settings | result)
  old = (
    *place.folder.glob("images-*.npy*"),
    *place.npz.parent.glob(f"{place.npz.name}.*.partial"),
  )
  for file in old:
    file.unlink(missing_ok=True)


# --- pictures ----------------------------------------------------------------


def write_pngs(place: Place, num_images: int, request: Request) -> None:
  """The images of the npz in files of their own; those that are there stay."""
  parts = [
    part
    for part in resumable.positions(num_images, request.together)
    if not all((place.folder / name).exists() for name in request.names(part))
  ]
  progress = resumable.Progress("PNG files", sum(map(len, parts)))
  read = npz.SampleFile(place.npz).read(parts)

  def write_part(part: range, images: Images) -> None:
    contents = request.contents(part, images)
    for name, content in zip(request.names(part), contents, strict=True):
      _write_picture(place.folder / name, content)

  with futures.ThreadPoolExecutor() as pool:
    for some in resumable.positions(len(parts), -(-100 // request.together)):
      chosen = parts[some.start : some.stop]
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
  """The grid of the first images and, for k > 1, the refinement of a few."""
  if request.layout:
    return  # An image there may have the name of one of these.
  grid, titles = request.grid(images)
  pictures.save_sample_grids(folder / "grid.png", {"": grid}, titles)
  if drafts.shape[2] > 1:
    strip, changed = batches.refinement(tokenizer, drafts)
    shown = {"": strip}, {"": changed}
    pictures.save_refinement(folder / "refinement.png", *shown)
    pictures.save_refinement_gif(folder / "refinement.gif", *shown)
