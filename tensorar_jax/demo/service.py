"""Requests of `--mode=demo`, checked -> a few images of a trained stage.

Image i depends on (seed, i) and its class or prompt, as in `--mode=sample`. All
requests share one compiled shape, so only the first one waits for the compiler
(once with and once without guidance).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, UInt8

from tensorar_jax.checkpoints import orbax_io
from tensorar_jax.conditioning import conditions
from tensorar_jax.conditioning.conditions import (
  ClassConditioning,
  TextConditioning,
)
from tensorar_jax.experiment import build
from tensorar_jax.experiment.schema import Stage, choose
from tensorar_jax.generation import batches, guesses, requests
from tensorar_jax.interfaces import Conditioning, TextEncoder, Tokenizer
from tensorar_jax.method import drawing, sampling
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.nn import checks
from tensorar_jax.parallel import sharding

MAX_IMAGES = 16  # of a request; the flag cannot raise it
MAX_PROMPT = 500  # letters
MAX_SCALE = 50.0
MAX_SHOWN = 60  # letters of a bad value in a message
IN_MEMORY = 2  # stages: a model and its base, to compare them


@dataclasses.dataclass(frozen=True)
class DemoRequest:
  """The values that the page sends, of any type; `Studio.draw` checks them.

  `guidance` is a scale, or one for each sub-token as in "4:6". `label` is for
  stages with classes, `prompt` for stages that read text.
  """

  stage: Any
  label: Any = 0
  prompt: Any = ""
  seed: Any = 0
  guidance: Any = "1"
  num_images: Any = 1


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Pictures after 1 .. k looks, and the cells that each look changed.

  `title` names the checkpoint; `seconds` include loading and compiling it.
  """

  title: str
  strip: UInt8[np.ndarray, "n k h w C"]
  changed: Bool[np.ndarray, "n k r c"]
  seconds: float


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A trained stage with everything needed to draw."""

  model: TensorAR
  tokenizer: Tokenizer
  conditions: Conditioning
  encode: TextEncoder | None
  config: sampling.SamplingConfig
  mesh: Mesh


class Studio:
  """Draws with the trained stages of `workdir`, up to IN_MEMORY of them loaded.

  Args:
    stages: of an experiment.
    workdir: the folder that holds the stages' folders.
    stage: the one that the page starts with; by default the last one.
    num_images: the most a request may ask for; that many are always drawn.
  """

  def __init__(
    self,
    stages: Mapping[str, Stage],
    workdir: pathlib.Path,
    stage: str | None = None,
    num_images: int = 4,
  ):
    if not 1 <= num_images <= MAX_IMAGES:
      raise ValueError(
        f"--num_images={num_images}: expected 1 to {MAX_IMAGES}, the most"
        " images that a request may ask for."
      )
    self.stages, self.workdir, self.num_images = stages, workdir, num_images
    self.names = [
      name
      for name, config in stages.items()
      if config.objective == "tensorar"
      and orbax_io.steps(workdir / name / "checkpoints")
    ]
    if not self.names:
      raise ValueError(
        f"{workdir} holds no trained stage that draws images: run --mode=train"
        " or --mode=import first, or name another --workdir."
      )
    self.first = choose("--stage", stage or self.names[-1], self.names)
    self.load = functools.lru_cache(maxsize=IN_MEMORY)(self._load)

  def check_name(self, name: Any) -> str:
    """Returns the name of a trained stage; ValueError for anything else."""
    known = name if name in self.names else str(name)[:MAX_SHOWN]
    return choose("checkpoint", known, self.names)

  def title(self, name: str) -> str:
    """A stage with its k and the step of its newest checkpoint."""
    return self._title(name, orbax_io.find(self.workdir / name))

  def _title(self, name: str, checkpoint: pathlib.Path) -> str:
    step = int(checkpoint.name)
    return f"{name} (k = {self.window(name)}, step {step:,})"

  def window(self, name: str) -> int:
    return self.stages[name].tensorar.window

  def vocab_sizes(self, name: str) -> tuple[int, ...]:
    return tuple(build.abstract(self.stages[name].tokenizer).vocab_sizes)

  def conditioning(self, name: str) -> ClassConditioning | TextConditioning:
    return build.conditioning(self.stages[name].conditioning)

  def guidance(self, name: str) -> str:
    """The stage's own guidance scale, as the page shows it."""
    return drawing.guidance_text(self.stages[name].sampling.guidance)

  def _load(self, name: str, checkpoint: pathlib.Path) -> Loaded:
    stage = self.stages[name]
    mesh = sharding.local_mesh(stage.mesh)
    model = build.load_tensorar(stage, checkpoint, mesh)
    is_text = self.conditioning(name).is_text
    tokenizer = build.frozen_tokenizer(stage, self.workdir)
    return Loaded(
      model=sampling.prepare(model, mesh),
      tokenizer=sharding.replicate(tokenizer, mesh),
      conditions=self.conditioning(name),
      encode=build.text_encoder(stage.conditioning, mesh) if is_text else None,
      config=stage.sampling,
      mesh=mesh,
    )

  def draw(self, request: DemoRequest) -> Drawn:
    """Draws the images; ValueError, in words for the page, for bad requests."""
    started = time.monotonic()
    name = self.check_name(request.stage)
    count = _whole(
      "the number of images", request.num_images, 1, self.num_images
    )
    seed = _whole("the seed", request.seed, 0, checks.MAX_SEED)
    scale = _scale(request.guidance)
    conditioning, label = self.conditioning(name), 0
    if isinstance(conditioning, TextConditioning):
      _check_prompt(request.prompt)
    else:
      last = conditioning.num_classes - 1
      label = _whole("the class", request.label, 0, last)
    checkpoint = orbax_io.find(self.workdir / name)  # perhaps a newer one
    loaded = self.load(name, checkpoint)
    if loaded.encode and isinstance(conditioning, TextConditioning):
      rows = conditions.real_rows(*loaded.encode([request.prompt]))
      conditioning = requests.Prompts(conditioning, rows)
    sampler = batches.Sampler(
      loaded.model,
      conditioning,
      dataclasses.replace(loaded.config, guidance=scale),
      seed,
      loaded.mesh,
      guesses.load(self.workdir / name, loaded.config),
    )
    # Short batches are filled up, and cut after everything compiled has run.
    out, _ = next(sampler.batches(np.full(count, label), self.num_images))
    drafts = np.asarray(out.drafts)
    strip, changed = batches.refinement(loaded.tokenizer, drafts)
    return Drawn(
      title=self._title(name, checkpoint),
      strip=strip[:count],
      changed=changed[:count],
      seconds=time.monotonic() - started,
    )


def _whole(what: str, value: Any, least: int, most: int) -> int:
  """`value` as an integer; ValueError if it is not one in this range."""
  try:
    number = float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if number != number // 1 or not least <= number <= most:
    raise ValueError(
      f"{what} is {_shown(value)}: expected a whole number from {least} to"
      f" {most}."
    )
  return int(number)


def _shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _scale(given: Any) -> drawing.Guidance:
  is_number = isinstance(given, int | float) and not isinstance(given, bool)
  text = str(given) if is_number else given
  if not isinstance(text, str) or len(text) > MAX_SHOWN:
    raise ValueError(
      f"guidance is {_shown(given)}: expected a scale, such as 1.5, or one for"
      " each sub-token, such as 4:6."
    )
  scale = drawing.parse_guidance(text)
  if not all(0 <= value <= MAX_SCALE for value in np.atleast_1d(scale)):
    raise ValueError(
      f"guidance is {text}: expected 0 to {MAX_SCALE:g}; 1 is no guidance."
    )
  return scale


def _check_prompt(prompt: Any) -> None:
  if not isinstance(prompt, str):
    raise ValueError(f"the prompt is {_shown(prompt)}: expected a text.")
  if len(prompt) > MAX_PROMPT:
    raise ValueError(
      f"the prompt has {len(prompt):,} letters: expected at most {MAX_PROMPT}."
    )
  requests.check_prompts([prompt], "prompt", 1)
