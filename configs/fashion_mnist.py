"""Fashion-MNIST through TFDS: 28 x 28 images as 7 x 7 tokens of a small VQ.

  python -m tensorar_jax.main --config=configs/fashion_mnist.py

TFDS downloads the images; without network, `apt-get install
dataset-fashion-mnist` supplies the same ones. The tokenizer is trained first,
then everything goes as in digits.py.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
  config = digits.get_config()
  config.data.update(name="tfds:fashion_mnist")
  config.tokenizer = dict(
    name="vq",
    init="tokenizer",
    channels=16,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=1,
    latent_channels=32,
    codebook_size=256,
    norm_groups=8,
    image_channels=1,
    image_size=(28, 28),
    entropy_weight=0.01,
  )
  config.backbone.update(vocab_size=256, grid=(7, 7))
  config.classifier.update(image_size=(28, 28), halvings=2)

  stages = config.stages
  stages.classifier.train = dict(
    batch_size=128, num_steps=1000, checkpoint_every=250
  )
  tokenizer = dict(
    objective="tokenizer",
    optim=dict(schedule="cosine", weight_decay=0.0),
    train=dict(batch_size=32, num_steps=1500, checkpoint_every=250),
  )
  config.stages.tokenizer = tokenizer
  config.stages.base.train = dict(num_steps=1500)
  for name in ("continued", "tensorar", "drafts"):
    config.stages[name].train = dict(num_steps=300)
  config.evaluation.update(num_images=1500, batch_size=500, scan_images=500)
  return config
