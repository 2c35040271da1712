"""TensorAR for JAX: autoregressive image models that revise their tokens."""

from tensorar_jax.build import load
from tensorar_jax.conditioning import (
  ClassConditioning,
  PromptConditioning,
  TextConditioning,
)
from tensorar_jax.drawing import SamplingConfig
from tensorar_jax.published import import_backbone, import_tokenizer
from tensorar_jax.sampling import generate
from tensorar_jax.tensorar import TensorAR
from tensorar_jax.text.chat import import_prompt_encoder
from tensorar_jax.text.encoder import import_t5, import_text_encoder

__all__ = [
  "ClassConditioning",
  "PromptConditioning",
  "SamplingConfig",
  "TensorAR",
  "TextConditioning",
  "generate",
  "import_backbone",
  "import_prompt_encoder",
  "import_t5",
  "import_text_encoder",
  "import_tokenizer",
  "load",
]
