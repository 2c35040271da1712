"""A model's calls as one program each; op by op each compiles a hundred.

Tests that call them with equal shapes and settings share what was compiled.
"""

import jax
import jax.numpy as jnp

from tensorar_jax.method import losses

forward = jax.jit(lambda model, *args, **rng: model(*args, **rng))
embed = jax.jit(lambda model, tokens: model.embed(tokens))
logits = jax.jit(lambda model, hidden, tokens: model.logits(hidden, tokens))
states = jax.jit(lambda model, cond, x: model.hidden_states(cond, x))
cross_entropy = jax.jit(losses.cross_entropy)


@jax.jit
def cached(model, cond, x):
  """Hidden states [B, M + 1, D] of prefill and M decodes."""
  first, cache = model.prefill(cond)

  def step(cache, row):
    hidden, cache = model.decode(row[:, None], cache)
    return cache, hidden[:, 0]

  _, rest = jax.lax.scan(step, cache, x.swapaxes(0, 1))
  return jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], axis=1)
