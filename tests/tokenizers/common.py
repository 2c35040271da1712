"""What several tests of tokenizers need."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import tensorar_jax as tj


def nhwc(x) -> jax.Array:
  """An array of PyTorch's layout in ours."""
  return jnp.asarray(x).transpose(0, 2, 3, 1)


def nchw(x) -> np.ndarray:
  """An array of our layout in PyTorch's."""
  return np.asarray(x).transpose(0, 3, 1, 2)


def discs() -> jax.Array:
  """Images [32, 12, 12, 1] of discs of many places and sizes, uint8."""
  rng = np.random.default_rng(0)
  y, x, r = rng.uniform((2, 2, 1), (10, 10, 4), (32, 3)).T[..., None, None]
  rows, cols = np.mgrid[:12, :12]
  images = np.clip(255 * (r - np.hypot(rows - y, cols - x)), 0, 255)
  return jnp.asarray(images[..., None], jnp.uint8)


def train(model: nnx.Module, images: jax.Array, steps: int = 40) -> list[dict]:
  """The metrics of every step of training on one batch."""
  graph, params = nnx.split(model)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))

  @jax.jit
  def step(params, state, rng):
    def loss(params):
      return nnx.merge(graph, params).loss({"image": images}, rng)

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, metrics

  state, history = optimizer.init(params), []
  for key in jax.random.split(jax.random.key(0), steps):
    params, state, metrics = step(params, state, key)
    history.append({k: float(v) for k, v in metrics.items()})
  print(history[0], history[-1])
  return history


def published_maskgit_vq(file: pathlib.Path) -> nnx.Module:
  """A fixture's tokenizer, through the public API."""
  meta = json.loads((file.parent / "config.json").read_text())
  return tj.import_tokenizer(
    "maskgit_vq",
    str(file),
    channels=meta["hidden_channels"],
    channel_multipliers=meta["channel_mult"],
    num_res_blocks=meta["num_res_blocks"],
    code_dim=meta["z_channels"],
    codebook_size=meta["codebook_size"],
    image_channels=meta["num_channels"],
    image_size=(meta["resolution"],) * 2,
    codebook_weight=meta.get("commitment_cost", 0.25),
  )


def vq_config(meta: dict, **fields) -> dict:
  """Fields of a `vq.Config` from those of a fixture."""
  return dict(
    channels=meta["ch"],
    channel_multipliers=tuple(meta["ch_mult"]),
    num_res_blocks=meta["num_res_blocks"],
    latent_channels=meta["z_channels"],
    code_dim=meta["codebook_embed_dim"],
    codebook_size=meta["codebook_size"],
    norm_groups=meta["norm_groups"],
    **fields,
  )
