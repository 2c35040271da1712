"""TensorAR for JAX: autoregressive image models that revise their tokens."""

from tensorar_jax.conditioning.chat import import_prompt_encoder
from tensorar_jax.conditioning.conditions import (
  ClassConditioning,
  PromptConditioning,
  TextConditioning,
)
from tensorar_jax.conditioning.encoders import import_t5, import_text_encoder
from tensorar_jax.experiment.build import load
from tensorar_jax.experiment.published import import_backbone, import_tokenizer
from tensorar_jax.method.sampling import generate
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.method.tensorar import TensorAR

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
