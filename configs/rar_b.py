"""TensorAR on RAR-B from its published weights, on ImageNet codes of 256 px.

  python -m tensorar_jax.main --config=configs/rar_b.py

Needs `weights/rar_b.bin` and `weights/maskgit-vqgan-imagenet-f16-256.bin` from
the authors' release, which --init=hf:// downloads by name, and ImageNet codes
of that tokenizer in `data/`, as --mode=tokenize makes them. Recipe: the first
arXiv text (window 4, depth 2, MLP ratio 4, sine schedule; the base at a
constant learning rate, the new modules' falling linearly to 0; batch 256, 20
epochs). It prints no rates: those here are the ICLR text's. Sampling: as
published for each size.
"""

from ml_collections import ConfigDict

IMAGENET = 1_281_167  # training images
STEPS_PER_EPOCH = IMAGENET // 256

# The published groups go by upstream's names, with these results.
NO_DECAY = r"(^|/)(scale|bias|\w+_table|embedding)$|/final_modulation/"


def get_config(size: str = "256") -> ConfigDict:
  return variant("B", size, guidance=16.0, power=2.75, temperature=1.0)


def variant(
  name: str, size: str, guidance: float, power: float, temperature: float
) -> ConfigDict:
  """The experiment for one published size."""
  if size != "256":
    raise ValueError(f"size {size!r}: published models are of 256 px.")
  config = ConfigDict()
  config.seed = 0
  # Of the weights that imported stages hold; training always is in float32.
  config.source_dtype = "float32"
  config.data = dict(
    name="tokens:data/imagenet256_maskgit_tokens", train_split="train"
  )
  config.tokenizer = dict(name="maskgit_vq", init="tokenizer")
  config.conditioning = dict(name="class", num_classes=1000)
  config.backbone = dict(name="rar", variant=name, dtype="float32")
  config.tensorar = dict(window=1)
  config.noise = dict(kind="categorical", schedule="sine")
  config.loss = dict(weights="rdm", condition_dropout=0.1)
  config.optim = dict(
    learning_rate=1e-4,
    schedule="linear",
    backbone_learning_rate=1e-5,
    backbone_schedule="constant",
    weight_decay=0.05,
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
    temperature=temperature, guidance=guidance, guidance_power=power
  )
  config.stages = dict(
    tokenizer=dict(
      objective="tokenizer",
      source="weights/maskgit-vqgan-imagenet-f16-256.bin",
    ),
    # An empty source trains the base from nothing, in random order at first,
    # as published.
    base=dict(
      source=f"weights/rar_{name.lower()}.bin",
      loss=dict(random_order=(125_000, 187_500)),
      optim=dict(
        backbone_learning_rate=4e-4,
        backbone_schedule="cosine",
        final_rate=0.025,
        warmup_steps=62_500,
        weight_decay=0.03,
        no_decay=NO_DECAY,
        beta2=0.96,
      ),
      train=dict(batch_size=2048, num_steps=250_000),
    ),
    tensorar=dict(init="base", tensorar=dict(window=4, depth=2, mlp_ratio=4.0)),
  )
  return config
