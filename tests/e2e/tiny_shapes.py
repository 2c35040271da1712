"""configs/shapes_t2i.py in seconds: the same stages, smaller in every way."""

from configs import shapes_t2i
from tests import tiny_configs


def get_config():
  config = shapes_t2i.get_config()
  config.tokenizer.update(channels=4, latent_channels=8, norm_groups=2)
  config.backbone.update(tiny_configs.SIZES, num_layers=1)
  config.train.update(batch_size=8, log_every=1, checkpoint_every=2)
  for stage in config.stages.values():
    stage.train = dict(num_steps=2)
  config.evaluation.update(
    guidance=(2.0,),
    scan_images=12,
    num_images=12,
    seeds=2,
    batch_size=12,
    held_out_images=12,
  )
  return config
