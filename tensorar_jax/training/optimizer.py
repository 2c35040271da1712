"""AdamW with two learning rates: the wrapped backbone's and everything else's.

See docs/method.md, section 7.
"""

from __future__ import annotations

import re
from collections.abc import Hashable

import jax.numpy as jnp
import optax

from tensorar_jax.experiment.schema import OptimConfig
from tensorar_jax.parallel.weights import Weights

# Which share of the rate is left after a share x of the decay.
SCHEDULES = {
  "constant": lambda x: jnp.ones_like(x),
  "linear": lambda x: 1 - x,
  "cosine": lambda x: (1 + jnp.cos(jnp.pi * x)) / 2,
}


def _schedule(config: OptimConfig, peak: float, kind: str, num_steps: int):
  """Makes a schedule: the warm-up to the peak, then a `kind` of decay."""
  warmup, start = config.warmup_steps, config.warmup_start
  final = config.final_rate

  def rate(step):
    rise = start + (1 - start) * step / max(warmup, 1)
    done = (step - warmup) / max(num_steps - warmup, 1)
    done = jnp.clip((done - config.hold) / (1 - config.hold), 0, 1)
    left = final + (1 - final) * SCHEDULES[kind](done)
    return peak * jnp.where(step < warmup, rise, left)

  return rate


def decay_schedule(
  config: OptimConfig, num_steps: int
) -> float | optax.Schedule:
  """Returns the weight decay, or the schedule that it follows."""
  first, last = config.weight_decay, config.final_weight_decay
  if last is None:
    return first

  def decay(step):
    done = jnp.clip(step / num_steps, 0, 1)
    return last + (first - last) * SCHEDULES["cosine"](done)

  return decay


def schedules(config: OptimConfig, num_steps: int) -> dict[str, optax.Schedule]:
  """Makes the schedule of each group's learning rate."""
  backbone_rate = config.backbone_learning_rate
  if backbone_rate is None:
    backbone_rate = config.learning_rate
  backbone_kind = config.backbone_schedule or config.schedule
  return {
    "new": _schedule(config, config.learning_rate, config.schedule, num_steps),
    "backbone": _schedule(config, backbone_rate, backbone_kind, num_steps),
  }


def group(path: str) -> str:
  """Returns the learning-rate group of a weight: "backbone" or "new"."""
  return "backbone" if path.startswith("backbone/") else "new"


def decays(path: str, config: OptimConfig) -> bool:
  """Returns whether weight decay applies to the weight at `path`."""
  return not (config.no_decay and re.search(config.no_decay, path))


def make(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
  """Makes the optimiser: clip -> Adam -> decay -> each group's rate."""
  rates: dict[Hashable, optax.GradientTransformation] = {
    name: optax.scale_by_learning_rate(schedule)
    for name, schedule in schedules(config, num_steps).items()
  }

  def labels(params: Weights):
    return {path: group(path) for path in params}

  def mask(params: Weights):
    return {path: decays(path, config) for path in params}

  clip = optax.identity()
  if config.clip_norm:
    clip = optax.clip_by_global_norm(config.clip_norm)
  return optax.chain(
    clip,
    optax.scale_by_adam(config.beta1, config.beta2, config.eps),
    optax.add_decayed_weights(decay_schedule(config, num_steps), mask),
    optax.multi_transform(rates, labels),
  )
