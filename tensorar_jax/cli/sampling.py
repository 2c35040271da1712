"""Modes that draw images: sample, demo."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from tensorar_jax.cli.config import Experiment
from tensorar_jax.cli.options import Products, Shared, option
from tensorar_jax.paths import LocalPath

if TYPE_CHECKING:
  from tensorar_jax.generation.requests import Request


@dataclasses.dataclass(frozen=True)
class Images:
  """Which images are drawn."""

  num_images: int | None = option(
    None,
    "With --reference: how many images to draw. Default: 50,000.",
    least=1,
  )
  classes: tuple[int, ...] | None = option(
    None,
    "Ids of the classes to draw in turn. Default: all classes.",
    expected="a whole number for each class, such as 207,360 (no names)",
  )
  seed: int = option(
    0, "Seed of the images; with it an image's number says all of it."
  )
  resize: int | None = option(
    None,
    "Side in pixels to bring the images to; 384 px models are judged at 256."
    " Default: as they are drawn.",
    least=1,
  )

  def request(self, num_images: int) -> Request:
    """Returns what is asked for; `num_images` if their number is not given."""
    from tensorar_jax.generation import requests

    return requests.Request(
      num_images=self.num_images or num_images,
      classes=self.classes,
      seed=self.seed,
      resize=self.resize,
    )


@dataclasses.dataclass(frozen=True)
class Sample(Images, Products, Shared):
  """Draws images from a trained stage.

  Writes samples.npz as the ADM evaluation suite reads it, manifest.json, PNGs,
  a grid, and the refinement strip. All local devices share the work, and the
  same command continues one that was stopped. A stage that reads text takes
  --prompts or --prompt.
  """

  example = (
    "--config=configs/digits.py --mode=sample \\\n"
    "    --stage=tensorar --num_images=100 --classes=3,5 --seed=1"
  )

  stage: str | None = option(
    None,
    "The stage to sample. Default: the last one that draws images.",
    metavar="NAME",
  )
  num_images: int | None = option(
    None, "How many images. Default: 100; of each prompt 4.", least=1
  )
  prompts: LocalPath | None = option(
    None, "A text file in UTF-8: each line is a prompt.", metavar="FILE"
  )
  prompt: tuple[str, ...] | None = option(
    None, "A prompt; may be given several times.", repeat=True
  )
  layout: str | None = option(
    None,
    "Writes the folders that a benchmark's scorer reads. --prompts is its own:"
    " GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder of .txt files."
    " Default: the files named above.",
    choices=("geneval", "dpg"),
  )
  output: LocalPath | None = option(
    None,
    "A folder, or FILE.npz with the other files in a folder beside it. Default:"
    " a new number in the stage's folder `samples`.",
    metavar="FOLDER|FILE.npz",
  )
  batch_size: int | None = option(
    None,
    "Images drawn at once, over the local devices. Default: 32 for each.",
    least=1,
  )
  pngs: bool | None = option(
    None,
    "Whether each image is a PNG too; --nopngs: none. Default: up to 1000.",
  )

  def shares_work(self) -> bool:
    return True

  def request(self, num_images: int = 100) -> Request:
    """Returns the images, or prompts, that are asked for."""
    from tensorar_jax.generation import requests

    prompts, sources = self.prompt, None
    if self.prompts is not None:
      if prompts is not None:
        raise ValueError("--prompts and --prompt: expected one or the other.")
      path = pathlib.Path(self.prompts)
      prompts, sources = requests.read_prompts(path, self.layout)
    return requests.Request(
      num_images=self.num_images or (num_images if prompts is None else 4),
      classes=self.classes,
      seed=self.seed,
      resize=self.resize,
      prompts=prompts,
      layout=self.layout,
      sources=sources,
    )


@dataclasses.dataclass(frozen=True)
class Demo(Products, Shared):
  """Serves a page for the browser to try the trained stages.

  Needs `pip install 'tensorar_jax[demo]'`, and no network.
  """

  example = "--config=configs/digits.py --mode=demo"

  stage: str | None = option(
    None,
    "The stage to begin with. Default: the last trained one that draws images.",
    metavar="NAME",
  )
  num_images: int = option(
    4, "The most images that a visitor may ask for at once.", least=1
  )
  host: str = option(
    "127.0.0.1",
    "Who can open the page: this machine alone, or with 0.0.0.0 others too.",
    metavar="ADDRESS",
  )
  port: int | None = option(
    None, "Port of the page. Default: the first free one from 7860."
  )


def sample(
  options: Sample, experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Carries out --mode=sample."""
  from tensorar_jax.generation import sample_files

  if options.layout and options.pngs is False:
    raise ValueError("--layout and --nopngs: a layout is of PNGs.")
  sample_files.sample(
    experiment.stages,
    workdir,
    options.request(),
    stage=options.stage,
    output=options.output,
    batch_size=options.batch_size,
    pngs=options.pngs,
  )


def serve_demo(
  options: Demo, experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Carries out --mode=demo, until it is stopped."""
  from tensorar_jax.demo import page, service

  studio = service.Studio(
    experiment.stages, workdir, options.stage, options.num_images
  )
  page.serve(studio, workdir.name, options.host, options.port)
