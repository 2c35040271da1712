"""AdamW with two learning rates: the wrapped backbone's and everything else's.

Spec: section 7. Decay applies to matrices only, never to norms and gains.
"""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import optax

from tensorar_jax.weights import Weights

SCHEDULES = ("constant", "linear", "cosine")
# Norm scales, biases and gains; `gain` is [k, D] but no matrix.
_NO_DECAY = re.compile(r"(^|/)(scale|bias|gain|pad)$")
_STACKED = re.compile(r"(^|/)stacked/")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The optimiser.

  Attributes:
    learning_rate: peak rate of the new modules (of all, without a backbone).
    backbone_learning_rate: peak rate of the backbone; None: learning_rate.
    schedule, backbone_schedule: "constant", or "linear" or "cosine" to zero at
      the last step; backbone_schedule None: as schedule.
    warmup_steps: linear warm-up of both.
    clip_norm: global gradient norm; 0 does not clip.
    ema_decay: of the weight average; 0 keeps none.
  """

  learning_rate: float = 1e-4
  backbone_learning_rate: float | None = None
  schedule: str = "constant"
  backbone_schedule: str | None = None
  warmup_steps: int = 0
  weight_decay: float = 0.05
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  clip_norm: float = 1.0
  ema_decay: float = 0.0

  def __post_init__(self):
    for schedule in (self.schedule, self.backbone_schedule or self.schedule):
      if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: choose one of {SCHEDULES}.")
    for field in ("learning_rate", "backbone_learning_rate", "weight_decay"):
      value = getattr(self, field)
      if value is not None and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{field}={value}: expected a finite number >= 0.")
    if not 0 <= self.ema_decay < 1:
      raise ValueError(f"ema_decay={self.ema_decay}: expected 0 (off) to < 1.")


def _schedule(peak: float, kind: str, warmup: int, num_steps: int):
  decay = max(num_steps - warmup, 1)
  after = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, 0.0, decay),
    "cosine": optax.cosine_decay_schedule(peak, decay),
  }[kind]
  rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  return optax.join_schedules([rise, after], [warmup]) if warmup else after


def schedules(config: OptimConfig, num_steps: int) -> dict[str, optax.Schedule]:
  """The learning rate of each group over the steps."""
  backbone_rate = config.backbone_learning_rate
  if backbone_rate is None:
    backbone_rate = config.learning_rate
  backbone_kind = config.backbone_schedule or config.schedule
  return {
    "new": _schedule(
      config.learning_rate, config.schedule, config.warmup_steps, num_steps
    ),
    "backbone": _schedule(
      backbone_rate, backbone_kind, config.warmup_steps, num_steps
    ),
  }


def group(path: str) -> str:
  """The learning-rate group of a weight: "backbone" or "new"."""
  return "backbone" if path.startswith("backbone/") else "new"


def decays(path: str, weight: jax.Array) -> bool:
  """Whether weight decay applies: to matrices, not counting a layer axis."""
  ndim = weight.ndim - bool(_STACKED.search(path))
  return ndim >= 2 and not _NO_DECAY.search(path)


def make(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
  """clip -> Adam -> decay -> each group's learning rate."""
  rates = {
    name: optax.scale_by_learning_rate(schedule)
    for name, schedule in schedules(config, num_steps).items()
  }

  def labels(params: Weights):
    return {path: group(path) for path in params}

  def mask(params: Weights):
    return {path: decays(path, weight) for path, weight in params.items()}

  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm)
    if config.clip_norm
    else optax.identity(),
    optax.scale_by_adam(config.beta1, config.beta2, config.eps),
    optax.add_decayed_weights(config.weight_decay, mask),
    optax.multi_transform(rates, labels),
  )
