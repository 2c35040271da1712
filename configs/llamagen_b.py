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

from configs import published


def get_config(size: str = "256") -> ConfigDict:
  return variant("B", size, guidance=2.0)


def variant(name: str, size: str, guidance: float) -> ConfigDict:
  """Makes the experiment for one published size at 256 or 384 px."""
  if size not in ("256", "384"):
    raise ValueError(f"size {size!r}: published models are of 256 or 384 px.")
  pixels = int(size)
  config = published.recipe()
  config.data = dict(name=f"tokens:data/imagenet{size}_tokens")
  config.tokenizer = dict(
    name="vq", variant="vq16", image_size=(pixels, pixels), init="tokenizer"
  )
  config.conditioning = dict(name="class", num_classes=1000)
  config.backbone = dict(
    name="llamagen", variant=name, grid=(pixels // 16, pixels // 16)
  )
  # As published, scales below 1 are no guidance.
  config.sampling.update(guidance=guidance, unguided_scale=1.0)
  config.stages = published.imported(
    tokenizer="weights/vq_ds16_c2i.pt",
    base=f"weights/c2i_{name}_{size}.pt",
    # 300 epochs at 1e-4.
    base_from_nothing=dict(
      optim=dict(backbone_learning_rate=1e-4),
      train=dict(num_steps=300 * published.STEPS_PER_EPOCH),
    ),
  )
  return config
