"""AdamW with two learning rates: the wrapped backbone's and everything else's.

See docs/method.md, section 7.
"""

from __future__ import annotations

import dataclasses
import math
import re

import jax.numpy as jnp
import optax

from tensorar_jax.parallel.weights import Weights

# What is left of the rate after a share x of the decay.
SCHEDULES = {
  "constant": lambda x: jnp.ones_like(x),
  "linear": lambda x: 1 - x,
  "cosine": lambda x: (1 + jnp.cos(jnp.pi * x)) / 2,
}


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The optimiser.

  Attributes:
    learning_rate: peak rate of the new modules (of all, without a backbone).
    backbone_learning_rate: peak rate of the backbone; None: learning_rate.
    schedule, backbone_schedule: "constant", or "linear" or "cosine" down to
      `final_rate`; backbone_schedule None: as schedule.
    warmup_steps: linear warm-up of both, from `warmup_start`.
    warmup_start, final_rate: at step 0 and after the last one, as shares of
      the peak.
    hold: the share of the steps after the warm-up that stay at the peak.
    weight_decay: as in AdamW; it takes a cosine to `final_weight_decay`, where
      that is given.
    no_decay: regular expression of the paths without decay; "" decays all. By
      default norms, biases and gains (`gain` is [k, D], but no matrix).
    clip_norm: global gradient norm; 0 does not clip.
    ema_decay: of the weight average; 0 keeps none.
  """

  learning_rate: float = 1e-4
  backbone_learning_rate: float | None = None
  schedule: str = "constant"
  backbone_schedule: str | None = None
  warmup_steps: int = 0
  warmup_start: float = 0.0
  final_rate: float = 0.0
  hold: float = 0.0
  weight_decay: float = 0.05
  final_weight_decay: float | None = None
  no_decay: str = r"(^|/)(scale|bias|gain|pad)$"
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  clip_norm: float = 1.0
  ema_decay: float = 0.0

  def __post_init__(self):
    for schedule in (self.schedule, self.backbone_schedule or self.schedule):
      if schedule not in SCHEDULES:
        known = tuple(SCHEDULES)
        raise ValueError(f"schedule={schedule!r}: choose one of {known}.")
    for field in ("learning_rate", "backbone_learning_rate", "weight_decay"):
      value = getattr(self, field)
      if value is not None and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{field}={value}: expected a finite number >= 0.")
    for field in ("warmup_start", "final_rate"):
      if not 0 <= getattr(self, field) <= 1:
        value = getattr(self, field)
        raise ValueError(f"{field}={value}: expected a share, 0 to 1.")
    for field in ("ema_decay", "hold"):
      if not 0 <= getattr(self, field) < 1:
        value = getattr(self, field)
        raise ValueError(f"{field}={value}: expected 0 (off) to < 1.")


def _schedule(config: OptimConfig, peak: float, kind: str, num_steps: int):
  warmup, start, final = (
    config.warmup_steps,
    config.warmup_start,
    config.final_rate,
  )

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
  """The weight decay over the steps."""
  first, last = config.weight_decay, config.final_weight_decay
  if last is None:
    return first

  def decay(step):
    done = jnp.clip(step / num_steps, 0, 1)
    return last + (first - last) * SCHEDULES["cosine"](done)

  return decay


def schedules(config: OptimConfig, num_steps: int) -> dict[str, optax.Schedule]:
  """The learning rate of each group over the steps."""
  backbone_rate = config.backbone_learning_rate
  if backbone_rate is None:
    backbone_rate = config.learning_rate
  backbone_kind = config.backbone_schedule or config.schedule
  return {
    "new": _schedule(config, config.learning_rate, config.schedule, num_steps),
    "backbone": _schedule(config, backbone_rate, backbone_kind, num_steps),
  }


def group(path: str) -> str:
  """The learning-rate group of a weight: "backbone" or "new"."""
  return "backbone" if path.startswith("backbone/") else "new"


def decays(path: str, config: OptimConfig) -> bool:
  """Whether weight decay applies to the weight at `path`."""
  return not (config.no_decay and re.search(config.no_decay, path))


def make(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
  """clip -> Adam -> decay -> each group's learning rate."""
  rates = {
    name: optax.scale_by_learning_rate(schedule)
    for name, schedule in schedules(config, num_steps).items()
  }

  def labels(params: Weights):
    return {path: group(path) for path in params}

  def mask(params: Weights):
    return {path: decays(path, config) for path in params}

  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm)
    if config.clip_norm
    else optax.identity(),
    optax.scale_by_adam(config.beta1, config.beta2, config.eps),
    optax.add_decayed_weights(decay_schedule(config, num_steps), mask),
    optax.multi_transform(rates, labels),
  )
