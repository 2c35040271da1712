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

from configs import published

# The published groups go by upstream's names, with these results.
NO_DECAY = r"(^|/)(scale|bias|\w+_table|embedding)$|/final_modulation/"


def get_config(size: str = "256") -> ConfigDict:
  return variant("B", size, guidance=16.0, power=2.75, temperature=1.0)


def variant(
  name: str, size: str, guidance: float, power: float, temperature: float
) -> ConfigDict:
  """Makes the experiment for one published size."""
  if size != "256":
    raise ValueError(f"size {size!r}: published models are of 256 px.")
  config = published.recipe()
  config.data = dict(name="tokens:data/imagenet256_maskgit_tokens")
  config.tokenizer = dict(name="maskgit_vq", init="tokenizer")
  config.conditioning = dict(name="class", num_classes=1000)
  config.backbone = dict(name="rar", variant=name)
  config.noise = dict(schedule="sine")
  config.optim.update(schedule="linear", backbone_schedule="constant")
  config.sampling.update(
    temperature=temperature,
    guidance=guidance,
    unguided_scale=0.0,  # as published, 0 is no guidance
    guidance_power=power,
  )
  config.stages = published.imported(
    tokenizer="weights/maskgit-vqgan-imagenet-f16-256.bin",
    base=f"weights/rar_{name.lower()}.bin",
    # As published: at first the tokens come in random order.
    base_from_nothing=dict(
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
    depth=2,
    mlp_ratio=4.0,
  )
  return config
