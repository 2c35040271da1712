"""TensorAR on LlamaGen's text-to-image model, from its published weights.

  python -m tensorar_jax.main --config=configs/llamagen_t2i.py --mode=import

  :256 (stage 1) or :512 (stage 2) after the file name; 256 is the default.

Needs `weights/t2i_XL_stage1_256.pt` (or `t2i_XL_stage2_512.pt`) and
`weights/vq_ds16_t2i.pt` from the authors' release; for tokenizing and sampling
the folder of Flan-T5-XL, `weights/flan-t5-xl`, whose encoder makes 120 rows of
2048 features of a text (--init=hf:// downloads all three by name); and for
training images with captions, which --mode=tokenize turns into
`data/text_to_image256_tokens`. Recipe: as llamagen_b.py, for one epoch.
Sampling: guidance 7.5 and top-k 1000, as published.
"""

from ml_collections import ConfigDict

from configs import llamagen_b

FILES = {
  "256": "weights/t2i_XL_stage1_256.pt",
  "512": "weights/t2i_XL_stage2_512.pt",
}
IMAGES = {"256": 50_000_000, "512": 10_000_000}  # of each published stage


def get_config(size: str = "256") -> ConfigDict:
  if size not in FILES:
    raise ValueError(f"size {size!r}: published models are of 256 or 512 px.")
  pixels, steps = int(size), IMAGES[size] // 256
  config = llamagen_b.variant("T2I-XL", "256", guidance=7.5)
  config.data.name = f"tokens:data/text_to_image{size}_tokens"
  config.tokenizer.image_size = (pixels, pixels)
  config.conditioning = dict(
    name="text", width=2048, length=120, encoder="weights/flan-t5-xl"
  )
  config.backbone.grid = (pixels // 16, pixels // 16)
  config.train.num_steps = steps
  config.sampling.top_k = 1000
  config.stages.tokenizer.source = "weights/vq_ds16_t2i.pt"
  config.stages.base.source = FILES[size]
  config.stages.base.train.num_steps = steps
  return config
