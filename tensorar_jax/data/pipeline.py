"""Makes batches of a source: shuffle, repeat, flip, share out, fetch.

Grain carries positions, not images, and each batch is fetched at once. Training
reads an endless sequence of epochs, each in its own order. Step s of global
size B is rows `s B ... (s + 1) B - 1` of it, in equal blocks of which a process
reads its own. Joined in order, the batches are the same for any number of
blocks and processes, and the step is the whole state to save.

A source of tokens takes the place of images: each time an image comes up, one
of its variants (crops, flips) is drawn, each as likely as the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import grain
import numpy as np
from jaxtyping import Int, Int32, Integer, UInt8

from tensorar_jax.data import codes, sources
from tensorar_jax.nn import checks
from tensorar_jax.parallel import sharding

# Arrays in memory are fetched faster than threads hand them over.
_READ_ARRAYS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_READ_LAZILY = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)


def train_iterator(
  source: sources.Source | codes.TokenSource,
  *,
  batch_size: int,
  seed: int,
  flip: bool = False,
  share: sharding.Share = sharding.Share(),
) -> grain.DatasetIterator:
  """Endless shuffled batches: "image" uint8 [b, h, w, C], "label" int32 [b].

  Images with captions have a third entry, "caption", an array of str [b].
  In place of "image" a source of tokens gives "tokens", int32 [b, T, F].
  `batch_size` is the global one, and b the part of it in the process's `share`.
  `flip` mirrors each image left to right with probability 1/2.
  `get_state` returns `{"next_index": step}`, which `set_state` takes on any
  number of processes.
  """
  num_images = len(source)
  tokens = isinstance(source, codes.TokenSource)
  if tokens and flip:
    raise ValueError(
      "flip=True: tokens cannot be mirrored; expected False, the flips are "
      "among the variants if the images were tokenized with them"
    )
  if not tokens:
    _check_shape(source)
  _check_sharing(num_images, batch_size, share)
  checks.seed(seed)
  # Not `MapDataset.shuffle`: it costs 14 us an image on 1500 images (it walks a
  # 16-bit permutation until it hits the set), more than all the rest.
  places = grain.MapDataset.range(num_images).repeat()
  places = places.map_with_index(_shuffle(num_images, seed))
  fetch = _fetch
  if flip:
    places = places.random_map(_draw_mirrored, seed=seed)
    fetch = _fetch_mirrored
  elif tokens:
    draw = functools.partial(_draw_variant, source.num_variants)
    places = places.random_map(draw, seed=seed)
    fetch = _fetch_variants
  places = places.batch(
    batch_size // share.count, drop_remainder=True, batch_fn=np.array
  )
  blocks = [places[block :: share.count] for block in share.blocks]
  places = blocks[0]
  if len(blocks) > 1:
    # Grain hands over the rows of the first block; the others are looked up.
    def with_other_blocks(step, rows):
      return np.concatenate([rows] + [block[step] for block in blocks[1:]])

    places = places.map_with_index(with_other_blocks)
  in_memory = isinstance(source, sources.ArraySource)
  return iter(
    places.map(functools.partial(fetch, source)).to_iter_dataset(
      _READ_ARRAYS if in_memory else _READ_LAZILY
    )
  )


def batches(
  source: sources.Source, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
  """Passes over the source once, in order; the last batch may be smaller."""
  _check_shape(source)
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}")
  n = len(source)
  return (
    _fetch(source, np.arange(start, min(start + batch_size, n)))
    for start in range(0, n, batch_size)
  )


def as_arrays(
  source: sources.Source, limit: int | None = None
) -> tuple[UInt8[np.ndarray, "n h w C"], Int32[np.ndarray, " n"]]:
  """Fetches all images and labels, or the first `limit`, in order."""
  _check_shape(source)
  if limit is not None and limit < 1:
    raise ValueError(f"limit must be at least 1 or None, got {limit}")
  n = len(source) if limit is None else min(limit, len(source))
  batch = _fetch(source, np.arange(n))
  return batch["image"], batch["label"]


def _check_shape(source: sources.Source) -> None:
  if None in source.image_shape:
    raise ValueError(
      f"images of shape {source.image_shape} differ in size and cannot be "
      f"batched: crop them to one size first"
    )


def _check_sharing(
  num_images: int, batch_size: int, share: sharding.Share
) -> None:
  if not 1 <= batch_size <= num_images:
    raise ValueError(
      f"batch_size must be between 1 and the {num_images} images of the data "
      f"set, got {batch_size}"
    )
  if batch_size % share.count:
    raise ValueError(
      f"the global batch_size {batch_size} must be divisible by the "
      f"{share.count} blocks of it that the processes share"
    )


def _shuffle(num_images: int, seed: int) -> Callable[[int, int], int]:
  """The map from a place in the endless sequence to a position in the set."""

  # A RandomState, as NumPy froze its stream: a resumed run sees the same images
  # after an upgrade. Two epochs are in use at once where a batch spans both.
  @functools.lru_cache(maxsize=3)
  def order(epoch: int) -> Int[np.ndarray, " n"]:
    return np.random.RandomState([seed, epoch]).permutation(num_images)

  def position(place: int, _: int) -> int:
    epoch, place_in_epoch = divmod(place, num_images)
    return int(order(epoch)[place_in_epoch])

  return position


def _draw_mirrored(position: int, rng: np.random.Generator) -> tuple[int, bool]:
  return position, rng.random() < 0.5


def _draw_variant(
  num_variants: int, position: int, rng: np.random.Generator
) -> tuple[int, int]:
  return position, int(rng.integers(num_variants))


def _fetch_variants(
  source: codes.TokenSource, places: Integer[np.ndarray, "b 2"]
) -> dict[str, np.ndarray]:
  return source.fetch(places[:, 0], places[:, 1])


def _fetch(
  source: sources.Source, positions: Integer[np.ndarray, " b"]
) -> dict[str, np.ndarray]:
  if isinstance(source, sources.ArraySource):
    return source[positions]
  examples = [source[position] for position in positions]
  return {
    name: np.stack([example[name] for example in examples])
    for name in examples[0]
  }


def _fetch_mirrored(
  source: sources.Source, places: Integer[np.ndarray, "b 2"]
) -> dict[str, np.ndarray]:
  """As `_fetch`; the second column says which images to mirror."""
  batch = _fetch(source, places[:, 0])
  mirrored = places[:, 1] == 1
  batch["image"][mirrored] = batch["image"][mirrored, :, ::-1]
  return batch
