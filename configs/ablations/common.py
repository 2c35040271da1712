"""What all ablations have in common: the data sets and the centre.

A variant is the centre, TensorAR by the published recipe, with some values
changed. All start from one base model and train for equally many steps; so does
`k = 1`, the base model itself, which every table shows.
"""

import copy
import importlib
from typing import Any

from ml_collections import ConfigDict

DATA = ("digits", "fashion_mnist", "llamagen_b")
SMALL: dict[str, dict[str, Any]] = {
  "digits": dict(seeds=3, guidance=1.0, num_steps=200, batch_size=16),
  "fashion_mnist": dict(seeds=1, guidance=1.5, num_steps=100, batch_size=32),
}
# LlamaGen-B, which the papers' ablations start from: FID, and time of an image.
PAPER_BASE, PAPER_BASE_SECONDS = 5.46, 0.11


def axis(
  title: str,
  variants: dict,
  papers: dict,
  source: str,
  paper_seconds: dict | None = None,
) -> dict:
  """Makes the axis of a table.

  Args:
    title: of the table.
    variants: {name of a row: {"section.key": value}}.
    papers: the FID that papers print, by name of the row.
    source: where they print it.
    paper_seconds: their time of an image, by name of the row.
  """
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
  return dict(
    title=title,
    rows=rows,
    source=source,
    paper_base=PAPER_BASE,
    paper_base_seconds=PAPER_BASE_SECONDS,
  )


def get_config(data: str, **axes: dict) -> ConfigDict:
  """Makes the experiment of some axes on a data set."""
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
  config.ablation = dict(
    data=data, centre="tensorar", seeds=1, axes=copy.deepcopy(axes)
  )
  if data in SMALL:
    shrink(config, **SMALL[data])
  return config


def shrink(
  config: ConfigDict,
  seeds: int,
  guidance: float,
  num_steps: int,
  batch_size: int,
) -> None:
  """Sets sizes for two CPU cores, and the guidance of every variant.

  The scale is the base's best in a scan, and not chosen for each variant: a
  change of how images are drawn should not hide what a variant does.
  """
  config.ablation.seeds = seeds
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
