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

from configs import published

# The base models' own training, from nothing: batch 768.
BASE_BATCH = 768
BASE_STEPS_PER_EPOCH = -(-published.IMAGENET // BASE_BATCH)


def get_config() -> ConfigDict:
  return variant("B", temperature=(1.0, 1.0), guidance=(1.9, 2.0))


def variant(
  name: str,
  temperature: tuple[float, float],
  guidance: tuple[float, float],
  base_learning_rate: float = 3e-4,
  base_epochs: int = 300,
) -> ConfigDict:
  """Makes the experiment for one published size."""
  config = published.recipe()
  config.data = dict(name="tokens:data/imagenet256_lfq")
  config.tokenizer = dict(name="lfq", weights="first_stage", init="tokenizer")
  config.conditioning = dict(name="class", num_classes=1000)
  config.backbone = dict(name="open_magvit2", variant=name)
  config.sampling.update(
    temperature=temperature,
    guidance=guidance,
    unguided_scale=1.0,  # as published, smaller ones are no guidance
  )
  config.stages = published.imported(
    tokenizer=f"weights/AR_256_{name}.ckpt",
    base=f"weights/AR_256_{name}.ckpt",
    # As published: 2 % warm-up, 5 % of the rest at the peak, and weight decay
    # for the norms too.
    base_from_nothing=dict(
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
  )
  return config
