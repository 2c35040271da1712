"""Text to image without a download: drawings of a grammar, scored exactly.

  python -m tensorar_jax.main --config=configs/shapes_t2i.py

A VQ tokenizer makes 8 x 8 tokens of 32 x 32 drawings, a base model learns to
make them from captions, and two models go on from it for the same number of
steps: the base itself, and TensorAR. Every sample is read back: does it show
what its caption says, in GenEval's six categories? Sized for half an hour on
two CPU cores.
"""

from ml_collections import ConfigDict

from configs import digits

CODES, WORD_WIDTH, WORDS = 128, 64, 8


def get_config() -> ConfigDict:
  config = digits.get_config()
  config.data.name = "shapes"
  # Most of a drawing is black. An entropy weight would spread the black cells
  # over all codes at random; in 4 dimensions the codes stay in use without it.
  config.tokenizer = dict(
    name="vq",
    init="tokenizer",
    channels=8,
    channel_multipliers=(1, 2, 4),
    num_res_blocks=1,
    latent_channels=32,
    code_dim=4,
    codebook_size=CODES,
    norm_groups=4,
    image_size=(32, 32),
  )
  config.conditioning = dict(
    name="text", encoder="words", width=WORD_WIDTH, length=WORDS
  )
  # No drawing comes twice in a hundred thousand: nothing to drop out for.
  config.backbone = dict(
    name="llamagen",
    vocab_size=CODES,
    grid=(8, 8),
    width=96,
    num_layers=4,
    num_heads=4,
    text_width=WORD_WIDTH,
    text_length=WORDS,
    mlp_multiple=32,
    token_dropout=0.0,
    residual_dropout=0.0,
    mlp_dropout=0.0,
  )
  config.train.update(batch_size=32, log_every=50, checkpoint_every=500)

  stages = config.stages
  del config.classifier, stages.classifier, stages.drafts
  stages.tokenizer = dict(
    objective="tokenizer",
    optim=dict(learning_rate=3e-3, schedule="cosine", weight_decay=0.0),
    train=dict(batch_size=16, num_steps=2500),
  )
  stages.base.optim.learning_rate = 2e-3
  stages.base.train = dict(num_steps=4000)
  for name in ("continued", "tensorar"):
    stages[name].train = dict(num_steps=600)
  config.evaluation = dict(
    yardstick="shapes",
    models=("base", "continued", "tensorar"),
    guidance=(1.0, 2.0, 3.0),
    scan_images=300,
    num_images=600,
    seeds=4,
    batch_size=300,
  )
  return config
