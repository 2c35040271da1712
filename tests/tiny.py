"""Small models of prime sizes for the tests."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tensorar_jax import conditioning, weights
from tensorar_jax.backbones import llamagen
from tensorar_jax.tensorar import TensorAR

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
CLASSES = conditioning.ClassConditioning(5)


def redraw(model: nnx.Module, seed: int = 0, scale: float = 0.3) -> nnx.Module:
  """A copy with every weight random: no zero head or gain hides a mistake."""
  skeleton, params, frozen = weights.split(model)
  keys = jax.random.split(jax.random.key(seed), len(params))
  for key, (path, value) in zip(keys, sorted(params.items()), strict=True):
    mean = 1.0 if path.endswith("scale") else 0.0
    params[path] = mean + scale * jax.random.normal(key, value.shape)
  return skeleton.merge(params, frozen)


def backbone(seed: int = 0, **fields) -> nnx.Module:
  """A random LlamaGen; fields override CONFIG."""
  import dataclasses

  config = dataclasses.replace(CONFIG, **fields)
  return redraw(llamagen.Model(config, rngs=nnx.Rngs(0)), seed)


def wrapped(window: int = 3, seed: int = 0, **options) -> TensorAR:
  """A TensorAR with random backbone, random modules and random gains."""
  return redraw(fresh(window, **options), seed)


def fresh(window: int = 3, **options) -> TensorAR:
  """A random backbone, freshly wrapped."""
  return TensorAR(backbone(), window=window, rngs=nnx.Rngs(1), **options)


def tokens(seed: int = 0, batch: int = 2, length: int = 9) -> jax.Array:
  draw = np.random.RandomState(seed).randint(0, 11, (batch, length, 1))
  return jnp.asarray(draw, jnp.int32)


def cond(batch: int = 2) -> dict:
  return CLASSES.encode(np.arange(batch) % 5)
