"""Rules for drawing tokens: what they see, and what they cost."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from tensorar_jax.conditioning import conditions
from tensorar_jax.method import drawing, sampling, windows
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import weights
from tests import programs, tiny
from tests.contract import families

WINDOW = 3


@dataclasses.dataclass(frozen=True)
class AwayFromEarlier:
  """Away from the look before, for all slots, and from the one before that."""

  first: float = 0.5
  second: float = 0.25
  looks: ClassVar[int] = 2

  def draw(self, f, noise, logits, tokens, earlier, config):
    mixed = logits + self.first * (logits - earlier(f, tokens))
    committed = earlier(f, tokens[:, :1], look=2)
    change = self.second * (logits[:, :1] - committed)
    mixed = mixed.at[:, :1].add(change)
    return drawing.InverseCDF().draw(f, noise, mixed, tokens, earlier, config)


def wrapped(name):
  base = families.backbone(name)
  make = lambda rngs: TensorAR(base, window=WINDOW, rngs=rngs)
  return tiny.redraw(weights.abstract(make), 1)


@pytest.mark.parametrize("name", ["llamagen", "open_magvit2"])
def test_a_rule_sees_the_earlier_looks_at_the_same_positions(name):
  """Against loops over steps and slots, of one and of two sub-tokens."""
  model, cond = wrapped(name), families.cond(name)
  null, rule = conditions.null(cond), AwayFromEarlier()
  settings = dict(temperature=0.0, guidance=2.0, guidance_power=1.0)
  config = SamplingConfig(draw=rule, **settings)
  rng = jax.random.key(0)
  drafts = np.array(sampling.generate(model, cond, null, rng, config).drafts)
  steps, factors = model.num_tokens, len(model.vocab_sizes)
  scales = config.guidance_scales(steps, factors)
  valid = windows.valid_slots(jnp.arange(steps), WINDOW, steps)
  vectors = [
    np.array(programs.forward(model, c, drafts[:, :-1], valid[:-1]))
    for c in (cond, null)
  ]

  def logits(f, look):
    """Guided logits of every step and slot, from the look so far back."""
    both = []
    for rows in vectors:
      then = np.zeros_like(rows)
      for n in range(look, steps):
        for j in range(WINDOW - look):
          then[:, n, j] = rows[:, n - look, j + look]
      both.append(np.array(programs.logits(model, then, drafts)[f]))
    scale = scales[:, f][:, None, None]
    return both[1] + scale * (both[0] - both[1])

  for f in range(factors):
    now, one, two = (logits(f, look) for look in (0, 1, 2))
    want = np.zeros(drafts.shape[:3], int)
    for n in range(steps):
      for j in range(WINDOW):
        mixed = now[:, n, j].copy()
        if n >= 1 and j + 1 < WINDOW:
          mixed += rule.first * (now[:, n, j] - one[:, n, j])
        if n >= 2 and j == 0:
          mixed += rule.second * (now[:, n, j] - two[:, n, j])
        want[:, n, j] = mixed.argmax(-1)
    np.testing.assert_array_equal(drafts[..., f], want)
    assert (want != now.argmax(-1)).any()  # the earlier looks matter


def carried(config):
  """How many arrays the sampler's scan carries."""
  cond = tiny.cond()
  traced = sampling.trace(
    tiny.wrapped(WINDOW), cond, None, jax.random.key(0), config
  )
  scans = []

  def visit(jaxpr):
    for equation in jaxpr.eqns:
      inner = list(core.jaxprs_in_params(equation.params))
      if equation.primitive.name == "scan":
        scans.append((equation, *inner))
      for jaxpr in inner:
        visit(jaxpr)

  visit(traced.jaxpr.jaxpr)
  # What is carried leaves the scan as it leaves a turn; the rest is stacked.
  return max(
    sum(out.aval == each.aval for out, each in zip(scan.outvars, turn.outvars))
    for scan, turn in scans
    if scan.params["length"] == 8  # one turn a token
  )


def test_earlier_looks_are_carried_only_for_a_rule_that_asks():
  plain = carried(SamplingConfig())
  assert carried(SamplingConfig(draw=AwayFromEarlier())) == plain + 1


def test_a_rule_is_found_by_its_name(monkeypatch):
  rule = AwayFromEarlier()
  monkeypatch.setitem(drawing.RULES, "away", rule)
  assert drawing.find_rule(SamplingConfig(draw="away").draw) is rule
  with pytest.raises(ValueError, match="draw='home': choose one of"):
    SamplingConfig(draw="home")


def test_a_rule_that_looks_too_far_back_says_so():
  @dataclasses.dataclass(frozen=True)
  class Greedy:
    looks: ClassVar[int] = 1

    def draw(self, f, noise, logits, tokens, earlier, config):
      return jnp.argmax(earlier(f, tokens, look=2), axis=-1)

  model, config = tiny.wrapped(WINDOW), SamplingConfig(draw=Greedy())
  with pytest.raises(ValueError, match="look=2: expected 1 to its looks=1"):
    sampling.generate(model, tiny.cond(), None, jax.random.key(0), config)
