"""TensorAR: next-tensor prediction around any `Backbone`.

A backbone predicts one token a step. Wrapped, it reads the last *window* of k
tokens and predicts the next, overlapping one, so that every token is revised
k - 1 times before it is committed:

    h[t]        = e[t, 0] + Q_in(e[t, 0..k-1])            input encoder
    z           = backbone(cond, h)                       z[n] from h[< n]
    u[n, j]     = [residual]_j z[n] + Q_out(z[n])_j       output decoder
    logits[n,j] = backbone.logits(u[n, j])

Both Q are small query transformers whose outputs start at zero wherever there
is a residual: a freshly wrapped model is the base model at slot 0.
`window=1` builds neither module and is the base model. See docs/method.md,
sections 1-3.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tensorar_jax.interfaces import Backbone, Cond, Key
from tensorar_jax.method.windows import check_window
from tensorar_jax.nn import checks, layers
from tensorar_jax.parallel import sharding

OUTPUT_RESIDUALS = ("first", "all", "none")


class CrossAttention(nnx.Module):
  """Queries attend to a short memory; four bias-free D x D projections.

  x and memory broadcast against each other: the first block's queries, which
  are the same for every window, are projected once.
  """

  def __init__(self, backbone: Backbone, *, rngs: nnx.Rngs):
    self.num_heads, width = backbone.num_heads, backbone.width
    linear = functools.partial(
      layers.linear,
      rngs=rngs,
      dtype=backbone.dtype,
      kernel_init=backbone.kernel_init,
    )
    self.query = linear(width, width)
    self.key = linear(width, width)
    self.value = linear(width, width)
    self.out = linear(width, width)

  def __call__(
    self, x: Float[Array, "*#n q D"], memory: Float[Array, "*n m D"]
  ) -> Float[Array, "*n #q D"]:
    values = self.value(memory)
    if memory.shape[-2] == 1:  # one key: any query gives it weight 1
      return self.out(values)
    heads = lambda a: a.reshape(*a.shape[:-1], self.num_heads, -1)
    q, k, v = heads(self.query(x)), heads(self.key(memory)), heads(values)
    # Memories are a handful of rows: a product and a sum, which XLA fuses,
    # beat B * T * N matrix products of that size.
    scores = jnp.sum(q[..., :, None, :, :] * k[..., None, :, :, :], axis=-1)
    scores = scores.astype(jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, axis=-2).astype(v.dtype)  # [*n, q, m, N]
    mixed = jnp.sum(weights[..., None] * v[..., None, :, :, :], axis=-3)
    return self.out(mixed.reshape(*mixed.shape[:-2], -1))


class QueryBlock(nnx.Module):
  """x + cross(norm(x), memory), then x + mlp(norm(x)); tanh-form GELU."""

  def __init__(self, backbone: Backbone, mlp_ratio: float, *, rngs: nnx.Rngs):
    width, init = backbone.width, backbone.kernel_init
    hidden = int(mlp_ratio * width)
    self.cross_norm = backbone.make_norm(rngs)
    self.cross = CrossAttention(backbone, rngs=rngs)
    self.mlp_norm = backbone.make_norm(rngs)
    self.up = layers.linear(width, hidden, rngs, backbone.dtype, init)
    self.down = layers.linear(hidden, width, rngs, backbone.dtype, init)

  def __call__(self, x, memory):
    x = x + self.cross(self.cross_norm(x), memory)
    return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class QueryTransformer(nnx.Module):
  """Learned queries through `depth` blocks, then gain * norm(stream)."""

  def __init__(
    self,
    backbone: Backbone,
    *,
    gain: Float[Array, "q D"],
    depth: int,
    mlp_ratio: float,
    rngs: nnx.Rngs,
  ):
    """Makes a query for each row of `gain`, the initial gain of its output."""
    init = backbone.kernel_init
    self.queries = nnx.Param(init(rngs.params(), gain.shape))
    self.memory_norm = backbone.make_norm(rngs)
    self.blocks = nnx.List(
      QueryBlock(backbone, mlp_ratio, rngs=rngs) for _ in range(depth)
    )
    self.norm = backbone.make_norm(rngs)
    self.gain = nnx.Param(gain)
    self.remat = "none"

  def __call__(self, memory: Float[Array, "*n m D"]) -> Float[Array, "*n q D"]:
    return layers.checkpoint(self._run, self.remat)(memory)

  def _run(self, memory):
    memory = self.memory_norm(memory)
    x = self.queries[...].astype(memory.dtype)
    for block in self.blocks:
      x = block(x, memory)
    return self.gain[...].astype(x.dtype) * self.norm(x)


class InputEncoder(nnx.Module):
  """Q_in: the embeddings of a window -> one backbone input."""

  def __init__(
    self,
    backbone: Backbone,
    *,
    window: int,
    depth: int,
    mlp_ratio: float,
    residual: bool,
    rngs: nnx.Rngs,
  ):
    self.residual = residual
    init = backbone.kernel_init
    gain = jnp.full((1, backbone.width), 0.0 if residual else 1.0)
    self.offsets = nnx.Param(init(rngs.params(), (window, backbone.width)))
    self.pad = nnx.Param(init(rngs.params(), (backbone.width,)))
    self.query = QueryTransformer(
      backbone, gain=gain, depth=depth, mlp_ratio=mlp_ratio, rngs=rngs
    )

  def __call__(
    self,
    embeddings: Float[Array, "*n k D"],
    valid: Bool[Array, "*#n k"],
    noise: Float[Array, "*n k D"] | None = None,
  ) -> Float[Array, "*n D"]:
    if noise is not None:
      embeddings = embeddings + noise.astype(embeddings.dtype)
    pad = self.pad[...].astype(embeddings.dtype)
    embeddings = jnp.where(valid[..., None], embeddings, pad)
    memory = embeddings + self.offsets[...].astype(embeddings.dtype)
    out = self.query(memory)[..., 0, :]
    return embeddings[..., 0, :] + out if self.residual else out


class OutputDecoder(nnx.Module):
  """Q_out: one hidden state -> the k vectors that the base head reads."""

  def __init__(
    self,
    backbone: Backbone,
    *,
    window: int,
    depth: int,
    mlp_ratio: float,
    residual: str,
    rngs: nnx.Rngs,
  ):
    self.residual_slots = {"first": 1, "all": window, "none": 0}[residual]
    slots = jnp.arange(window)[:, None]
    gain = jnp.where(slots < self.residual_slots, 0.0, 1.0) * jnp.ones(
      (1, backbone.width)
    )
    self.query = QueryTransformer(
      backbone, gain=gain, depth=depth, mlp_ratio=mlp_ratio, rngs=rngs
    )

  def __call__(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n k D"]:
    out = self.query(hidden[..., None, :])
    has_residual = jnp.arange(out.shape[-2])[:, None] < self.residual_slots
    return out + jnp.where(has_residual, hidden[..., None, :], 0)


class TensorAR(nnx.Module):
  """A backbone that reads and predicts windows of `window` tokens.

  Args:
    backbone: any `Backbone`; its weights are used as they are, not copied.
    window: k, 1 <= k <= T. 1 is the base model itself.
    depth: blocks in each query transformer (P2: 1, P1: 2).
    mlp_ratio: hidden / D of their MLPs (P2: 0.25, P1: 4).
    input_residual: whether h[t] includes the embedding of the first token.
    output_residual: "first" (the papers), "all", or "none" of the slots get
      the hidden state added.
    rngs: initialises both modules; needed for window > 1.
  """

  def __init__(
    self,
    backbone: Backbone,
    *,
    window: int = 1,
    depth: int = 1,
    mlp_ratio: float = 0.25,
    input_residual: bool = True,
    output_residual: str = "first",
    rngs: nnx.Rngs | None = None,
  ):
    check_window(window, backbone.num_tokens)
    if output_residual not in OUTPUT_RESIDUALS:
      raise ValueError(
        f"output_residual={output_residual!r}: choose one of"
        f" {OUTPUT_RESIDUALS}."
      )
    if depth < 1 or int(mlp_ratio * backbone.width) < 1:
      raise ValueError(
        f"depth={depth}, mlp_ratio={mlp_ratio}: expected depth >= 1 and at"
        f" least one hidden unit of width {backbone.width}."
      )
    self.backbone = backbone
    self.window = window
    self.num_tokens = backbone.num_tokens
    self.vocab_sizes = backbone.vocab_sizes
    if window == 1:
      return
    if rngs is None:
      raise ValueError(
        f"window={window} has new weights: pass rngs=nnx.Rngs(seed)."
      )
    self.encoder = InputEncoder(
      backbone,
      window=window,
      depth=depth,
      mlp_ratio=mlp_ratio,
      residual=input_residual,
      rngs=rngs,
    )
    self.decoder = OutputDecoder(
      backbone,
      window=window,
      depth=depth,
      mlp_ratio=mlp_ratio,
      residual=output_residual,
      rngs=rngs,
    )

  def encode_window(
    self,
    windows: Int[Array, "*n k F"],
    valid: Bool[Array, "*#n k"],
    noise: Float[Array, "*n k D"] | None = None,
  ) -> Float[Array, "*n D"]:
    """The backbone input of each window; `noise` is added to embeddings."""
    checks.windows(windows, self.window, self.vocab_sizes)
    if self.window == 1:
      return self.backbone.embed(windows[..., 0, :])
    embeddings = self.backbone.embed(windows)
    embeddings = sharding.constrain(embeddings, sharding.ROWS)
    return self.encoder(embeddings, valid, noise)

  def decode_window(
    self, hidden: Float[Array, "*n D"]
  ) -> Float[Array, "*n k D"]:
    """The k vectors whose `logits` predict the window after each state."""
    if self.window == 1:
      return hidden[..., None, :]
    return sharding.constrain(self.decoder(hidden), sharding.ROWS)

  def logits(
    self,
    hidden: Float[Array, "*n D"],
    tokens: Int[Array, "*n F"],
    *,
    rng: Key | None = None,
  ) -> tuple[Float[Array, "*n _"], ...]:
    """Logits of the base model's own head; see `Backbone`."""
    return self.backbone.logits(hidden, tokens, rng=rng)

  def __call__(
    self,
    cond: Cond,
    windows: Int[Array, "B M k F"],
    valid: Bool[Array, "M k"],
    *,
    noise: Float[Array, "B M k D"] | None = None,
    rng: Key | None = None,
  ) -> Float[Array, "B M+1 k D"]:
    """Runs with teacher forcing: row n predicts window n from windows < n.

    Training passes the M = T - 1 windows 0 .. T-2. `rng` switches the
    backbone's dropout on.
    """
    h = self.encode_window(windows, valid, noise)
    return self.decode_window(self.backbone(cond, h, rng=rng))
