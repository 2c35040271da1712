"""TensorAR on LlamaGen-B from its published weights, on ImageNet codes.

  python -m tensorar_jax.main --config=configs/llamagen_b.py

  :256 or :384 after the file name picks the image size; 256 is the default.

Needs `weights/c2i_B_256.pt` (or `c2i_B_384.pt`) and `weights/vq_ds16_c2i.pt`
from the authors' release, which --init=hf:// downloads by name, and ImageNet
codes in `data/`: published `.npy` folders or shards made by --mode=tokenize.
Recipe: the ICLR text (window 4, depth 1, exponential schedule, learning rates
1e-4 and 1e-5, batch 256, 20 epochs). Sampling: guidance 2.0, no top-k, as
published for B and L.
"""

from ml_collections import ConfigDict

IMAGENET = 1_281_167  # training images
STEPS_PER_EPOCH = IMAGENET // 256


def get_config(size: str = "256") -> ConfigDict:
  return variant("B", size, guidance=2.0)


def variant(name: str, size: str, guidance: float) -> ConfigDict:
  """The experiment for one published size at 256 or 384 px."""
  if size not in ("256", "384"):
    raise ValueError(f"size {size!r}: published models are of 256 or 384 px.")
  pixels = int(size)
  config = ConfigDict()
  config.seed = 0
  # Of the weights that imported stages hold; training always is in float32.
  config.source_dtype = "float32"
  config.data = dict(
    name=f"tokens:data/imagenet{size}_tokens", train_split="train"
  )
  config.tokenizer = dict(
    name="vq", variant="vq16", image_size=(pixels, pixels), init="tokenizer"
  )
  config.conditioning = dict(name="class", num_classes=1000)
  config.backbone = dict(
    name="llamagen",
    variant=name,
    grid=(pixels // 16, pixels // 16),
    dtype="float32",
  )
  config.tensorar = dict(window=1)
  config.noise = dict(kind="categorical", schedule="exponential")
  config.loss = dict(weights="rdm", condition_dropout=0.1)
  config.optim = dict(
    learning_rate=1e-4, backbone_learning_rate=1e-5, weight_decay=0.05
  )
  config.train = dict(
    batch_size=256,
    num_steps=20 * STEPS_PER_EPOCH,
    log_every=100,
    checkpoint_every=5000,
    keep=2,
    accumulate=1,
    remat="none",
    keep_every=0,
  )
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.sampling = dict(temperature=1.0, guidance=guidance, top_k=0, top_p=1.0)
  config.stages = dict(
    tokenizer=dict(objective="tokenizer", source="weights/vq_ds16_c2i.pt"),
    # An empty source trains the base from nothing, 300 epochs at 1e-4.
    base=dict(
      source=f"weights/c2i_{name}_{size}.pt",
      optim=dict(backbone_learning_rate=1e-4),
      train=dict(num_steps=300 * STEPS_PER_EPOCH),
    ),
    tensorar=dict(
      init="base", tensorar=dict(window=4, depth=1, mlp_ratio=0.25)
    ),
  )
  return config
