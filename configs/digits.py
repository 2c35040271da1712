"""The 8 x 8 digits of scikit-learn from start to end; tokens are the pixels.

  python -m tensorar_jax.main --config=configs/digits.py

A base model is trained, then three models go on from it for the same number of
steps: the base itself, TensorAR by the published recipe, and TensorAR with its
own drafts as noise. All are sampled, measured and shown in report.html. About
seven minutes on two CPU cores; nothing is downloaded.
"""

from ml_collections import ConfigDict


def fine_tuned(**sections) -> dict:
  """Makes a stage that goes on from the base, with values of its own."""
  return dict(
    init="base",
    optim=dict(learning_rate=1e-3, backbone_learning_rate=1e-4),
    train=dict(num_steps=200),
    **sections,
  )


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.data = dict(name="digits")
  config.tokenizer = dict(name="pixels", image_size=(8, 8), levels=17)
  config.conditioning = dict(name="class", num_classes=10)
  config.backbone = dict(
    name="llamagen",
    vocab_size=17,
    grid=(8, 8),
    width=96,
    num_layers=3,
    num_heads=4,
    num_classes=10,
    mlp_multiple=32,
  )
  config.optim = dict(learning_rate=1e-3)
  config.train = dict(
    batch_size=64, num_steps=300, log_every=25, checkpoint_every=100
  )
  config.classifier = dict(image_size=(8, 8), num_classes=10)

  config.stages = dict(
    classifier=dict(
      objective="classifier",
      optim=dict(schedule="cosine"),
      train=dict(batch_size=128, num_steps=400, checkpoint_every=400),
    ),
    base=dict(
      optim=dict(learning_rate=3e-3, schedule="cosine", warmup_steps=50),
      train=dict(num_steps=700),
    ),
    continued=fine_tuned(),
    tensorar=fine_tuned(tensorar=dict(window=4)),
    drafts=fine_tuned(tensorar=dict(window=4), noise=dict(kind="drafts")),
  )
  config.evaluation = dict(
    classifier="classifier",
    models=("base", "continued", "tensorar", "drafts"),
    guidance=(1.0, 1.5, 2.0),
    scan_images=300,
    num_images=900,
    seeds=3,
    batch_size=300,
  )
  return config
