"""Small models of prime sizes for the tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tensorar_jax.backbones import llamagen
from tensorar_jax.conditioning import conditions
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import weights

CONFIG = llamagen.Config(
  vocab_size=11,
  grid=(3, 3),
  width=16,
  num_layers=3,
  num_heads=2,
  num_classes=5,
  mlp_multiple=8,
  token_dropout=0.0,
  residual_dropout=0.0,
  mlp_dropout=0.0,
)
# Fields of a VQ tokenizer of as many tokens of the same vocabulary.
VQ = dict(
  channels=8,
  channel_multipliers=(1, 2),
  num_res_blocks=1,
  latent_channels=8,
  code_dim=4,
  codebook_size=11,
  norm_groups=4,
  image_size=(6, 6),
)
CLASSES = conditions.ClassConditioning(5)
TEXTS = conditions.TextConditioning(width=7, length=5)
PROMPTS = conditions.PromptConditioning(length=5, vocab_size=13)


def redraw(model: nnx.Module, seed: int = 0, scale: float = 0.3) -> nnx.Module:
  """Copies a model with random weights: no zero head or gain hides a mistake.

  The model may be abstract. The draws are NumPy's: JAX would compile a program
  for every shape.
  """
  skeleton, params, frozen = weights.split(model)
  rng, drawn = np.random.default_rng(seed), {}
  for path, value in sorted({**params, **frozen}.items()):
    mean = 1.0 if path.endswith("scale") else 0.0
    numbers = mean + scale * rng.standard_normal(value.shape)
    drawn[path] = jnp.asarray(numbers, jnp.float32)
  return skeleton.merge(drawn)


def backbone(seed: int = 0, **fields) -> nnx.Module:
  """Makes a random LlamaGen; fields override CONFIG."""
  config = dataclasses.replace(CONFIG, **fields)
  make = lambda rngs: llamagen.Model(config, rngs=rngs)
  return redraw(weights.abstract(make), seed)


def wrapped(window: int = 3, seed: int = 0, **options) -> TensorAR:
  """Makes a TensorAR with random backbone, random modules and random gains."""
  make = lambda rngs: TensorAR(backbone(), window=window, rngs=rngs, **options)
  return redraw(weights.abstract(make), seed)


def fresh(window: int = 3, **options) -> TensorAR:
  """Wraps a random backbone; the modules and gains are fresh."""
  return TensorAR(backbone(), window=window, rngs=nnx.Rngs(1), **options)


def tokens(seed: int = 0, batch: int = 2, length: int = 9) -> jax.Array:
  draw = np.random.RandomState(seed).randint(0, 11, (batch, length, 1))
  return jnp.asarray(draw, jnp.int32)


def cond(batch: int = 2) -> dict:
  return CLASSES.encode(np.arange(batch) % 5)


def texts(numbers=(0, 1)) -> dict:
  """Draws features for each number, of 1, 3, 5, 1, ... rows in their order."""
  shape = (TEXTS.length, TEXTS.width)
  draw = lambda number: np.random.RandomState(number).standard_normal(shape)
  features = np.stack([draw(number) for number in numbers]).astype(np.float32)
  rows = 1 + 2 * (np.arange(len(numbers)) % 3)
  return TEXTS.encode((features, np.arange(TEXTS.length) < rows[:, None]))


def prompts(numbers=(0, 1)) -> dict:
  """Draws ids for each number, between 0 and 1; null has 2 there."""
  draw = lambda number: np.random.RandomState(number).randint(3, 13, 3).tolist()
  # Of 3, 4, 5, 3, ... in their order.
  ids = [[0, *draw(n)[: 1 + i % 3], 1] for i, n in enumerate(numbers)]
  return PROMPTS.encode(conditions.prompt_rows(ids, 2, PROMPTS.length))
