"""TensorAR for JAX: autoregressive image models that revise their tokens."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # pyproject.toml reads it from here

if TYPE_CHECKING:
  from tensorar_jax.conditioning.chat import import_prompt_encoder
  from tensorar_jax.conditioning.conditions import (
    ClassConditioning,
    PromptConditioning,
    TextConditioning,
  )
  from tensorar_jax.conditioning.encoders import import_t5, import_text_encoder
  from tensorar_jax.experiment.build import load
  from tensorar_jax.experiment.published import (
    import_backbone,
    import_tokenizer,
  )
  from tensorar_jax.method.sampling import generate
  from tensorar_jax.method.sampling_config import SamplingConfig
  from tensorar_jax.method.tensorar import TensorAR

# Where the names above live. They are imported when they are first used, so
# that the command line answers `--help` before JAX is loaded.
_HOMES = {
  "ClassConditioning": "conditioning.conditions",
  "PromptConditioning": "conditioning.conditions",
  "SamplingConfig": "method.sampling_config",
  "TensorAR": "method.tensorar",
  "TextConditioning": "conditioning.conditions",
  "generate": "method.sampling",
  "import_backbone": "experiment.published",
  "import_prompt_encoder": "conditioning.chat",
  "import_t5": "conditioning.encoders",
  "import_text_encoder": "conditioning.encoders",
  "import_tokenizer": "experiment.published",
  "load": "experiment.build",
}
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


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return __all__
