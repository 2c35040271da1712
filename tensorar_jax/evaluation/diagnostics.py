"""Measures refinement: what a model predicts given its own drafts.

In training, slot j >= 1 of an input window holds the right token with a known
probability and noise otherwise. In sampling it holds a draft that the model
drew itself, given a window of earlier drafts. If the two differ, the training
loss says little about samples. Measured here, with j a slot:

| name              | meaning                                                  |
| ----------------- | -------------------------------------------------------- |
| `cross_entropy`   | of the prediction of slot j, nats, on held-out images    |
| `accuracy`        | how often its argmax is right, on held-out images        |
| `window_accuracy` | how often input slot j >= 1 was right, the same windows  |
| `copy_rate`       | committed token = draft of j >= 1 looks before, sampling |
| `entropy`         | of what a committed token is drawn from, nats, sampling  |
| `steps`           | of the backbone for an image, by the parallel decoder    |

The first three are measured twice: given windows with the noise of training,
and given the windows that the sampler reads when it commits the tokens of the
held-out image (`sampling.draft_along`). A model with window 1 has neither
drafts nor noise, so it has one cross-entropy, one accuracy and the entropy. See
docs/method.md, section 9.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tensorar_jax.generation import batches
from tensorar_jax.interfaces import Batch, Conditioning
from tensorar_jax.method import drawing, losses, noising, sampling, windows
from tensorar_jax.method.noising import NoiseConfig
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.method.tensorar import TensorAR

SEED = 2**21  # apart from every seed that images are measured with
STEP_IMAGES = 64  # are enough for a mean number of steps


def measure(
  model: TensorAR,
  conditioning: Conditioning,
  batch: Batch,
  config: SamplingConfig,
  noise: NoiseConfig,
  batch_size: int,
) -> dict:
  """Measures everything in the table above, as plain numbers and lists.

  Args:
    model: the model that is sampled.
    conditioning: encodes labels.
    batch: held-out "tokens" int32 [n, T, F] and "label" int32 [n]; as many
      images of the same classes are sampled.
    config: how to sample, guidance included.
    noise: the noise of training.
    batch_size: images per call; `n` need not be a multiple.
  """
  labels = np.asarray(batch["label"])
  return {
    "window": model.window,
    **free_running(model, conditioning, labels, config, batch_size),
    **held_out(model, conditioning, batch, config, noise, batch_size),
    "steps": expected_steps(
      model, conditioning, labels[:STEP_IMAGES], config, batch_size
    ),
  }


def free_running(
  model: TensorAR,
  conditioning: Conditioning,
  labels: Int[np.ndarray, "n"],
  config: SamplingConfig,
  batch_size: int,
) -> dict:
  """Samples: {"entropy"} and, if there are drafts, {"copy_rate": [k - 1]}."""
  # Either decoder draws the same tokens; this one needs no guesses.
  config = dataclasses.replace(config, return_logits=True, decoder="window")
  entropies, drafts = [], []
  for out in batches.generate(
    model, conditioning, labels, SEED, config, batch_size
  ):
    assert out.logits is not None  # asked for
    committed = tuple(logits[:, :, 0] for logits in out.logits)
    entropies.append(np.asarray(entropy(committed, config)))
    drafts.append(np.asarray(out.drafts))
  measured: dict[str, Any] = {
    "entropy": float(np.mean(np.concatenate(entropies)))
  }
  if model.window > 1:
    measured["copy_rate"] = copy_rate(np.concatenate(drafts))
  return measured


def expected_steps(
  model: TensorAR,
  conditioning: Conditioning,
  labels: Int[np.ndarray, "n"],
  config: SamplingConfig,
  batch_size: int,
) -> dict[str, Any]:
  """How many backbone steps the parallel decoder takes for an image.

  With Gumbel noise, the rows of `config` and first guesses from the last row,
  which need nothing else.

  Returns:
    {"rows", "tokens": of an image, "mean", "min", "max": steps of an image}.
  """
  rows = min(config.rows, model.num_tokens)
  config = dataclasses.replace(
    config, draw="gumbel", decoder="parallel", rows=rows, first_guess="last_row"
  )
  drawn = batches.generate(
    model, conditioning, labels, SEED, config, batch_size
  )
  taken = np.concatenate([np.asarray(out.steps)[:, -1] + 1 for out in drawn])
  return {
    "rows": rows,
    "tokens": model.num_tokens,
    "mean": float(taken.mean()),
    "min": int(taken.min()),
    "max": int(taken.max()),
  }


def entropy(
  logits: tuple[Float[Array, "*n _"], ...], config: SamplingConfig
) -> Float[Array, "*n"]:
  """In nats, after temperature, top-k and top-p; the sum over sub-tokens.

  Sub-token f was drawn given the sub-tokens before it, so the mean over samples
  estimates the entropy of the whole token.
  """
  total = jnp.zeros(logits[0].shape[:-1])
  for f, sub_token_logits in enumerate(logits):
    options = config.sub_token(f)
    if options.temperature == 0:  # nothing is left to chance
      continue
    probs = drawing.token_probs(sub_token_logits, options.temperature, options)
    logs = jnp.log(jnp.where(probs > 0, probs, 1.0))
    total -= jnp.sum(probs * logs, axis=-1)
  return total


def copy_rate(drafts: Int[np.ndarray, "B T k F"]) -> list[float]:
  """[j - 1]: how often a committed token is the draft of j looks before.

  Position p < j has no such draft and does not count.
  """
  length, window = drafts.shape[1:3]
  rates = []
  for j in range(1, window):
    earlier, committed = drafts[:, : length - j, j], drafts[:, j:, 0]
    rates.append(float(np.mean((earlier == committed).all(axis=-1))))
  return rates


def held_out(
  model: TensorAR,
  conditioning: Conditioning,
  batch: Batch,
  config: SamplingConfig,
  noise: NoiseConfig,
  batch_size: int,
) -> dict:
  """Held-out images: {quantity: {kind of windows: [a value per slot]}}.

  Quantities are "cross_entropy", "accuracy" and, for k > 1, "window_accuracy";
  kinds are "training_noise" and, for k > 1, "own_drafts".
  """
  graphdef, state = nnx.split(model)
  rows: dict[str, list[dict]] = {}
  for index, count in _batches(len(batch["label"]), batch_size):
    cond = conditioning.encode(np.asarray(batch["label"])[index])
    tokens = jnp.asarray(batch["tokens"][index])
    rng = jax.random.fold_in(jax.random.key(SEED), index[0])
    rng_noise, rng_draft = jax.random.split(rng)
    inputs = {
      "training_noise": _noised(graphdef, state, cond, tokens, rng_noise, noise)
    }
    if model.window > 1:
      null = conditioning.null(cond)
      drafts = sampling.draft_along(
        model, tokens, cond, null, rng_draft, config
      )
      inputs["own_drafts"] = drafts[:, :-1], None
    for name, (input_windows, extra) in inputs.items():
      values = _slots(graphdef, state, cond, tokens, input_windows, extra)
      values = {key: np.asarray(value)[:count] for key, value in values.items()}
      rows.setdefault(name, []).append(values)
  measured = {"cross_entropy": {}, "accuracy": {}}
  if model.window > 1:
    measured["window_accuracy"] = {}
  for name, parts in rows.items():
    for quantity, slots in measured.items():
      # The mean is over images: each counts the same in any batch.
      values = np.concatenate([part[quantity] for part in parts])
      slots[name] = np.mean(values, axis=0, dtype=float).tolist()
  return measured


def _batches(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
  """Yields (rows, how many of them count); the last batch is filled up."""
  size = min(size, count)
  for start in range(0, count, size):
    index = np.minimum(np.arange(start, start + size), count - 1)
    yield index, min(size, count - start)


@functools.partial(jax.jit, static_argnames=("graphdef", "noise"))
def _noised(graphdef, state, cond, tokens, rng, noise):
  """The input windows [B, T-1, k, F], and noise on their embeddings or None."""
  model = nnx.merge(graphdef, state)
  clean, valid = windows.unfold(tokens, model.window)
  return noising.corrupt(model, cond, clean[:, :-1], valid[:-1], rng, noise)


@functools.partial(jax.jit, static_argnames="graphdef")
def _slots(graphdef, state, cond, tokens, inputs, extra):
  """Scores the predictions for each image given these input windows."""
  model = nnx.merge(graphdef, state)
  targets, valid = windows.unfold(tokens, model.window)
  hidden = model(cond, inputs, valid[:-1], noise=extra)  # [B, T, k, D]

  def of_image(hidden, targets):
    weights = np.ones(model.window)
    return losses.tensor_cross_entropy(
      model.logits, hidden[None], targets[None], valid, weights
    )[1]

  scalars = jax.vmap(of_image)(hidden, targets)
  slots = lambda name: jnp.stack(
    [scalars[f"{name}/{j}"] for j in range(model.window)], axis=-1
  )
  right = (inputs == targets[:, :-1]).all(axis=-1) & valid[:-1]  # [B, T-1, k]
  share = jnp.sum(right, axis=1) / jnp.sum(valid[:-1], axis=0)
  return {
    "cross_entropy": slots("ce"),
    "accuracy": slots("accuracy"),
    "window_accuracy": share[:, 1:],
  }
