"""The recipe that the experiments with published models share.

Where a config sets nothing else it is the ICLR text's: window 4, depth 1, the
exponential schedule, learning rates 1e-4 and 1e-5, batches of 256. All but the
backbone's rate, the window and the steps are defaults.
"""

from ml_collections import ConfigDict

IMAGENET = 1_281_167  # training images
STEPS_PER_EPOCH = IMAGENET // 256


def recipe(num_steps: int = 20 * STEPS_PER_EPOCH) -> ConfigDict:
  """Makes a config without data and models, by default of 20 epochs."""
  config = ConfigDict()
  config.optim = dict(backbone_learning_rate=1e-5)
  config.train = dict(num_steps=num_steps, log_every=100, checkpoint_every=5000)
  config.sampling = dict()
  return config


def imported(
  tokenizer: str, base: str, base_from_nothing: dict, **wrapped
) -> dict:
  """Makes three stages: two import published files; TensorAR trains from one.

  Args:
    tokenizer: the file of its weights.
    base: the file of the base model's weights.
    base_from_nothing: sections for the training of the base model from nothing,
      which an empty source asks for: --config.stages.base.source=
    wrapped: values of TensorAR's section beside its window of 4.
  """
  return dict(
    tokenizer=dict(objective="tokenizer", source=tokenizer),
    base=dict(source=base, **base_from_nothing),
    tensorar=dict(init="base", tensorar=dict(window=4, **wrapped)),
  )
