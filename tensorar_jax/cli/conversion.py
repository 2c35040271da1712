"""Modes that bring files in and out: import, tokenize, export."""

from __future__ import annotations

import dataclasses
import pathlib

from tensorar_jax.cli.config import Experiment
from tensorar_jax.cli.options import Products, Shared, option
from tensorar_jax.paths import DataName, LocalPath


@dataclasses.dataclass(frozen=True)
class Import(Shared):
  """Fills the stages that have a `source` from published PyTorch files.

  The files are those that the config names, in the folder that it names;
  --init=hf:// downloads them by name.
  """

  example = "--config=configs/llamagen_b.py --mode=import --init=hf://"

  stage: str | None = option(
    None, "The only stage to import. Default: all.", metavar="NAME"
  )

  def shares_work(self) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Tokenize(Products, Shared):
  """Turns images into token shards, to train on with data.name=tokens:FOLDER.

  The tokenizer is that of --stage. Several processes share the work, and the
  same command continues one that was stopped.
  """

  example = (
    "--config=configs/llamagen_b.py --mode=tokenize \\\n"
    "    --images=folder:imagenet/train --output=data/imagenet256_tokens"
  )

  images: DataName | None = option(
    None,
    "Needed. The images: folder:DIR with a folder of each class, or tfds:NAME;"
    " with captions webdataset:DIR or captions:DIR.",
    metavar="KIND:PLACE",
  )
  output: LocalPath | None = option(
    None, "Needed. The folder of the shards.", metavar="FOLDER"
  )
  recipe: str = option(
    "ten_crop",
    "Crops of an image: its center; that and its mirror image; or the corners,"
    " the center and their mirror images.",
    choices=("center", "flip", "ten_crop"),
  )
  crop_range: tuple[float, ...] = option(
    (1.1,),
    "The shorter side of an image before ten_crop, in image sizes; may be given"
    " several times.",
    repeat=True,
  )
  stage: str | None = option(
    None,
    "The stage whose tokenizer it is. Default: the last one that draws images.",
    metavar="NAME",
  )

  def shares_work(self) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Export(Shared):
  """Writes the base weights of a stage in the layout they are published in.

  The modules that TensorAR adds are left out.
  """

  example = (
    "--config=configs/llamagen_b.py --mode=export \\\n"
    "    --stage=base --output=base.pt"
  )

  stage: str | None = option(
    None, "Needed. The stage to export.", metavar="NAME"
  )
  output: LocalPath | None = option(
    None, "Needed. The file to write.", metavar="FILE.pt|FILE.safetensors"
  )
  ema: bool = option(
    False,
    "Whether to write the average of the weights, where training kept it.",
  )


def import_weights(
  options: Import, experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Carries out --mode=import."""
  from tensorar_jax.training import loop

  for name, stage in experiment.stages.items():
    if stage.source and options.stage in (None, name):
      loop.fit(stage, workdir / name)


def tokenize_images(
  options: Tokenize, experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Carries out --mode=tokenize."""
  from tensorar_jax.checkpoints import resumable
  from tensorar_jax.data import codes, sources, tokenize
  from tensorar_jax.experiment import build
  from tensorar_jax.parallel import sharding

  if not (options.images and options.output):
    raise ValueError("--mode=tokenize needs --images and --output.")
  output = pathlib.Path(options.output)
  worker = resumable.Worker.of_this_process()
  with resumable.holding(output, worker):
    pass  # asked at once: reading a large data set takes its time
  stages = experiment.stages
  models = [n for n, s in stages.items() if s.objective == "tensorar"]
  stage = stages[options.stage or models[-1]]
  tokenizer = build.frozen_tokenizer(stage, workdir)
  rows, cols = tokenizer.config.image_size
  if rows != cols:
    raise ValueError(f"image_size {rows} x {cols}: crops are square.")
  source = sources.load(options.images, "train")
  if isinstance(source, codes.TokenSource):
    raise ValueError(f"--images={options.images}: these are tokens already.")
  text_encoder, section = None, stage.conditioning
  if source.num_classes is None and build.conditioning(section).is_text:
    mesh = sharding.local_mesh(stage.mesh)
    text_encoder = build.text_encoder(section, mesh)
  tokenize.tokenize(
    source,
    tokenizer,
    output,
    recipe=options.recipe,
    image_size=rows,
    crop_range=options.crop_range,
    worker=worker,
    text=text_encoder,
  )


def export(
  options: Export, experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Carries out --mode=export."""
  from tensorar_jax.experiment import published

  if not (options.stage and options.output):
    raise ValueError("--mode=export needs --stage and --output.")
  output = pathlib.Path(options.output)
  published.export_stage(workdir / options.stage, output, ema=options.ema)
