"""The Inception network of 2015, whose features FID and its relatives compare.

An image of any size is resized to 299 x 299, scaled to (x - 128) / 128 and
passes through 18 parts; every convolution is followed by batch norm and ReLU:

| parts  | what                                       | map   | channels      |
| ------ | ------------------------------------------ | ----- | ------------- |
| 0 - 6  | stem: five convolutions, two max pools     | 35    | 192           |
| 7 - 9  | 1x1, 5x5 and double 3x3 side by side       | 35    | 256, 288, 288 |
| 10     | halves the map                             | 17    | 768           |
| 11 - 14| 1x1, 7x7 and double 7x7, in two directions | 17    | 768           |
| 15     | halves the map                             | 8     | 1280          |
| 16, 17 | 1x1, forked 3x3 and forked double 3x3      | 8     | 2048          |

| features  | what they are                            | read by               |
| --------- | ---------------------------------------- | --------------------- |
| `pool`    | mean over the last map, 2048             | FID, precision, recall|
| `spatial` | first 7 channels of part 13, 17 x 17 x 7 | sFID                  |
| `logits`  | `pool` times the head's weight, 1008     | Inception Score       |

Metrics agree with those of the ADM evaluation suite. They are not comparable
with PyTorch's own Inception, or with other ways of resizing. Architecture:
Szegedy et al., arXiv 1512.00567; weights: the graph of FID (arXiv 1706.08500),
in the PyTorch file `pt_inception-2015-12-05-6726825d.pth`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Float32, UInt8

from tensorar_jax.checkpoints import torch_import
from tensorar_jax.evaluation.extractor import Extractor as Extractor
from tensorar_jax.interfaces import CONV, LINEAR, Frozen, Rule
from tensorar_jax.nn.convolutions import HIGHEST
from tensorar_jax.parallel import weights

SOURCES = (  # the same weights, as two projects publish them
  "pt_inception-2015-12-05-6726825d.pth",
  "weights-inception-2015-12-05-6726825d.pth",
)
IMAGE_SIZE = 299  # rows and columns that the network sees
EPSILON = 1e-3  # of the batch norms; PyTorch's default is 1e-5
SPATIAL_PART, SPATIAL_CHANNELS = 13, 7
WIDTH_DIVISORS = (1, 2, 4, 8, 16)  # what divides every published width
NUM_FEATURES, NUM_CLASSES = 2048, 1008  # as published


@dataclasses.dataclass(frozen=True)
class Config:
  """Every width is the published one divided by `width_divisor`."""

  width_divisor: int = 1

  def __post_init__(self):
    if self.width_divisor not in WIDTH_DIVISORS:
      raise ValueError(
        f"width_divisor={self.width_divisor}: expected one of"
        f" {WIDTH_DIVISORS}; the published network has 1."
      )


@struct.dataclass
class Features:
  """The network's features of n images; `logits` are without the bias.

  `spatial` is the flattened map: rows, columns, channels.
  """

  pool: Float[Array | np.ndarray, "n features"]
  spatial: Float[Array | np.ndarray, "n positions"]
  logits: Float[Array | np.ndarray, "n classes"]


# The network as data. A chain is a tuple of parts, one after the other.


@dataclasses.dataclass(frozen=True)
class Conv:
  """Convolution, batch norm, ReLU."""

  width: int  # output channels, as published
  kernel: tuple[int, int] = (1, 1)  # rows, columns
  stride: int = 1
  padding: str = "SAME"


@dataclasses.dataclass(frozen=True)
class Pool:
  """3 x 3; a mean counts no padding, a maximum pads with -infinity."""

  mean: bool = False
  stride: int = 1
  padding: str = "SAME"


@dataclasses.dataclass(frozen=True)
class Fork:
  """Chains side by side, their channels concatenated."""

  branches: tuple[tuple[Any, ...], ...]


_MEAN, _MAX = Pool(mean=True), Pool()
_HALF_MAX = Pool(stride=2, padding="VALID")
_half = functools.partial(Conv, kernel=(3, 3), stride=2, padding="VALID")


def _fork_35(pool_width: int) -> Fork:
  return Fork(
    (
      (Conv(64),),
      (Conv(48), Conv(64, (5, 5))),
      (Conv(64), Conv(96, (3, 3)), Conv(96, (3, 3))),
      (_MEAN, Conv(pool_width)),
    )
  )


def _fork_17(width: int) -> Fork:
  row, column = Conv(width, (1, 7)), Conv(width, (7, 1))
  return Fork(
    (
      (Conv(192),),
      (Conv(width), row, Conv(192, (7, 1))),
      (Conv(width), column, row, column, Conv(192, (1, 7))),
      (_MEAN, Conv(192)),
    )
  )


def _fork_8(pool: Pool) -> Fork:
  split = Fork(((Conv(384, (1, 3)),), (Conv(384, (3, 1)),)))
  return Fork(
    (
      (Conv(320),),
      (Conv(384), split),
      (Conv(448), Conv(384, (3, 3)), split),
      (pool, Conv(192)),
    )
  )


_TO_17 = Fork(
  ((_half(384),), (Conv(64), Conv(96, (3, 3)), _half(96)), (_HALF_MAX,))
)
_TO_8 = Fork(
  (
    (Conv(192), _half(320)),
    (Conv(192), Conv(192, (1, 7)), Conv(192, (7, 1)), _half(192)),
    (_HALF_MAX,),
  )
)
NETWORK = (
  _half(32),
  Conv(32, (3, 3), padding="VALID"),
  Conv(64, (3, 3)),
  _HALF_MAX,
  Conv(80),
  Conv(192, (3, 3), padding="VALID"),
  _HALF_MAX,
  _fork_35(32),
  _fork_35(64),
  _fork_35(64),
  _TO_17,
  _fork_17(128),
  _fork_17(160),
  _fork_17(160),
  _fork_17(192),
  _TO_8,
  _fork_8(_MEAN),
  # The graph's last block takes the maximum where all others take the mean.
  _fork_8(_MAX),
)


# The same as modules.


class ConvNorm(nnx.Module):
  """A `Conv`; it normalises by stored statistics, not those of the batch."""

  def __init__(self, inputs: int, spec: Conv, divisor: int, rngs: nnx.Rngs):
    self.outputs = spec.width // divisor
    self.conv = nnx.Conv(
      inputs,
      self.outputs,
      spec.kernel,
      strides=spec.stride,
      padding=spec.padding,
      use_bias=False,
      precision=HIGHEST,
      rngs=rngs,
    )
    ones, zeros = jnp.ones(self.outputs), jnp.zeros(self.outputs)
    self.scale, self.bias = nnx.Param(ones), nnx.Param(zeros)
    self.mean, self.var = Frozen(zeros), Frozen(ones)

  def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
    gain = self.scale[...] / jnp.sqrt(self.var[...] + EPSILON)
    shift = self.bias[...] - self.mean[...] * gain
    return jax.nn.relu(self.conv(x) * gain + shift)


class Pooling(nnx.Module):
  """A `Pool`."""

  def __init__(self, inputs: int, spec: Pool, divisor: int, rngs: nnx.Rngs):
    del divisor, rngs
    self.outputs, self.spec = inputs, spec

  def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
    mean = functools.partial(nnx.avg_pool, count_include_pad=False)
    pool = mean if self.spec.mean else nnx.max_pool
    return pool(x, (3, 3), (self.spec.stride,) * 2, self.spec.padding)


class Branches(nnx.Module):
  """A `Fork`."""

  def __init__(self, inputs: int, spec: Fork, divisor: int, rngs: nnx.Rngs):
    chains = [_chain(chain, inputs, divisor, rngs) for chain in spec.branches]
    self.branches = nnx.List([chain for chain, _ in chains])
    self.outputs = sum(outputs for _, outputs in chains)

  def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W D"]:
    step = lambda x, part: part(x)
    ends = [functools.reduce(step, chain, x) for chain in self.branches]
    return jnp.concatenate(ends, axis=-1)


_MODULES = {Conv: ConvNorm, Pool: Pooling, Fork: Branches}


def _chain(chain, inputs, divisor, rngs) -> tuple[nnx.List, int]:
  """The modules of a chain, and its number of output channels."""
  modules = []
  for spec in chain:
    modules.append(_MODULES[type(spec)](inputs, spec, divisor, rngs))
    inputs = modules[-1].outputs
  return nnx.List(modules), inputs


class Model(nnx.Module):
  """The network; `parts[i]` is part i of the table above."""

  def __init__(self, config: Config, *, rngs: nnx.Rngs):
    self.config = config
    self.parts, width = _chain(NETWORK, 3, config.width_divisor, rngs)
    classes = NUM_CLASSES // config.width_divisor
    head = functools.partial(nnx.Linear, use_bias=False, precision=HIGHEST)
    self.head = head(width, classes, rngs=rngs)
    self.head_bias = nnx.Param(jnp.zeros(classes))

  def __call__(self, images: UInt8[Array, "B h w 3"]) -> Features:
    """The features of RGB images of any size."""
    x = normalise(images)
    for index, part in enumerate(self.parts):
      x = part(x)
      if index == SPATIAL_PART:
        # The 1x1 branch comes first in the concatenation.
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
    pool = x.mean(axis=(1, 2))
    return Features(pool=pool, spatial=spatial, logits=self.classify(pool))

  def classify(
    self, pool: Float[Array, "B features"], bias: bool = False
  ) -> Float[Array, "B classes"]:
    """Class logits; the Inception Score takes them without the bias."""
    logits = self.head(pool)
    return logits + self.head_bias[...] if bias else logits


def normalise(images: UInt8[Array, "B h w 3"]) -> Float32[Array, "B H W 3"]:
  """The network's input, [-1, 1), 299 x 299. White is 0.9921875, not 1."""
  return (resize(images) - 128) / 128


def resize(images: UInt8[Array, "B h w 3"]) -> Float32[Array, "B H W 3"]:
  """Resizes images to 299 x 299, still in 0..255, as TensorFlow 1 does.

  Bilinear between the two nearest pixels in each direction, at any scale:
  output pixel i lies at i * in / out, so pixels are not centred, corners are
  not aligned, and shrinking does not smooth.
  """
  (top, bottom, down), (left, right, across) = (
    _sources(size) for size in images.shape[1:3]
  )

  def mix_columns(rows):
    rows = images[:, rows]
    return _mix(rows[:, :, left], rows[:, :, right], across[:, None])

  return _mix(mix_columns(top), mix_columns(bottom), down[:, None, None])


def _mix(a, b, weight):
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return a + (b - a) * weight


def _sources(size: int):
  """(low pixel, high pixel, weight of the high one) of each output pixel.

  On the host and in float32, as published: float64 positions move logits by
  2e-3, and so does a compiler that fuses product and difference.
  """
  scale = np.float32(size) / np.float32(IMAGE_SIZE)
  position = np.arange(IMAGE_SIZE, dtype=np.float32) * scale
  low = np.floor(position)
  high = np.minimum(low + 1, size - 1)
  return low.astype(np.int32), high.astype(np.int32), position - low


# The convolutions of the published file, in the order of NETWORK.

_DOUBLE = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
_BLOCK_35 = ("branch1x1", "branch5x5_1", "branch5x5_2", *_DOUBLE, "branch_pool")
_BLOCK_17 = (
  "branch1x1",
  "branch7x7_1",
  "branch7x7_2",
  "branch7x7_3",
  "branch7x7dbl_1",
  "branch7x7dbl_2",
  "branch7x7dbl_3",
  "branch7x7dbl_4",
  "branch7x7dbl_5",
  "branch_pool",
)
_BLOCK_8 = (
  "branch1x1",
  "branch3x3_1",
  "branch3x3_2a",
  "branch3x3_2b",
  "branch3x3dbl_1",
  "branch3x3dbl_2",
  "branch3x3dbl_3a",
  "branch3x3dbl_3b",
  "branch_pool",
)
_SOURCE_BLOCKS = {
  **{f"Mixed_5{i}": _BLOCK_35 for i in "bcd"},
  "Mixed_6a": ("branch3x3", *_DOUBLE),
  **{f"Mixed_6{i}": _BLOCK_17 for i in "bcde"},
  "Mixed_7a": (
    "branch3x3_1",
    "branch3x3_2",
    "branch7x7x3_1",
    "branch7x7x3_2",
    "branch7x7x3_3",
    "branch7x7x3_4",
  ),
  **{f"Mixed_7{i}": _BLOCK_8 for i in "bc"},
}
_SOURCE_CONVS = (
  "Conv2d_1a_3x3",
  "Conv2d_2a_3x3",
  "Conv2d_2b_3x3",
  "Conv2d_3b_1x1",
  "Conv2d_4a_3x3",
  *(f"{block}.{c}" for block, convs in _SOURCE_BLOCKS.items() for c in convs),
)


def _conv_paths(chain, path: str) -> Iterator[str]:
  """The path of every convolution of a chain, in order."""
  for i, spec in enumerate(chain):
    if isinstance(spec, Conv):
      yield f"{path}/{i}"
    elif isinstance(spec, Fork):
      for j, branch in enumerate(spec.branches):
        yield from _conv_paths(branch, f"{path}/{i}/branches/{j}")


def conv_rules(source: str, target: str) -> list[Rule]:
  """Published names -> paths of one `ConvNorm`."""
  source = re.escape(source)
  return [
    Rule(rf"{source}\.conv\.weight", f"{target}/conv/kernel", CONV),
    Rule(rf"{source}\.bn\.weight", f"{target}/scale"),
    Rule(rf"{source}\.bn\.bias", f"{target}/bias"),
    Rule(rf"{source}\.bn\.running_(?P<of>mean|var)", target + "/{of}"),
  ]


def import_rules(config: Config) -> list[Rule]:
  """Published names -> paths of `Model`."""
  del config  # Only widths differ.
  pairs = zip(_SOURCE_CONVS, _conv_paths(NETWORK, "parts"), strict=True)
  return [
    *(rule for pair in pairs for rule in conv_rules(*pair)),
    Rule(r".+\.num_batches_tracked", None),
    Rule(r"fc\.weight", "head/kernel", LINEAR),
    Rule(r"fc\.bias", "head_bias"),
  ]


def load(source: str | pathlib.Path | Mapping[str, Any]) -> Model:
  """The network of a `.pth`, `.pt` or `.safetensors` file, or of named arrays.

  Anything but one of SOURCES, or a copy with narrower layers, is a ValueError.
  """
  is_mapping = isinstance(source, Mapping)
  tensors = source if is_mapping else torch_import.load_state_dict(source)
  try:
    config = _config_of(tensors)
    model = weights.abstract(lambda rngs: Model(config, rngs=rngs))
    return torch_import.fill(model, import_rules(config), tensors)
  except ValueError as error:
    raise ValueError(
      f"{'these arrays' if is_mapping else source}: not the Inception of FID."
      f" Download {SOURCES[0]}; PyTorch's own Inception v3 is another network."
      f" ({error})"
    ) from error


def _config_of(tensors) -> Config:
  shape = tuple(tensors["fc.weight"].shape) if "fc.weight" in tensors else ()
  if len(shape) != 2 or not shape[1] or NUM_FEATURES % shape[1]:
    raise ValueError(
      f"fc.weight has shape {shape or None}; expected"
      f" {(NUM_CLASSES, NUM_FEATURES)}, both over one of {WIDTH_DIVISORS}"
    )
  return Config(width_divisor=NUM_FEATURES // shape[1])
