"""Two axes on tiny digits: a shared centre, and one that is not trained."""

from configs.ablations import common, draft_temperature, loss
from tests import tiny_configs


def get_config():
  config = common.get_config(
    "digits", loss=loss.AXIS, draft_temperature=draft_temperature.AXIS
  )
  axes = config.ablation.axes
  axes.loss.rows = axes.loss.rows[:1]  # the centre
  axes.draft_temperature.rows = axes.draft_temperature.rows[1:3]
  config.ablation.seeds = 2
  config.backbone.update(tiny_configs.SIZES, num_layers=1)
  config.stages.tensorar.tensorar.window = 2
  config.train.update(batch_size=8, log_every=1)
  config.stages.tensorar.train = dict(num_steps=2, batch_size=8)
  config.stages.base.train = dict(num_steps=2)
  config.stages.classifier.train = dict(num_steps=8, batch_size=64)
  config.evaluation.update(num_images=20, batch_size=20, held_out_images=20)
  return config
