"""Measures how many steps the parallel decoder takes on a trained stage.

  python -m studies.fewer_steps --config=configs/digits.py --stage=base \
    --workdir=runs/digits --output=runs/fewer_steps/digits

For every first guess and number of rows: the steps of an image, how many tokens
they committed, and whether all tokens are those of the window decoder. Then,
with --rounds, both decoders draw --timed images in turn, and their times are
compared. Results are written as they come; a second run goes on where the first
one stopped. docs/fewer_steps.md shows the tables.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time

import jax
import numpy as np
from absl import app, flags, logging

from tensorar_jax import paths
from tensorar_jax.checkpoints import files, orbax_io
from tensorar_jax.evaluation import tables
from tensorar_jax.experiment import build, config_file
from tensorar_jax.generation import batches, guesses
from tensorar_jax.method import parallel_decoder
from tensorar_jax.parallel import sharding
from tensorar_jax.performance import machine, workloads

SEED = 0
WINDOW = "window decoder"


def labels_of(conditioning, count: int) -> np.ndarray:
  """The labels of so many images: every class in turn."""
  return np.arange(count) % conditioning.num_classes


class Study:
  """A trained stage and what was measured of it so far."""

  def __init__(self, stage, folder: pathlib.Path, output: pathlib.Path):
    self.path = output / "fewer_steps.json"
    self.record = files.read_json(self.path, default={"steps": {}, "times": {}})
    checkpoint = orbax_io.find(folder)
    drawn_with = orbax_io.read_meta(checkpoint)["id"]
    if self.record.get("checkpoint", drawn_with) != drawn_with:
      raise ValueError(
        f"{self.path} is of another checkpoint: name a new --output."
      )
    self.model = build.load_tensorar(stage, checkpoint)
    self.conditioning = build.conditioning(stage.conditioning)
    if self.conditioning.is_text:
      raise ValueError(
        "the images of this study are of classes: choose a stage that draws"
        " them from labels."
      )
    self.config = dataclasses.replace(
      stage.sampling, draw="gumbel", decoder="window"
    )
    self.folder, self.mesh = folder, sharding.local_mesh()
    self.record |= {
      "checkpoint": drawn_with,
      "tokens": self.model.num_tokens,
      "machine": machine.describe(),
    }

  def sampler(self, guess: str, rows: int, **settings) -> batches.Sampler:
    """A sampler of the parallel decoder, or of the window decoder."""
    config = dataclasses.replace(self.config, **settings)
    if guess != WINDOW:
      config = dataclasses.replace(
        config, decoder="parallel", rows=rows, first_guess=guess
      )
    marginals = guesses.load(self.folder, config)
    return batches.Sampler(
      self.model, self.conditioning, config, SEED, self.mesh, marginals
    )

  def draw(self, sampler, count: int, batch: int):
    """(tokens, steps) of so many images."""
    labels = labels_of(self.conditioning, count)
    parts = [
      jax.tree.map(lambda a, n=n: np.asarray(a)[:n], (out.tokens, out.steps))
      for out, n in sampler.batches(labels, batch)
    ]
    tokens, steps = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(steps)

  def steps(self, rows: list[int], names: list[str], count: int, batch: int):
    """Counts steps for each first guess and number of rows."""
    want, _ = self.draw(self.sampler(WINDOW, 1), count, batch)
    for guess in names:
      for m in rows:
        key = f"{guess} m={m}, {count} images"
        if key in self.record["steps"]:
          continue
        tokens, steps = self.draw(self.sampler(guess, m), count, batch)
        found = workloads.steps_of(steps)
        share = (steps[:, -1] + 1) / self.model.num_tokens
        found |= {
          "guess": guess,
          "rows": m,
          "share": float(share.mean()),
          "spread": float(share.std()),
          "images": count,
          "different_tokens": int((tokens != want).sum()),
        }
        self.record["steps"][key] = found
        self.save()
        logging.info("%s: %s", key, found)

  def times(self, rows, guess, count: int, batch: int, rounds: int):
    """Times both decoders in turn, images drawn in batches."""
    samplers = {WINDOW: self.sampler(WINDOW, 1, draw="inverse_cdf")}
    samplers |= {f"m={m}": self.sampler(guess, m) for m in rows}
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for name, sampler in samplers.items():
      self.draw(sampler, count, batch)  # compiles
      logging.info("%s: warm", name)
    for _ in range(rounds):
      for name, sampler in samplers.items():
        started = time.monotonic()
        self.draw(sampler, count, batch)
        seconds[name].append(time.monotonic() - started)
      self.record["times"][f"batch {batch}"] = {
        "images": count,
        "guess": guess,
        "seconds": seconds,
      }
      self.save()

  def save(self) -> None:
    """Writes what is known so far, as JSON and as tables."""
    self.path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(self.path, self.record)
    text = tables.markdown(step_rows(self.record))
    for name, timed in self.record["times"].items():
      text += f"\n{name}, {timed['images']} images:\n\n"
      text += tables.markdown(time_rows(timed))
    (self.path.parent / "fewer_steps.md").write_text(text + "\n")


def step_rows(record) -> list[list[str]]:
  """A line for each first guess: steps as a share of T, by rows."""
  found = record["steps"].values()
  rows = sorted({one["rows"] for one in found})
  lines = [["first guess", *(f"m = {m}" for m in rows), "different tokens"]]
  for guess in dict.fromkeys(one["guess"] for one in found):
    mine = {one["rows"]: one for one in found if one["guess"] == guess}
    cells = [
      f"{mine[m]['share']:.3f} +- {mine[m]['spread']:.3f}" if m in mine else ""
      for m in rows
    ]
    wrong = sum(one["different_tokens"] for one in mine.values())
    lines.append([guess, *cells, str(wrong)])
  return lines


def time_rows(timed) -> list[list[str]]:
  """A line for each decoder: images/s, and its speed over the window's."""
  seconds = timed["seconds"]
  lines = [["decoder", "images/s", "times the window decoder"]]
  for name, taken in seconds.items():
    rates = [timed["images"] / s for s in taken]
    gains = [a / b for a, b in zip(seconds[WINDOW], taken)]
    cells = [
      f"{np.median(v):.3g} [{min(v):.3g}, {max(v):.3g}]" for v in (rates, gains)
    ]
    lines.append([name, *cells])
  return lines


def main(argv: list[str]) -> None:
  """Measures the stage of the flags."""
  del argv
  given = flags.FLAGS
  stage = config_file.load(given.config).stages[given.stage]
  rows = [int(m) for m in given.rows]
  study = Study(
    stage,
    pathlib.Path(paths.local(given.workdir)) / given.stage,
    pathlib.Path(paths.local(given.output)),
  )
  study.steps(rows, given.guesses, given.images, given.batch)
  for batch in map(int, given.timed_batches):
    if given.rounds:
      study.times(
        rows, given.guesses[0], max(given.timed, batch), batch, given.rounds
      )
  print((study.path.parent / "fewer_steps.md").read_text())


if __name__ == "__main__":
  flags.DEFINE_string("config", "configs/digits.py", "Of the trained stage.")
  flags.DEFINE_string("stage", "base", "Its name.")
  flags.DEFINE_string("workdir", "runs/digits", "Where it was trained.")
  flags.DEFINE_string("output", "runs/fewer_steps", "A folder for results.")
  flags.DEFINE_list("rows", ["2", "4", "8", "16", "32"], "Numbers of rows.")
  flags.DEFINE_list("guesses", list(parallel_decoder.GUESSES), "First guesses.")
  flags.DEFINE_integer("images", 256, "Whose steps are counted.")
  flags.DEFINE_integer("batch", 64, "Images at once while counting.")
  flags.DEFINE_integer("timed", 16, "Images that are timed.")
  flags.DEFINE_list("timed_batches", ["1", "8"], "Images at once while timing.")
  flags.DEFINE_integer("rounds", 0, "How often to time; 0 does not.")
  app.run(main)
