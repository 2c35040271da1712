"""What a work directory has to show: pictures, metrics, one page of HTML."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from tensorar_jax import build, metrics, visualize, windows
from tensorar_jax.evaluation import samples
from tensorar_jax.sampling import SamplingConfig

CAPTIONS = {
  "samples.png": "Samples of every model; a row is a class.",
  "refinement.png": (
    "The same images after each look. A picture after n looks shows every token"
    " as it stood when it had been drawn at most n times; outlined cells"
    " changed since the look before."
  ),
  "curves.png": "Training: cross-entropy of the committed slot and the others.",
}
STRIPS = 6  # images in a refinement strip


def draw(stages: Mapping[str, Mapping], workdir: pathlib.Path, command: str):
  """Writes the pictures and report.html from what the work directory holds."""
  found = {
    name: np.load(workdir / name / "samples.npz")
    for name in stages
    if (workdir / name / "samples.npz").exists()
  }
  if found:
    _draw_grids(found, workdir / "samples.png")
    _draw_refinement(stages, found, workdir)
  traces = {
    name: metrics.read_trace(workdir / name / "log.jsonl") for name in stages
  }
  traces = {name: rows for name, rows in traces.items() if rows}
  if not traces:
    raise ValueError(
      f"{workdir} holds no trained stage: run --mode=train first."
    )
  visualize.save_curves(workdir / "curves.png", traces)
  path = workdir / "metrics.json"
  measured = json.loads(path.read_text()) if path.exists() else {}
  pictures = {
    caption: workdir / name
    for name, caption in CAPTIONS.items()
    if (workdir / name).exists()
  }
  visualize.write_report(
    workdir / "report.html", workdir.name, measured, pictures, command
  )
  if measured:
    print(visualize.table(measured))
    print("\n".join(visualize.verdicts(measured)))
  print(f"report: {workdir / 'report.html'}")


def _draw_grids(found, path: pathlib.Path) -> None:
  """Ten images of each class, a panel per model."""
  grids = {}
  for name, data in found.items():
    images, labels = data["images"], data["labels"]
    classes = sorted(set(labels.tolist()))
    rows = [images[labels == c][:10] for c in classes]
    grids[name] = np.stack([row[: min(map(len, rows))] for row in rows])
  visualize.save_sample_grids(path, grids, [str(c) for c in classes])


def _draw_refinement(stages, found, workdir: pathlib.Path) -> None:
  """The strip of every model that looks more than once."""
  strips, changed = {}, {}
  for name, data in found.items():
    if data["drafts"].shape[2] == 1:
      continue
    tokenizer = build.frozen_tokenizer(stages[name], workdir)
    strips[name], changed[name] = refinement(
      tokenizer, data["drafts"][:STRIPS]
    )
  if strips:
    visualize.save_refinement(workdir / "refinement.png", strips, changed)


def refinement(tokenizer, drafts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(images after each look [n, k, h, w, C], changed cells [n, k, rows, cols])."""
  window = drafts.shape[2]
  looks = [
    np.asarray(windows.after_looks(drafts, n)) for n in range(1, window + 1)
  ]
  images = np.stack([samples.decode(tokenizer, t) for t in looks], axis=1)
  tokens = np.stack(looks, axis=1)  # [n, k, T, F]
  changed = np.zeros(tokens.shape[:3], bool)
  changed[:, 1:] = (tokens[:, 1:] != tokens[:, :-1]).any(axis=-1)
  return images, changed.reshape(*changed.shape[:2], *tokenizer.grid)


def sample(
  stages: Mapping[str, Mapping],
  workdir: pathlib.Path,
  *,
  stage: str | None,
  num_images: int,
  classes: Sequence[str] | None,
  seed: int,
) -> None:
  """Samples a trained stage into `<workdir>/<stage>/samples/`."""
  name = stage or [n for n, s in stages.items() if s["objective"] == "tensorar"][-1]
  config = stages[name]
  model = build.load(workdir / name)
  tokenizer = build.frozen_tokenizer(config, workdir)
  conditioning = build.conditioning(config["conditioning"])
  settings = build.call(SamplingConfig, config["sampling"], "sampling")
  try:
    chosen = [int(c) for c in classes or range(conditioning.num_classes)]
  except ValueError as error:
    raise ValueError(f"--classes={classes}: expected integers.") from error
  labels = np.resize(chosen, num_images)
  folder = workdir / name / "samples"
  folder.mkdir(parents=True, exist_ok=True)
  done = 0
  for batch in samples.generate(
    model, conditioning, labels, seed, settings, batch_size=min(100, num_images)
  ):
    images = samples.decode(tokenizer, batch.tokens)
    if done == 0:
      _save_overview(folder, tokenizer, images, np.asarray(batch.drafts))
    for image in images:
      visualize.save_image(folder / f"{done:06d}.png", image)
      done += 1
    logging.info("%d of %d images", done, num_images)
  print(f"{done} images of {name}: {folder}")


def _save_overview(folder, tokenizer, images, drafts) -> None:
  """The grid of the first batch and, for k > 1, its refinement."""
  cols = min(10, len(images))
  rows = len(images) // cols
  grid = images[: rows * cols].reshape(rows, cols, *images.shape[1:])
  visualize.save_sample_grids(folder / "grid.png", {"": grid}, [""] * rows)
  if drafts.shape[2] > 1:
    strip, changed = refinement(tokenizer, drafts[:STRIPS])
    visualize.save_refinement(
      folder / "refinement.png", {"": strip}, {"": changed}
    )
