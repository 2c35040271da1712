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

IMAGES = 27_000_000
STEPS = IMAGES // 256


def get_config() -> ConfigDict:
  return variant("1B", "pytorch_model.bin")


def variant(name: str, file: str) -> ConfigDict:
  """The experiment for one published size, whose weights are `file`."""
  folder = f"weights/Janus-Pro-{name}"
  config = ConfigDict()
  config.seed = 0
  # Of the weights that imported stages hold; training always is in float32.
  config.source_dtype = "float32"
  config.data = dict(
    name="tokens:data/text_to_image384_janus", train_split="train"
  )
  config.tokenizer = dict(name="vq", variant="janus", init="tokenizer")
  # A prompt has at most so many tokens, the chat template's among them.
  config.conditioning = dict(
    name="prompt", length=256, vocab_size=102400, encoder=folder
  )
  config.backbone = dict(name="janus", variant=name, dtype="float32")
  config.tensorar = dict(window=1)
  config.noise = dict(kind="categorical", schedule="exponential")
  config.loss = dict(weights="rdm", condition_dropout=0.1)
  config.optim = dict(
    learning_rate=1e-4, backbone_learning_rate=1e-5, weight_decay=0.05
  )
  config.train = dict(
    batch_size=256,
    num_steps=STEPS,
    log_every=100,
    checkpoint_every=5000,
    keep=2,
    accumulate=1,
    remat="none",
    keep_every=0,
  )
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.sampling = dict(temperature=1.0, guidance=5.0, top_k=0, top_p=1.0)
  config.stages = dict(
    tokenizer=dict(objective="tokenizer", source=f"{folder}/{file}"),
    base=dict(source=f"{folder}/{file}"),
    tensorar=dict(
      init="base", tensorar=dict(window=4, depth=1, mlp_ratio=0.25)
    ),
  )
  return config
