"""configs/shapes_t2i.py in seconds: the same stages, smaller in every way."""

from configs import shapes_t2i


def get_config():
  config = shapes_t2i.get_config()
  config.tokenizer.update(channels=4, latent_channels=8, norm_groups=2)
  config.backbone.update(width=16, num_layers=1, num_heads=2, mlp_multiple=8)
  config.train.update(batch_size=8, log_every=1, checkpoint_every=2)
  for stage in config.stages.values():
    stage.train = dict(num_steps=2)
  config.evaluation.update(
    **dict(guidance=(2.0,), scan_images=12, num_images=12, seeds=2),
    **dict(batch_size=12, held_out_images=12),
  )
  return config
