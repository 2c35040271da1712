"""Temperature of the drafts, the slots >= 1 that the sampler draws.

python -m tensorar_jax.main --config=configs/ablations/draft_temperature.py

:fashion_mnist or :llamagen_b after the file name picks another data set.
Nothing is trained for it but the centre.
"""

from configs.ablations import common

AXIS = common.axis(
  "draft temperature",
  variants={
    f"{value:g}": {"sampling.draft_temperature": value}
    for value in (0.0, 0.5, 1.0, 1.5)
  },
  papers={},
  source="",
)


def get_config(data: str = "digits"):
  return common.get_config(data, draft_temperature=AXIS)
