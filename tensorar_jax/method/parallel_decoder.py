"""The parallel decoder: several steps of an image in one step of the backbone.

The window decoder reads all weights once for each token. This one guesses what
the next steps will draw and runs `rows` of them at once:

    commit  w[0 .. c-1]        guess  g[c], g[c+1], ...
    run     steps c .. c+m-1   step n reads the window before it
    draw    d[c], d[c+1], ...  each by the random numbers of its own step
    keep    d[c], and d[c+i] as long as g[c], .., g[c+i-1] were what was drawn

The random numbers of a step are fixed, so a guess is right if and only if it is
what the step before really draws. The tokens are those of the window decoder,
one for one, whatever is guessed; better guesses need fewer steps. Draws that
were not kept are the next guesses: they have read more of the right tokens than
the guesses before them (Jacobi iteration; Teng et al., arXiv:2410.01699, for
images). Steps that nobody has guessed yet get a first guess, see `GUESSES`.

Images advance at their own pace. See docs/fewer_steps.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from tensorar_jax.interfaces import Cache, Key, Samples
from tensorar_jax.method.decoding import SamplingInputs, WindowDrawer
from tensorar_jax.method.drawing import Noise
from tensorar_jax.method.windows import valid_slots
from tensorar_jax.nn import layers


@struct.dataclass
class ParallelState:
  """What one step of the parallel decoder hands to the next.

  S = T + 2 m steps have room: a finished image goes on to draw steps that do
  not exist, which nothing reads. Partition specs may stand for the arrays.

  Attributes:
    cache: as in `window_decoder.SamplingState`; `end` is the row of the first
      step to run. Rows from there on hold guesses of earlier steps.
    windows: int32 [B, S, k, F], the windows that steps < `count` have drawn,
      and guesses of those that the later ones will draw.
    count: int32 [B], how many steps are done; T at the end.
    age: int32 [B], how many backbone steps it has taken, prefill counted.
    steps: int32 [B, T], in which of them each token was committed.
    looks: as in `window_decoder.SamplingState`, of S steps, or None.
    logits: the guided logits of each sub-token, [B, S, k, V_f], if they were
      asked for, or None.
  """

  cache: Cache
  windows: Any
  count: Any
  age: Any
  steps: Any
  looks: Any
  logits: Any


def _take(array: Array, start: Int[Array, "B"], length: int) -> Array:
  """Entries start .. start + length - 1 on the second axis of each row."""
  read = lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, length)
  return jax.vmap(read)(array, start)


def _at(array: Array, index: Int[Array, "B *m"]) -> Array:
  """Entries of each row by their index on the second axis; below 0 the first.

  A slice that began below 0 would be another slice, not one with fewer entries.
  """
  return jax.vmap(lambda row, i: row[i])(array, jnp.maximum(index, 0))


def _put(array: Array, new: Array, start: Int[Array, "B"]) -> Array:
  """The array with entries from start on, on the second axis, replaced."""
  write = jax.lax.dynamic_update_slice_in_dim
  return jax.vmap(lambda row, rows, first: write(row, rows, first, 0))(
    array, new, start
  )


def _flat(array: Array) -> Array:
  """Joins the first two axes."""
  return array.reshape(-1, *array.shape[2:])


# --- first guesses -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LastRow:
  """What is known after the last step that was run, guesses before it or not.

  Attributes:
    drawer: draws windows.
    inputs: of the call.
    keys: the key of each image, [B].
    step: the number of that step for each image.
    vectors: its vectors for every slot.
    logits: its guided logits of sub-token 0.
    windows: drawn or guessed windows up to that step.
    count: how many steps after it to guess.
  """

  drawer: WindowDrawer
  inputs: SamplingInputs
  keys: Key
  step: Int[Array, "B"]
  vectors: Float[Array, "rows k D"]
  logits: Float[Array, "B k V"]
  windows: Int[Array, "B S k F"]
  count: int

  @property
  def steps(self) -> Int[Array, "B g"]:
    """The steps to guess."""
    return self.step[:, None] + 1 + jnp.arange(self.count)

  @property
  def distance(self) -> Int[np.ndarray, "g k"]:
    """How far each slot's position is from that of the last row's slot 0."""
    slots = np.arange(self.drawer.model.window)
    return 1 + np.arange(self.count)[:, None] + slots


def _from_last_row(last: LastRow) -> Int[Array, "B g k F"]:
  """Draws from what the last row predicts for the same position.

  Further on than it predicts, from its last slot's prediction.
  """
  slots = np.minimum(last.distance, last.drawer.model.window - 1)
  tokens, _ = last.drawer.draw(
    _flat(last.vectors[:, slots]),
    jnp.repeat(last.keys, last.count),
    last.steps.reshape(-1),
    first_logits=_flat(last.logits[:, slots]),
  )
  return tokens.reshape(len(last.keys), last.count, *tokens.shape[1:])


def _from_marginals(last: LastRow) -> Int[Array, "B g k F"]:
  """Draws from how often each token occurs at the position."""
  drawer, inputs = last.drawer, last.inputs
  factors, window = len(drawer.model.vocab_sizes), drawer.model.window
  position = jnp.minimum(
    last.step[:, None, None] + last.distance, drawer.model.num_tokens - 1
  )
  keys, steps = jnp.repeat(last.keys, last.count), last.steps.reshape(-1)
  shape = (len(steps), window, factors)
  tokens = jnp.zeros(shape, jnp.int32)
  for f, table in enumerate(inputs.marginals):
    logits = _flat(table[inputs.group[:, None, None], position])
    drawn = drawer.rule.draw(
      f=f,
      noise=Noise(keys, steps, slots=window, factors=factors, f=f),
      logits=logits,
      tokens=tokens,
      earlier=lambda f, tokens, look=1, logits=logits: logits[
        :, : tokens.shape[1]
      ],
      config=drawer.config.sub_token(f),
    )
    tokens = tokens.at[..., f].set(drawn)
  return tokens.reshape(len(last.keys), last.count, *shape[1:])


def _from_left(last: LastRow) -> Int[Array, "B g k F"]:
  """Repeats the last row's token."""
  token = _take(last.windows, last.step, 1)[:, :, :1]
  shape = (len(token), *last.distance.shape, token.shape[-1])
  return jnp.broadcast_to(token, shape)


def _from_above(last: LastRow) -> Int[Array, "B g k F"]:
  """Repeats the tokens of the grid's row above, and the left one at the top."""
  columns = last.drawer.model.backbone.grid[1]
  back = last.distance - columns * -(-last.distance // columns)  # <= 0
  source = last.step[:, None, None] + back
  source = jnp.where(source < 0, last.step[:, None, None], source)
  return _at(last.windows[:, :, 0], source)


GUESSES: dict[str, Callable[[LastRow], Int[Array, "B g k F"]]] = {
  "last_row": _from_last_row,
  "left": _from_left,
  "above": _from_above,
  "marginals": _from_marginals,
}


# --- decoding ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ParallelDecoder:
  """Runs the images of one device.

  Attributes:
    drawer: draws windows; it holds the model and the config.
    inputs: of the call.
    keys: the key of each image, [B].
    cond: the conditions; with guidance [cond | null], 2B.
  """

  drawer: WindowDrawer
  inputs: SamplingInputs
  keys: Key
  cond: dict

  @property
  def rows(self) -> int:
    """How many steps of an image run at once: m."""
    return self.drawer.config.rows

  def begin(self) -> ParallelState:
    """Runs the prefix, draws the first window and guesses the next ones."""
    model, batch = self.drawer.model, len(self.keys)
    steps = model.num_tokens + 2 * self.rows
    hidden, cache = model.backbone.prefill(self.cond, spare=self.rows)
    vectors = model.decode_window(hidden)
    first = jnp.zeros(batch, jnp.int32)
    window, logits = self.drawer.draw(vectors, self.keys, first)
    looks = self.drawer.init_looks(vectors, steps)
    if looks is not None:
      looks = looks.at[:, 0].set(vectors[:, 1:])
    kept = None
    if self.drawer.config.return_logits:
      room = lambda a: jnp.zeros((batch, steps, *a.shape[1:]), a.dtype)
      kept = tuple(room(a).at[:, 0].set(a) for a in logits)
    windows = jnp.zeros((batch, steps, *window.shape[1:]), jnp.int32)
    windows = windows.at[:, 0].set(window)
    return ParallelState(
      cache=dataclasses.replace(cache, is_aligned=False),
      windows=self._guess(windows, first, vectors, logits[0]),
      count=first + 1,
      age=first + 1,
      steps=jnp.zeros((batch, model.num_tokens), jnp.int32),
      looks=looks,
      logits=kept,
    )

  def step(self, state: ParallelState) -> ParallelState:
    """Runs the next rows of every image and keeps what is right."""
    drawer, rows, count = self.drawer, self.rows, state.count
    model = drawer.model
    num_tokens, window = model.num_tokens, model.window
    steps = count[:, None] + jnp.arange(rows)  # [B, m]
    # Rows of the backbone.
    valid = valid_slots(steps - 1, window, num_tokens)
    h = model.encode_window(_take(state.windows, count - 1, rows), valid)
    hidden, cache = model.backbone.decode(self._both(h), state.cache)
    vectors = model.decode_window(hidden)  # [B or 2B, m, k, D]
    looks, earlier_vectors = state.looks, ()
    if looks is not None:
      looks = _put(looks, vectors[:, :, 1:], self._both(count))
      earlier_vectors = tuple(
        _flat(_at(looks, self._both(steps) - look)[:, :, look - 1 :])
        for look in range(1, drawer.looks + 1)
      )
    # Draws.
    tokens, logits = drawer.draw(
      _flat(vectors),
      jnp.repeat(self.keys, rows),
      steps.reshape(-1),
      earlier_vectors,
    )
    apart = lambda a: a.reshape(-1, rows, *a.shape[1:])
    tokens, logits = apart(tokens), tuple(map(apart, logits))
    # Checks, from the front.
    exists = valid_slots(steps, window, num_tokens)[..., None]
    wrong = exists & (tokens != _take(state.windows, count, rows))
    right = ~wrong.any(axis=(2, 3))
    kept = 1 + jnp.cumprod(right[:, :-1], axis=1).sum(axis=1)
    kept = jnp.minimum(kept, num_tokens - count)
    position, start = jnp.arange(num_tokens), count[:, None]
    is_new = (position >= start) & (position < start + kept[:, None])
    all_logits = state.logits
    if all_logits is not None:
      all_logits = tuple(
        _put(old, new, count)
        for old, new in zip(all_logits, logits, strict=True)
      )
    end = cache.end - rows + self._both(kept)
    windows = _put(state.windows, tokens, count)
    return ParallelState(
      cache=dataclasses.replace(cache, end=end),
      windows=self._guess(
        windows, steps[:, -1], vectors[:, -1], logits[0][:, -1]
      ),
      count=count + kept,
      age=state.age + (kept > 0),
      steps=jnp.where(is_new, state.age[:, None], state.steps),
      looks=looks,
      logits=all_logits,
    )

  def run(
    self, state: ParallelState, enough: Int[Array, ""] | int, total: Callable
  ) -> ParallelState:
    """Takes steps until `enough` images are finished.

    `total` sums a number over the devices that take part: they stop after the
    same step, so that whatever they exchange in a step stays in order.
    """

    def goes_on(state):
      return total(jnp.sum(self.is_finished(state))) < enough

    def body(carry):
      state = self.step(carry[0])
      return state, goes_on(state)

    # The comparison is carried: a number in the condition would look like the
    # length of the loop to those who read the compiled program.
    carry = state, goes_on(state)
    state, _ = jax.lax.while_loop(lambda carry: carry[1], body, carry)
    return state

  def is_finished(self, state: ParallelState) -> Bool[Array, "B"]:
    """Which images are complete."""
    return state.count >= self.drawer.model.num_tokens

  def refill(
    self, state: ParallelState, is_new: Bool[Array, "B"]
  ) -> ParallelState:
    """Begins the images where `is_new`, in the places of those before them."""
    new = self.begin()
    prefix = layers.cache_rows(new.cache) - new.windows.shape[1] + self.rows

    def choose(old, new, axis=0):
      chosen = is_new if old.shape[axis] == len(is_new) else self._both(is_new)
      shape = [1] * old.ndim
      shape[axis] = len(chosen)
      return jnp.where(chosen.reshape(shape), new, old)

    def choose_rows(old, new):
      """Of a cache's arrays, only the prefix: later rows are written first."""
      rows = lambda a: jax.lax.slice_in_dim(a, 0, prefix, axis=a.ndim - 2)
      chosen = choose(rows(old), rows(new), axis=old.ndim - 4)
      return jax.lax.dynamic_update_slice(old, chosen, (0,) * old.ndim)

    cache = dataclasses.replace(
      state.cache,
      k=jax.tree.map(choose_rows, state.cache.k, new.cache.k),
      v=jax.tree.map(choose_rows, state.cache.v, new.cache.v),
      end=choose(state.cache.end, new.cache.end),
      context=jax.tree.map(choose, state.cache.context, new.cache.context),
    )
    rest = {
      field.name: jax.tree.map(
        choose, getattr(state, field.name), getattr(new, field.name)
      )
      for field in dataclasses.fields(state)
      if field.name != "cache"
    }
    return ParallelState(cache=cache, **rest)

  def samples(self, state: ParallelState) -> Samples:
    """The samples of a state; they mean something where it is finished."""
    cut = lambda a: a[:, : self.drawer.model.num_tokens]
    drafts, logits = jax.tree.map(cut, (state.windows, state.logits))
    return Samples(
      tokens=drafts[:, :, 0], drafts=drafts, logits=logits, steps=state.steps
    )

  def _guess(self, windows, step, vectors, logits):
    """The windows with a first guess for the steps after the last that ran."""
    if self.rows == 1:
      return windows
    last = LastRow(
      drawer=self.drawer,
      inputs=self.inputs,
      keys=self.keys,
      step=step,
      vectors=vectors,
      logits=logits,
      windows=windows,
      count=self.rows - 1,
    )
    guesses = GUESSES[self.drawer.config.first_guess](last)
    return _put(windows, guesses, step + 1)

  def _both(self, a: Array) -> Array:
    """The rows of the conditions and of the null conditions."""
    return jnp.concatenate([a, a]) if self.drawer.guided else a
