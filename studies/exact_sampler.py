"""Computes the law of a sampler whose model is perfect, over all sequences.

  python -m studies.exact_sampler

Takes random joint laws of a few tokens as the data, and the exact Bayes
predictions of the training task (k = 2) as the model: no network, no training,
no sampling error. Compares three ways to draw the draft of the next token:

  published   from slot 1, as drawn;
  renoised    from slot 1, then noised again as in training;
  chained     from the law given the token just committed, then noised again.

Only the last one reproduces the data's law. docs/method.md, section 10.
"""

from __future__ import annotations

import numpy as np
from absl import app
from jaxtyping import Float

SAMPLERS = ("published", "renoised", "chained")
NUM_TOKENS, VOCAB_SIZE = 5, 3
CONCENTRATIONS = (0.3, 1.0)  # of the Dirichlet law that data laws come from
BETAS = (0.25, 0.5, 0.8, 0.95, 1.0)
NUM_SOURCES = 5


def random_law(
  seed: int, concentration: float, num_tokens: int, vocab_size: int
) -> Float[np.ndarray, "..."]:
  """Draws a joint law, an array with one axis of V entries for each token."""
  rng = np.random.default_rng(seed)
  count = vocab_size**num_tokens
  law = rng.dirichlet(np.full(count, concentration))
  return law.reshape((vocab_size,) * num_tokens)


def sampled_law(
  data: Float[np.ndarray, "..."], beta: float, sampler: str
) -> Float[np.ndarray, "..."]:
  """Computes the law of what a sampler commits, given a perfect model.

  The model has learned p(x_n | windows so far) and p(x_{n+1} | windows so far)
  for windows (x_t, d_t) whose draft d_t is x_{t+1} with probability 1 - beta
  and uniform otherwise. Older drafts are about tokens already committed, so
  only the last one counts.

  Args:
    data: the joint law of T tokens of V values, one axis a token.
    beta: how often training resamples a draft.
    sampler: one of SAMPLERS.

  Returns:
    An array as `data`.

  Raises:
    ValueError: for an unknown sampler.
  """
  if sampler not in SAMPLERS:
    raise ValueError(f"sampler={sampler!r}: expected one of {SAMPLERS}")
  num_tokens, vocab_size = data.ndim, data.shape[0]
  noise = (1 - beta) * np.eye(vocab_size) + beta / vocab_size  # token -> draft
  # Probability of a committed prefix together with the last draft.
  reached = np.ones((1, 1))
  likelihood = np.ones((vocab_size, 1))  # of the last draft; none at first
  for n in range(num_tokens - 1):
    pairs = data.reshape(vocab_size**n, vocab_size, vocab_size, -1).sum(-1)
    joint = np.einsum("pxy,xd->pdxy", pairs, likelihood)
    joint /= joint.sum((2, 3), keepdims=True)
    commit = joint.sum(3)  # [prefix, draft, x_n]
    if sampler == "chained":
      draft = joint / joint.sum(3, keepdims=True)
    else:
      draft = np.broadcast_to(joint.sum(2)[:, :, None], joint.shape)
    if sampler != "published":
      draft = draft @ noise
    reached = np.einsum("pd,pdx,pdxe->pxe", reached, commit, draft)
    reached = reached.reshape(-1, vocab_size)
    likelihood = noise
  last = data.reshape(-1, vocab_size)
  commit = np.einsum("px,xd->pdx", last, likelihood)
  commit /= commit.sum(2, keepdims=True)
  return np.einsum("pd,pdx->px", reached, commit).reshape(data.shape)


def entropy(law: Float[np.ndarray, "..."]) -> float:
  """Entropy of a law, in nats."""
  return float(-np.sum(law * np.log(np.maximum(law, 1e-300))))


def compare(
  sampler: str, beta: float, concentration: float
) -> tuple[float, float]:
  """Averages (total variation, entropy - data's) over the data laws."""
  rows = []
  for seed in range(NUM_SOURCES):
    data = random_law(seed, concentration, NUM_TOKENS, VOCAB_SIZE)
    law = sampled_law(data, beta, sampler)
    rows.append((np.abs(data - law).sum() / 2, entropy(law) - entropy(data)))
  distance, change = np.mean(rows, axis=0)
  return float(distance), float(change)


def table() -> str:
  """Renders all comparisons as a Markdown table."""
  lines = [
    "| concentration | beta | sampler | total variation | entropy - data's |",
    "| --- | --- | --- | --- | --- |",
  ]
  for concentration in CONCENTRATIONS:
    for beta in BETAS:
      for sampler in SAMPLERS:
        distance, change = compare(sampler, beta, concentration)
        lines.append(
          f"| {concentration} | {beta} | {sampler} | {distance:.4f} |"
          f" {change:+.4f} |"
        )
  return "\n".join(lines)


if __name__ == "__main__":
  app.run(lambda argv: print(table()))
