"""TensorAR on Open-MAGVIT2-B from its published weights, on ImageNet tokens.

  python -m tensorar_jax.main --config=configs/open_magvit2_b.py

Needs `weights/AR_256_B.ckpt` from the authors' release, which --init=hf://
downloads by name, and ImageNet tokens in `data/`: shards, by --mode=tokenize.
The file carries the tokenizer with which its authors sample. To take that of
the tokenizer's own release, which they judge by its moving average:

  --config.stages.tokenizer.source=weights/imagenet_256_L.ckpt
  --config.tokenizer.weights=ema

Recipe: the ICLR text (window 4, depth 1, exponential schedule, learning rates
1e-4 and 1e-5, batch 256, 20 epochs). Sampling: as published for each size, a
temperature and a guidance scale for each sub-token.
"""

from ml_collections import ConfigDict

IMAGENET = 1_281_167  # training images
STEPS_PER_EPOCH = IMAGENET // 256
# The base models' own training, from nothing: batch 768.
BASE_BATCH = 768
BASE_STEPS_PER_EPOCH = -(-IMAGENET // BASE_BATCH)


def get_config() -> ConfigDict:
  return variant("B", temperature=(1.0, 1.0), guidance=(1.9, 2.0))


def variant(
  name: str,
  temperature: tuple[float, float],
  guidance: tuple[float, float],
  base_learning_rate: float = 3e-4,
  base_epochs: int = 300,
) -> ConfigDict:
  """The experiment for one published size."""
  config = ConfigDict()
  config.seed = 0
  # Of the weights that imported stages hold; training always is in float32.
  config.source_dtype = "float32"
  config.data = dict(name="tokens:data/imagenet256_lfq", train_split="train")
  config.tokenizer = dict(name="lfq", weights="first_stage", init="tokenizer")
  config.conditioning = dict(name="class", num_classes=1000)
  config.backbone = dict(name="open_magvit2", variant=name, dtype="float32")
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
  config.sampling = dict(
    temperature=temperature, guidance=guidance, top_k=0, top_p=1.0
  )
  config.stages = dict(
    tokenizer=dict(objective="tokenizer", source=f"weights/AR_256_{name}.ckpt"),
    # An empty source trains the base from nothing, as published: 2 % warm-up,
    # 5 % of the rest at the peak, and weight decay for the norms too.
    base=dict(
      source=f"weights/AR_256_{name}.ckpt",
      optim=dict(
        backbone_learning_rate=base_learning_rate,
        backbone_schedule="linear",
        warmup_start=0.005,
        hold=0.05,
        final_rate=0.1,
        no_decay="",
        warmup_steps=base_epochs // 50 * BASE_STEPS_PER_EPOCH,
      ),
      train=dict(
        batch_size=BASE_BATCH, num_steps=base_epochs * BASE_STEPS_PER_EPOCH
      ),
    ),
    tensorar=dict(
      init="base", tensorar=dict(window=4, depth=1, mlp_ratio=0.25)
    ),
  )
  return config
