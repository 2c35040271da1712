"""Sample files against a reference batch, as the ADM suite compares them.

FID, sFID, Inception Score, precision and recall of an .npz of images, made here
or elsewhere, in the features of the Inception network of FID. The folder of a
measurement holds

  settings.json     what the numbers depend on, with digests; claims the folder
  features-*.npz    shards of features, until all is measured
  metrics.json      every number with its interval, and where it comes from
  metrics.md        the same as a table

Shards have a fixed size, so numbers do not depend on batches, devices or
processes, and a killed run continues. The features of the reference are kept
beside it. Memory holds all features, 20 KB for an image.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from tensorar_jax.checkpoints import files, hub, resumable
from tensorar_jax.evaluation import (
  adm,
  extractor,
  inception,
  metrics,
  tables,
)
from tensorar_jax.evaluation.metrics import METRICS, FeatureSet
from tensorar_jax.experiment.schema import Stage
from tensorar_jax.generation import npz, sample_files
from tensorar_jax.method.drawing import Guidance, guidance_text
from tensorar_jax.parallel import processes

FORMAT = 1
SHARD_SIZE = 512  # images: what a killed run may lose
# On a CPU a larger batch is no faster, and takes gigabytes.
BATCH_PER_DEVICE = {"cpu": 16}
KINDS = ("pool", "spatial", "logits")
# What distances are called in the features of Inception.
INCEPTION_NAMES = {"frechet": "fid", "spatial_frechet": "sfid"}
# What is read again of metrics.json, and of the overview of a sweep.
RECORD = {"metrics": {...: {"value": float}}, "num_images": int}
NOTES = (
  "std is over bootstrap resamples of the images, interval is value -+ 1.96 of"
  " it; network, manifolds and the reference's statistics are taken as exact.",
  "precision and recall are exact; the ADM suite rounds distances to float16"
  " and differs in the third decimal.",
  "FID falls with the number of images: compare only equal numbers.",
)


class Judge:
  """Measures any number of files; reads network and reference once.

  Args:
    reference: an .npz with images, with statistics of the suite, or with both.
    network: a published file of the Inception of FID, see `hub.find`, or its
      tensors by name.
    bootstrap: resamples for the intervals; 0 for none.
    batch_size: images at once, over the local devices.
    worker: this process, of those that work on the same folders.
  """

  def __init__(
    self,
    reference: str | os.PathLike,
    network: Any,
    *,
    bootstrap: int = 20,
    batch_size: int | None = None,
    worker: resumable.Worker = resumable.Worker(),
  ):
    if bootstrap < 0 or bootstrap == 1:
      raise ValueError(
        f"bootstrap={bootstrap}: expected at least 2 resamples, or 0 for none."
      )
    self.file, self.bootstrap = open_images(reference), bootstrap
    self.worker = worker
    is_file = isinstance(network, (str, os.PathLike))
    network = hub.find(os.fspath(network)) if is_file else network
    model = inception.load(network)
    devices = jax.local_devices()
    default = BATCH_PER_DEVICE.get(devices[0].platform, 64) * len(devices)
    # More than a shard would only be filled up.
    batch_size = min(batch_size or default, SHARD_SIZE)
    self.extractor = extractor.Extractor(model, batch_size)
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), "uint8")
    rows = jax.eval_shape(lambda image: vars(model(image)), image)
    self.widths = {kind: row.shape[1] for kind, row in rows.items()}
    self.network = _identity(network) if is_file else {"file": None}
    self.reference = _identity(reference) | {"shape": self.file.shape}
    self._features: FeatureSet | None = None

  def measure(
    self, samples: str | os.PathLike, folder: str | os.PathLike
  ) -> dict | None:
    """The record of a sample file, as in `folder/metrics.json`.

    None where other processes have still to do their part, or where
    this is not the first one. ValueError for files that cannot be compared, and
    for a folder that another run measures in.
    """
    file, folder = open_images(samples), pathlib.Path(folder)
    self._check(file)
    settings = {
      "format": FORMAT,
      "shard_size": SHARD_SIZE,
      "samples": _identity(samples) | {"shape": file.shape},
      "reference": self.reference,
      "inception": self.network,
      "bootstrap": self.bootstrap,
    }
    settings = files.as_json(settings)
    manifest = _manifest(file.path, settings["samples"]["sha256"])
    with resumable.holding(folder, self.worker):
      files.remove_leftovers(folder.iterdir())
      resumable.claim_settings(folder, settings, "measurements")
      return self._measure(file, folder, settings, manifest)

  def _measure(
    self,
    file: npz.SampleFile,
    folder: pathlib.Path,
    settings: dict,
    manifest: dict | None,
  ) -> dict | None:
    """Measures a file in a folder that this run holds."""
    done = folder / "metrics.json"
    if done.exists():
      logging.info("%s: measured before", done)
      return files.read_json(done, RECORD)
    started = time.monotonic()
    fake = self._extract(file, folder, KINDS)
    real = self._reference(folder)
    if fake is None or real is None or not self.worker.is_first:
      return None
    extracted = time.monotonic()
    measured = self._metrics(real, fake)
    seconds = {
      "features": round(extracted - started, 1),
      "metrics": round(time.monotonic() - extracted, 1),
    }
    record = {
      "metrics": measured,
      "num_images": len(file),
      "settings": settings,
      "manifest": manifest,
      "software": sample_files.software(),
      "seconds": seconds,
      "notes": NOTES,
    }
    files.write_json(done, record)
    text = table({file.path.name: record})
    files.write_text(folder / "metrics.md", f"{text}\n")
    for shard in folder.glob("features-*.npz"):
      shard.unlink(missing_ok=True)
    return record

  def _check(self, file: npz.SampleFile) -> None:
    """ValueError if the file and the reference cannot be compared."""
    check_images(self.file, file)
    if bool(file.statistics) == bool(self.file.statistics):
      return  # both from images, or both from statistics of the same network
    for checked in (file, self.file):
      for kind, gaussian in _gaussians(checked).items():
        if len(gaussian.mean) != self.widths[kind]:
          raise ValueError(
            f"{checked.path} has statistics of {len(gaussian.mean)} {kind}"
            f" features; this network makes {self.widths[kind]}: take a"
            " reference of the same network."
          )

  def _extract(
    self, file: npz.SampleFile, folder: pathlib.Path, kinds: Sequence[str]
  ) -> FeatureSet | None:
    """The features, from the shards that exist and the network for the rest.

    None where other processes have still to write theirs.
    """
    stored = _gaussians(file)
    if not len(file):
      return FeatureSet(stored=stored)
    name = "features-{}.npz"
    shards = resumable.shards(folder, name, len(file), SHARD_SIZE)
    missing = resumable.to_do(shards, self.worker)
    total = sum(map(len, missing.values()))
    progress = resumable.Progress(f"features of {file.path.name}", total)
    for shard, images in zip(missing, file.read(missing.values())):
      features = self.extractor.of(images)
      arrays = {kind: getattr(features, kind) for kind in kinds}
      files.write_arrays(shard, **arrays)
      progress.add(len(images))
    processes.wait_for_all(f"features of {file.path}")
    if not resumable.all_there(folder, list(shards)):
      return None
    arrays = {
      kind: np.empty((len(file), self.widths[kind]), np.float32)
      for kind in kinds
    }
    for shard, positions in shards.items():
      remedy = "Remove it to have the features extracted again."
      part = files.read_arrays(shard, kinds, remedy=remedy)
      for kind, array in arrays.items():
        array[positions.start : positions.stop] = part[kind]
    return FeatureSet(**arrays, stored=stored)

  def _reference(self, folder: pathlib.Path) -> FeatureSet | None:
    """The reference's features, kept beside it or else in `folder`."""
    if self._features is None:
      known = {"reference": self.reference, "inception": self.network}
      text = json.dumps([FORMAT, SHARD_SIZE, known], sort_keys=True)
      key = hashlib.sha256(text.encode()).hexdigest()[:8]
      cache = self.file.path.with_suffix(f".features-{key}")
      try:
        cache.mkdir(exist_ok=True)
      except OSError:  # a read-only file system
        cache = folder / "reference"
        cache.mkdir(exist_ok=True)
      files.remove_leftovers(cache.iterdir())
      kinds = ("pool",) if self.file.statistics else ("pool", "spatial")
      self._features = self._extract(self.file, cache, kinds)
    return self._features

  def _metrics(self, real: FeatureSet, fake: FeatureSet) -> dict[str, dict]:
    """{name: {"value", "std", "interval"}}; without a bootstrap the value."""
    compared = metrics.Comparison(real, fake)
    errors = {}
    if self.bootstrap:
      errors = compared.errors(self.bootstrap)
    entries = {}
    for name, value in compared.values().items():
      entry = {"value": value}
      entries[INCEPTION_NAMES.get(name, name)] = entry
      if name in errors:
        half = metrics.Z95 * errors[name]
        entry |= {"std": errors[name], "interval": [value - half, value + half]}
    return entries


def check_images(reference: npz.SampleFile, samples: npz.SampleFile) -> None:
  """ValueError if the images of two files differ in size, or are too few."""
  for file, other in ((samples, reference), (reference, samples)):
    if file.shape and other.shape:
      check_count(f"{file.path} holds", len(file))
  sizes = [f.shape[1:3] for f in (reference, samples) if f.shape]
  if len(set(sizes)) > 1:
    raise ValueError(
      f"{samples.path} holds images of {sizes[1]}, {reference.path} of"
      f" {sizes[0]}; expected one size: sample with --resize."
    )


def check_count(what: str, count: int) -> None:
  """ValueError for too few images to compare with others; `what` has them."""
  if count <= adm.NEIGHBOUR:
    raise ValueError(
      f"{what} {count} images: expected at least {adm.NEIGHBOUR + 1}, since"
      f" precision and recall look at the {adm.NEIGHBOUR} nearest others of"
      " each. Papers measure 50,000."
    )


def open_images(path: str | os.PathLike) -> npz.SampleFile:
  """Opens a file of images or statistics; ValueError if it cannot be used."""
  file = npz.SampleFile(path)
  if file.shape and file.shape[0] < 2:
    raise ValueError(
      f"{path} holds 1 image; expected at least 2, the least that has a"
      " covariance, and 4 for precision and recall."
    )
  if file.shape and file.shape[3] != 3:
    raise ValueError(
      f"{path} holds images with {file.shape[3]} channels; expected 3: repeat a"
      " grey channel three times."
    )
  return file


def _gaussians(file: npz.SampleFile) -> dict[str, adm.Gaussian]:
  """The statistics that a file holds, by kind of feature."""
  try:
    parts = [file.statistics[name] for name in npz.STATISTICS]
    return dict(pool=adm.Gaussian(*parts[:2]), spatial=adm.Gaussian(*parts[2:]))
  except KeyError:
    return {}
  except ValueError as error:
    raise ValueError(f"{file.path}: {error}") from error


def _identity(path: str | os.PathLike) -> dict[str, Any]:
  return {"file": pathlib.Path(path).name, "sha256": files.sha256(path)}


def _manifest(samples: pathlib.Path, digest: str) -> dict | None:
  """The manifest of a sample file that this project made, else None.

  ValueError if the file is not the one that it was made for.
  """
  for folder in (samples.with_suffix(""), samples.parent):
    manifest = files.read_json(folder / sample_files.MANIFEST, default=None)
    # Others call their files manifest.json, too.
    if isinstance(manifest, dict) and manifest.get("npz") == samples.name:
      sample_files.check_digest(samples, digest, manifest)
      return manifest
  return None


def default_folder(
  samples: str | os.PathLike, reference: str | os.PathLike
) -> pathlib.Path:
  """The folder of a measurement for which none is named."""
  samples = pathlib.Path(samples)
  made_here = (samples.parent / sample_files.MANIFEST).exists()
  folder = samples.parent if made_here else samples.with_suffix("")
  return folder / f"against-{pathlib.Path(reference).stem}"


def columns() -> list[metrics.Metric]:
  """The metrics of a record, in the order of tables and pictures."""
  measured = [name for name, metric in METRICS.items() if metric.measure]
  return metrics.in_order([INCEPTION_NAMES.get(n, n) for n in measured])


def table(records: dict[str, dict]) -> str:
  """A Markdown table with a line for each record, under its name."""
  rows = [["samples", "images", *(metric.heading for metric in columns())]]
  for name, record in records.items():
    numbers = [
      tables.with_interval(record["metrics"].get(metric.name), metric.decimals)
      for metric in columns()
    ]
    rows.append([name, f"{record['num_images']:,}", *numbers])
  return tables.markdown(rows)


# --- a trained stage ---------------------------------------------------------


def sweep(
  judge: Judge,
  stages: Mapping[str, Stage],
  workdir: pathlib.Path,
  request: sample_files.Request,
  *,
  stage: str,
  scales: Sequence[Guidance],
  batch_size: int | None = None,
) -> dict[str, dict] | None:
  """Samples a stage at each guidance scale, and measures the samples.

  Sample files and measurements stay where `--mode=sample` puts them; the
  overview is `<stage>/against-<reference>.json` and `.md`. A tuple in `scales`
  has a scale for each sub-token. None where this is not the first process.
  """
  records = {}
  for scale in scales:
    sampling = dataclasses.replace(stages[stage].sampling, guidance=scale)
    guided = dataclasses.replace(stages[stage], sampling=sampling)
    records[f"guidance {guidance_text(scale)}"] = measure_stage(
      judge,
      {**stages, stage: guided},
      workdir,
      request,
      stage=stage,
      batch_size=batch_size,
    )
  if None in records.values():
    return None
  path = overview(judge, workdir, stage)
  files.remove_leftovers_of(path)
  files.write_json(path, records)
  files.write_text(path.with_suffix(".md"), f"{table(records)}\n")
  return records


def overview(judge: Judge, workdir: pathlib.Path, stage: str) -> pathlib.Path:
  """The JSON file with a stage's records against the judge's reference."""
  # Not `with_suffix`: the name of a reference may have dots in it.
  return workdir / stage / f"against-{judge.file.path.stem}.json"


def measure_stage(
  judge: Judge,
  stages: Mapping[str, Stage],
  workdir: pathlib.Path,
  request: sample_files.Request,
  *,
  stage: str,
  batch_size: int | None = None,
) -> dict | None:
  """Samples a stage, and measures the samples as `Judge.measure` does."""
  if judge.file.shape:
    check_count("asked for", request.num_images)
  target = sample_files.sample(
    stages, workdir, request, stage=stage, batch_size=batch_size
  )
  processes.wait_for_all(f"samples in {target.folder}")
  folder = default_folder(target.npz, judge.file.path)
  return judge.measure(target.npz, folder)
