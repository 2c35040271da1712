"""TensorAR for JAX: autoregressive image models that revise their tokens."""

from tensorar_jax.build import load
from tensorar_jax.conditioning import ClassConditioning
from tensorar_jax.published import import_backbone, import_tokenizer
from tensorar_jax.sampling import SamplingConfig, generate
from tensorar_jax.tensorar import TensorAR

__all__ = [
  "ClassConditioning",
  "SamplingConfig",
  "TensorAR",
  "generate",
  "import_backbone",
  "import_tokenizer",
  "load",
]
