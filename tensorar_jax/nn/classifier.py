"""A small convolutional classifier: the feature space for tiny images.

Inception means nothing on 8 x 8 digits. Trained on the real images by the same
run, this network's features serve the Frechet distance, precision and recall,
and its predictions the class consistency of samples.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, UInt8

from tensorar_jax.interfaces import Batch, Key
from tensorar_jax.nn import checks
from tensorar_jax.nn.image_bytes import from_uint8


@dataclasses.dataclass(frozen=True)
class Config:
  """Image layout and sizes; `halvings` convolutions of stride 2."""

  image_size: tuple[int, int] = (8, 8)
  image_channels: int = 1
  num_classes: int = 10
  width: int = 32
  halvings: int = 1
  num_features: int = 64

  def __post_init__(self):
    sizes = ("image_size", "image_channels", "num_classes", "width")
    checks.numbers(self, checks.COUNT, *sizes, "num_features")
    checks.numbers(self, checks.NOT_NEGATIVE, "halvings")


class Model(nnx.Module):
  """conv, stride-2 convs, one hidden layer (the features), class logits."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = c = config
    self.stem = nnx.Conv(c.image_channels, c.width, (3, 3), rngs=rngs)
    widths = [c.width * 2**i for i in range(c.halvings + 1)]
    self.convs = nnx.List(
      nnx.Conv(a, b, (3, 3), strides=2, rngs=rngs)
      for a, b in zip(widths, widths[1:], strict=False)
    )
    rows, cols = (math.ceil(n / 2**c.halvings) for n in c.image_size)
    flat = rows * cols * widths[-1]
    self.hidden = nnx.Linear(flat, c.num_features, rngs=rngs)
    self.out = nnx.Linear(c.num_features, c.num_classes, rngs=rngs)

  def features(
    self, images: UInt8[Array, "B h w C"]
  ) -> Float[Array, "B num_features"]:
    """The hidden layer after ReLU, in which distances are measured."""
    x = from_uint8(images)
    x = jax.nn.relu(self.stem(x))
    for conv in self.convs:
      x = jax.nn.relu(conv(x))
    return jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1)))

  def classify(
    self, features: Float[Array | np.ndarray, "B n"]
  ) -> Float[Array, "B c"]:
    """The class logits of features."""
    return self.out(jnp.asarray(features))

  def loss(self, batch: Batch, rng: Key):
    """Cross-entropy with 20 % dropout on the features, and accuracy."""
    features = self.features(jnp.asarray(batch["image"]))
    keep = jax.random.bernoulli(rng, 0.8, features.shape)
    logits = self.classify(jnp.where(keep, features / 0.8, 0.0))
    label = batch["label"]
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == label)
    return jnp.mean(ce), {"accuracy": accuracy}
