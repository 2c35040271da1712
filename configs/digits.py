"""The whole story on the 8 x 8 digits that scikit-learn ships; pixels = tokens.

  python -m tensorar_jax.main --config=configs/digits.py

A base model is trained, then three models go on from it for the same number of
steps: the base itself, TensorAR by the published recipe, and TensorAR with its
own drafts as noise. All are sampled, measured and shown in report.html. About
seven minutes on two CPU cores; nothing is downloaded.
"""

from ml_collections import ConfigDict


# Functions, not shared dicts: a stage's value changes in that stage alone.
def fine_tuned(**sections) -> dict:
  return dict(
    init="base",
    optim=dict(learning_rate=1e-3, backbone_learning_rate=1e-4),
    train=dict(num_steps=200),
    **sections,
  )


def wrapped() -> dict:
  return dict(window=4, depth=1, mlp_ratio=0.25, output_residual="first")


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0
  config.data = dict(
    name="digits", train_split="train", test_split="test", flip=False
  )
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
  config.tensorar = dict(window=1)
  config.noise = dict(
    kind="categorical",
    schedule="exponential",
    schedule_start=0,
    draft_fraction=0.5,
  )
  config.loss = dict(weights="rdm", condition_dropout=0.1)
  config.optim = dict(
    learning_rate=1e-3,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.05,
    clip_norm=1.0,
    ema_decay=0.0,
  )
  config.train = dict(
    batch_size=64,
    num_steps=300,
    log_every=25,
    checkpoint_every=100,
    keep=2,
    accumulate=1,
    remat="none",
    keep_every=0,
  )
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.sampling = dict(temperature=1.0, guidance=1.0, top_k=0, top_p=1.0)
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
    tensorar=fine_tuned(tensorar=wrapped()),
    drafts=fine_tuned(tensorar=wrapped(), noise=dict(kind="drafts")),
  )
  config.evaluation = dict(
    classifier="classifier",
    models=("base", "continued", "tensorar", "drafts"),
    guidance=(1.0, 1.5, 2.0),
    scan_images=300,
    num_images=900,
    seeds=3,
    batch_size=300,
    real_images=10_000,
  )
  return config
