"""Writes the token shards of a source of images: `--mode=tokenize`.

Shard s holds the images s n ... (s + 1) n - 1 of the source. Of P processes,
process p takes the shards p, p + P, ... A shard gets its name when it is
complete, so a run that was killed continues with the first one missing, on any
number of processes, and the files are the same to the byte. `settings.json`
claims the folder for one source, recipe, tokenizer and text encoder.

Captions are kept as the features of their own tokens, which training reads. It
then needs no text encoder, nor the memory and time of one.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging
from array_record.python import (
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]: compiled
)

from tensorar_jax.checkpoints import files, resumable
from tensorar_jax.data import encoder as encoder_lib
from tensorar_jax.data import images, leftovers, shards, sources
from tensorar_jax.interfaces import TextEncoder, Tokenizer

REPORT = {"num_images": int, "skipped": [{"reason": str}]}  # of a shard


def tokenize(
  source: sources.Source,
  tokenizer: Tokenizer,
  folder: str | os.PathLike,
  *,
  recipe: str,
  image_size: int,
  crop_range: float | Sequence[float] = (1.1,),
  batch_size: int = 64,
  worker: resumable.Worker = resumable.Worker(),
  shard_size: int = 1024,
  text: TextEncoder | None = None,
) -> dict[str, Any] | None:
  """Writes this process's shards, and the manifest once all are there.

  Args:
    source: images of any size; broken ones are skipped, logged and listed.
    tokenizer: an nnx module; it runs on the local devices of this process.
    folder: shared by all processes; see `shards` for what it holds.
    recipe: "center", "flip" or "ten_crop".
    image_size: of the square crops; it has to give the tokenizer's grid.
    crop_range: only for "ten_crop"; several give their crops together.
    batch_size: crops encoded at once; those of an image stay together.
    worker: this process; all that share the work have the same arguments.
    shard_size: images of a shard; a killed run may lose as many.
    text: encoder of captions, if and only if the source has captions.

  Returns:
    The manifest, or None where other processes have still to finish.

  Raises:
    ValueError: bad options, a folder of other settings or in use by another
      run, or no image is left.
  """
  _check_options(batch_size, shard_size)
  ranges = (crop_range,) if isinstance(crop_range, int | float) else crop_range
  crops = images.Recipe(recipe, image_size, tuple(ranges))
  channels = source.image_shape[-1]
  batch_size = min(batch_size, len(source) * crops.num_variants)
  _check_kind(source, text)
  encoder = encoder_lib.Encoder(tokenizer, crops, channels, batch_size, text)
  folder = pathlib.Path(folder)
  settings = _settings(source, tokenizer, crops, shard_size, text)
  with resumable.holding(folder, worker):
    resumable.claim_settings(folder, settings, "tokens")
    return _write(folder, source, encoder, settings, worker)


def _write(folder, source, encoder, settings, worker) -> dict[str, Any] | None:
  """Writes what is missing in a folder that this run holds."""
  files.remove_leftovers(folder.iterdir())
  name, size = "tokens-{}.array_record", settings["shard_size"]
  shard_files = resumable.shards(folder, name, len(source), size)
  missing = resumable.to_do(shard_files, worker, _is_complete)
  progress = resumable.Progress("tokenize", sum(map(len, missing.values())))
  for file, positions in missing.items():
    _write_shard(file, positions, source, encoder, progress)
  found = {
    "damaged_files": list(getattr(source, "damaged", ())),
    "left_out": getattr(source, "left_out", {}),
  }
  return _finish(folder, list(shard_files), settings | found, progress)


def _check_options(batch_size, shard_size):
  if min(batch_size, shard_size) < 1:
    raise ValueError(
      f"batch_size={batch_size}, shard_size={shard_size}: expected at least 1"
    )


def _check_kind(source, text):
  """ValueError unless captions and a text encoder come together."""
  if (source.num_classes is None) != (text is not None):
    kinds = ("captions", "classes")
    has, reads = kinds if text is None else kinds[::-1]
    raise ValueError(
      f"the images have {has}, the config's conditioning reads {reads}: take"
      " other images, or another config"
    )


def _write_shard(
  file: pathlib.Path,
  positions: range,
  source: sources.Source,
  encoder: encoder_lib.Encoder,
  progress: resumable.Progress,
) -> None:
  """Writes one shard, whole or not at all."""
  dtype = shards.code_type(encoder.vocab_sizes)
  num_images, skipped = 0, []

  def on_broken(position, error):
    logging.warning("skipped: %s", error)
    # The names of files are relative: the folder may be moved.
    names = getattr(source, "names", None)
    name = leftovers.shown(names[position]) if names else error.name
    reason = leftovers.shown(error.reason)
    entry = {"position": position, "name": name, "reason": reason}
    skipped.append(entry)
    progress.add()

  with files.replacing(file, sync=True) as partial:
    writer = array_record_module.ArrayRecordWriter(
      str(partial), shards.WRITER_OPTIONS
    )
    try:
      examples = encoder_lib.encoded(encoder, source, positions, on_broken)
      for subject, codes in examples:
        writer.write(shards.pack(subject, codes, dtype))
        num_images += 1
        progress.add()
    finally:
      writer.close()
    report = {"num_images": num_images, "skipped": skipped}
    files.write_json(file.with_suffix(".json"), report)


def _is_complete(file: pathlib.Path) -> bool:
  """Whether a shard holds what its report says."""
  try:
    report = files.read_json(file.with_suffix(".json"), REPORT)
    return shards.count_records(file) == report["num_images"]
  except ValueError as error:
    if file.exists():
      logging.warning("tokenized again, since %s", error)
    return False


def _settings(source, tokenizer, recipe, shard_size, text) -> dict[str, Any]:
  """All that the shards depend on: the manifest without the results."""
  digest = source.fingerprint() if hasattr(source, "fingerprint") else None
  settings = {
    "format": shards.FORMAT,
    **recipe.settings(),
    "grid": tokenizer.grid,
    "vocab_sizes": tokenizer.vocab_sizes,
    "code_type": shards.code_type(tokenizer.vocab_sizes).name,
    "num_classes": source.num_classes,
    "class_names": getattr(source, "class_names", ()),
    "source": {"num_images": len(source), "sha256": digest},
    "tokenizer": encoder_lib.identity(tokenizer),
    "shard_size": shard_size,
  }
  if text:
    settings["text"] = {
      "width": text.width,
      "length": text.length,
      "dtype": encoder_lib.text_dtype(text),
      "encoder": encoder_lib.text_identity(text),
    }
  return files.as_json(settings)


def _finish(folder, shard_files, settings, progress) -> dict[str, Any] | None:
  """Writes and returns the manifest if all shards are there, else None."""
  if not resumable.all_there(folder, shard_files, _is_complete):
    return None
  reports = {
    file.name: files.read_json(file.with_suffix(".json"), REPORT)
    for file in shard_files
  }
  counts = {name: report["num_images"] for name, report in reports.items()}
  skipped = sum((report["skipped"] for report in reports.values()), [])
  if not any(counts.values()):
    raise ValueError(
      f"none of the {len(skipped)} images could be decoded, the first because "
      f"of: {skipped[0]['reason']}"
    )
  results = {"num_images": sum(counts.values()), "num_skipped": len(skipped)}
  manifest = settings | results | {"skipped": skipped, "shards": counts}
  files.write_json(folder / shards.MANIFEST, manifest)
  leftovers.say_all(folder, manifest)
  logging.info(
    "%s: %d images in %d shards, %d broken images skipped; %d images in this "
    "run, %.3g images/s",
    folder,
    manifest["num_images"],
    len(shard_files),
    len(skipped),
    progress.done,
    progress.rate(),
  )
  return manifest
