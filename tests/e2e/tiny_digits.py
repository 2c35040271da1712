"""configs/digits.py in seconds: the same stages, smaller in every way."""

from configs import digits
from tests import tiny_configs


def get_config():
  config = digits.get_config()
  config.backbone.update(tiny_configs.SIZES)
  config.train.update(
    batch_size=8, num_steps=4, log_every=1, checkpoint_every=2
  )
  for stage in config.stages.values():
    stage.train = dict(num_steps=4)
  config.stages.classifier.train = dict(num_steps=8, batch_size=64)
  config.evaluation.update(
    guidance=(1.0, 2.0), scan_images=20, num_images=40, seeds=2, batch_size=20
  )
  return config
