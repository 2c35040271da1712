"""What both decoders share: their inputs, and drawing windows from vectors.

`window_decoder` takes one step of the backbone for each token;
`parallel_decoder` tries several steps at once. Both draw here, so that a step's
window is the same whichever of them draws it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tensorar_jax.interfaces import Key
from tensorar_jax.method import drawing
from tensorar_jax.method.drawing import DrawingRule, Noise
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.method.tensorar import TensorAR


@struct.dataclass
class SamplingInputs:
  """The arrays of one call of the sampler, beside the weights.

  Shapes or partition specs may stand for them.

  Attributes:
    cond: the condition of each image.
    null: their null conditions; None samples without guidance.
    rng: the key of the whole run.
    image_index: int32 [B], the index of each image in the run.
    scales: float32 [T, F], the guidance scale of each token and sub-token.
    committed: int32 [B, T, F], None, or tokens to commit as they are.
    marginals: for each sub-token float32 [G, T, V_f], the logarithms of how
      often each token occurs at each position in each of G groups of images;
      None where no guess comes from them.
    group: int32 [B], the group of each image; None without marginals.
  """

  cond: Any
  null: Any
  rng: Any
  image_index: Any
  scales: Any
  committed: Any = None
  marginals: Any = None
  group: Any = None


@dataclasses.dataclass(frozen=True)
class SamplingProgram:
  """What a sampler is compiled for, beside the shapes of its inputs.

  Attributes:
    config: how tokens are drawn; its guidance is in the inputs' scales.
    platform: what it runs on: "cpu", "gpu" or "tpu".
    mesh: the mesh of the inputs, which splits the rows if it has several
      devices; None is one device without a mesh.
  """

  config: SamplingConfig
  platform: str
  mesh: Mesh | None


@dataclasses.dataclass(frozen=True)
class WindowDrawer:
  """Draws windows from the vectors of `TensorAR.decode_window`.

  R windows are drawn at once, of different images or different steps. With
  guidance their vectors are [cond | null], 2R.

  Attributes:
    model: its head makes logits of vectors.
    config: temperatures and filters.
    rule: how tokens are drawn.
    scales: the guidance scale of each token and sub-token.
    guided: whether there are null rows.
  """

  model: TensorAR
  config: SamplingConfig
  rule: DrawingRule
  scales: Float[Array | np.ndarray, "T F"]
  guided: bool

  @property
  def looks(self) -> int:
    """How many earlier looks the rule can see; 0 keeps none."""
    return min(self.rule.looks, self.model.window - 1)

  def init_looks(
    self, vectors: Float[Array, "rows k D"], steps: int
  ) -> Float[Array, "rows {steps} _ D"] | None:
    """Room for the looks of so many steps; None if the rule asks for none."""
    if self.looks == 0:
      return None
    rows, window, width = vectors.shape
    return jnp.zeros((rows, steps, window - 1, width), vectors.dtype)

  def draw(
    self,
    vectors: Float[Array, "rows k D"],
    keys: Key,
    steps: Int[Array, "R"],
    earlier_vectors: tuple[Float[Array, "rows _ D"], ...] = (),
    first_logits: Float[Array, "R k _"] | None = None,
  ) -> tuple[Int[Array, "R k F"], tuple[Float[Array, "R k _"], ...]]:
    """Draws the window of each row.

    Args:
      vectors: of every slot, from the present step.
      keys: the key of each window's image, [R].
      steps: the step that draws each window.
      earlier_vectors: [look - 1]: those of `look` steps ago for the same
        positions, k - look of them; as many as `looks`.
      first_logits: guided logits of sub-token 0, if they are known already.

    Returns:
      (tokens, the guided logits of each sub-token that they come from).
    """
    model = self.model
    factors, window = len(model.vocab_sizes), model.window
    tokens = jnp.zeros((len(steps), window, factors), jnp.int32)
    present = []

    def earlier(f, tokens, look=1):
      return self._earlier(earlier_vectors, steps, present, f, tokens, look)

    for f in range(factors):
      if f == 0 and first_logits is not None:
        present.append(first_logits)
      else:
        present.append(self._logits(vectors, tokens, f, steps))
      drawn = self.rule.draw(
        f=f,
        noise=Noise(keys, steps, slots=window, factors=factors, f=f),
        logits=present[f],
        tokens=tokens,
        earlier=earlier,
        config=self.config.sub_token(f),
      )
      tokens = tokens.at[..., f].set(drawn)
    return tokens, tuple(present)

  def _logits(self, vectors, tokens, f, steps):
    """Guided logits [R, m, V_f] of vectors [R or 2R, m, D]."""
    both = jnp.concatenate([tokens, tokens]) if self.guided else tokens
    logits = self.model.logits(vectors, both)[f]
    if not self.guided:
      return logits
    # Rows after the last token count as the last.
    scale = jnp.asarray(self.scales)[
      jnp.minimum(steps, self.model.num_tokens - 1), f
    ]
    return drawing.guide(logits, scale[:, None, None])

  def _earlier(self, earlier_vectors, steps, present, f, tokens, look):
    """See `drawing.Earlier`."""
    if not 1 <= look <= self.rule.looks:
      raise ValueError(
        f"{self.rule} asks for look={look}: expected 1 to its"
        f" looks={self.rule.looks}. Raise `looks`."
      )
    slots = tokens.shape[1]
    now = present[f][:, :slots]
    # A slot's position was `look` slots further on, if that was in the window.
    count = min(slots, self.model.window - look)
    if count < 1 or not earlier_vectors:
      return now
    vectors = earlier_vectors[look - 1][:, :count]
    then = self._logits(vectors, tokens[:, :count], f, steps)
    then = jnp.where((steps >= look)[:, None, None], then, now[:, :count])
    return jnp.concatenate([then, now[:, count:]], axis=1)
