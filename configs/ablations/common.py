"""What every ablation has in common: the data sets and the centre.

A variant is the centre, TensorAR by the published recipe, with some values
changed. All start from one base model and train for equally many steps; so does
`k = 1`, the base model itself, which is beside every table.
"""

import copy
import importlib

from ml_collections import ConfigDict

DATA = ("digits", "fashion_mnist", "llamagen_b")
# (training seeds, guidance, steps, images of a step)
SMALL = {"digits": (3, 1.0, 200, 16), "fashion_mnist": (1, 1.5, 100, 32)}
# LlamaGen-B, which the papers' ablations start from: FID, and time of an image.
PAPER_BASE, PAPER_BASE_SECONDS = 5.46, 0.11


def axis(
  title: str,
  variants: dict,
  papers: dict,
  source: str,
  paper_seconds: dict | None = None,
) -> dict:
  """A table: {name: {"section.key": value}}, and the papers' FID by name."""
  seconds = paper_seconds or {}
  rows = [
    dict(
      name=name,
      change=[list(pair) for pair in change.items()],
      paper=papers.get(name),
      paper_seconds=seconds.get(name),
    )
    for name, change in variants.items()
  ]
  base = dict(paper_base=PAPER_BASE, paper_base_seconds=PAPER_BASE_SECONDS)
  return dict(title=title, rows=rows, source=source, **base)


def get_config(data: str, **axes: dict) -> ConfigDict:
  """The experiment of some axes on a data set."""
  if data not in DATA:
    raise ValueError(f"data set {data!r}: choose one of {DATA}.")
  config = importlib.import_module(f"configs.{data}").get_config()
  stages = config.stages
  if "sampling" not in config:
    config.sampling = ConfigDict()
  config.sampling.draft_temperature = 1.0  # a number, as the variants have it
  for name in ("continued", "drafts"):
    if name in stages:
      del stages[name]
  seeds = 1
  if data in SMALL:
    seeds, guidance, num_steps, batch_size = SMALL[data]
    small(config, guidance, num_steps, batch_size)
  config.ablation = dict(
    data=data, centre="tensorar", seeds=seeds, axes=copy.deepcopy(axes)
  )
  return config


def small(
  config: ConfigDict, guidance: float, num_steps: int, batch_size: int
) -> None:
  """Sizes for two CPU cores, and the guidance of every variant.

  It is the base's best in a scan, and not chosen for each variant anew: what a
  variant does to the model is not hidden by a change of how it is sampled.
  """
  config.train.keep = 1
  config.stages.tensorar.train = dict(
    num_steps=num_steps, batch_size=batch_size, checkpoint_every=num_steps
  )
  config.sampling.guidance = guidance
  config.evaluation = dict(
    models=("tensorar",),
    guidance=(guidance,),
    num_images=1000,
    seeds=1,
    batch_size=500,
    held_out_images=500,
  )
