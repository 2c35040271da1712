"""configs/digits.py in seconds: the same stages, smaller in every way."""

from configs import digits


def get_config():
  config = digits.get_config()
  config.backbone.update(width=16, num_layers=2, num_heads=2, mlp_multiple=8)
  config.train.update(batch_size=8, num_steps=4, log_every=1)
  config.train.checkpoint_every = 2
  for stage in config.stages.values():
    stage.train = dict(num_steps=4)
  config.stages.classifier.train = dict(num_steps=8, batch_size=64)
  config.evaluation.update(
    guidance=(1.0, 2.0), scan_images=20, num_images=40, seeds=2, batch_size=20
  )
  return config
