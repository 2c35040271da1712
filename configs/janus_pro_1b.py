"""TensorAR on Janus-Pro-1B from its published weights, for text to image.

  python -m tensorar_jax.main --config=configs/janus_pro_1b.py

Needs the published folder as `weights/Janus-Pro-1B`: `pytorch_model.bin`, which
has the image tokenizer too, and `tokenizer.json`. The files converted for
transformers do as well,

  --config.stages.base.source=weights/Janus-Pro-1B/model.safetensors
  --config.stages.tokenizer.source=weights/Janus-Pro-1B/model.safetensors

For training, images with captions, which --mode=tokenize turns into
`data/text_to_image384_janus`: prompts are stored as token ids. Recipe: the ICLR
text (window 4, depth 1, exponential schedule, learning rates 1e-4 and 1e-5,
batch 256), one epoch of about 27 million images, the size of BLIP3o's
pretraining set with long captions. Sampling: guidance 5, temperature 1, no
top-k, as published.
"""

from ml_collections import ConfigDict

from configs import published

IMAGES = 27_000_000
STEPS = IMAGES // 256


def get_config() -> ConfigDict:
  return variant("1B", "pytorch_model.bin")


def variant(name: str, file: str) -> ConfigDict:
  """Makes the experiment for one published size, with its weights in `file`."""
  folder = f"weights/Janus-Pro-{name}"
  config = published.recipe(STEPS)
  config.data = dict(name="tokens:data/text_to_image384_janus")
  config.tokenizer = dict(name="vq", variant="janus", init="tokenizer")
  # A prompt has at most 256 tokens, the chat template's among them.
  config.conditioning = dict(name="prompt", encoder=folder)
  config.backbone = dict(name="janus", variant=name)
  config.sampling.guidance = 5.0
  config.stages = published.imported(
    tokenizer=f"{folder}/{file}", base=f"{folder}/{file}", base_from_nothing={}
  )
  return config
