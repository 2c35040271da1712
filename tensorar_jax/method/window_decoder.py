"""The sliding-window decoder: prefill, then one `lax.scan` over the tokens.

Step n turns the window drawn at step n - 1 into one backbone input, decodes one
row with the KV cache, and draws the next window; its first token is committed.
Whatever k is, there are T backbone steps. See docs/method.md, section 6.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from tensorar_jax.interfaces import Cache, Key, Samples
from tensorar_jax.method.decoding import SamplingInputs, WindowDrawer
from tensorar_jax.method.windows import valid_slots


@struct.dataclass
class SamplingState:
  """What one step of the sampler hands to the next.

  Attributes:
    cache: keys and values of all rows so far; with guidance, those of the
      conditions and after them those of the null conditions.
    window: the tokens drawn at the last step, [B, k, F]; the first of them is
      committed, the others are drafts.
    looks: for a drawing rule that asks for earlier looks, the vectors whose
      logits predicted slots 1 to k - 1 at each step, [B or 2B, T, k - 1, D];
      steps to come are 0. None for a rule that asks for none.
  """

  cache: Cache
  window: Int[Array, "B k F"]
  looks: Float[Array, "_ T _ D"] | None


def generate(drawer: WindowDrawer, inputs: SamplingInputs, keys: Key, cond):
  """Samples an image for each of B keys.

  Args:
    drawer: draws windows; it holds the model.
    inputs: of the call.
    keys: the key of each image, [B].
    cond: the conditions; with guidance [cond | null], 2B.
  """
  model = drawer.model
  num_tokens, window = model.num_tokens, model.window

  def draw(vectors, cache, looks, step):
    """(the state after a step, what is kept of it) from its vectors."""
    steps = jnp.full(len(keys), step)
    earlier_vectors = tuple(
      jax.lax.dynamic_index_in_dim(looks, step - look, axis=1, keepdims=False)[
        :, look - 1 :
      ]
      for look in range(1, drawer.looks + 1)
    )
    tokens, logits = drawer.draw(vectors, keys, steps, earlier_vectors)
    if inputs.committed is not None:  # in place of what was drawn
      tokens = tokens.at[:, 0].set(inputs.committed[:, step])
    if looks is not None:
      looks = jax.lax.dynamic_update_slice_in_dim(
        looks, vectors[:, None, 1:], step, axis=1
      )
    kept = (tokens, logits if drawer.config.return_logits else None)
    return SamplingState(cache=cache, window=tokens, looks=looks), kept

  def decode(state, step):
    valid = valid_slots(step - 1, window, num_tokens)
    h = model.encode_window(state.window, valid)
    h = jnp.concatenate([h, h]) if drawer.guided else h
    hidden, cache = model.backbone.decode(h[:, None], state.cache)
    return draw(model.decode_window(hidden[:, 0]), cache, state.looks, step)

  hidden, cache = model.backbone.prefill(cond)
  vectors = model.decode_window(hidden)
  looks = drawer.init_looks(vectors, num_tokens)
  state, first = draw(vectors, cache, looks, 0)
  _, rest = jax.lax.scan(decode, state, jnp.arange(1, num_tokens))
  steps_second = lambda a, b: jnp.moveaxis(jnp.concatenate([a[None], b]), 0, 1)
  drafts, logits = jax.tree.map(steps_second, first, rest)
  tokens = drafts[:, :, 0]
  steps = jnp.broadcast_to(jnp.arange(num_tokens), tokens.shape[:2])
  return Samples(tokens=tokens, drafts=drafts, logits=logits, steps=steps)
