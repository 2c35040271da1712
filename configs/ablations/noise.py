"""Kind of the noise on input windows; beta = 1 leaves nothing to read in them.

python -m tensorar_jax.main --config=configs/ablations/noise.py

:fashion_mnist or :llamagen_b after the file name picks another data set.
"""

from configs.ablations import common
from tensorar_jax.method import noising

AXIS = common.axis(
  "kind of noise",
  variants={
    **{kind: {"noise.kind": kind} for kind in noising.KINDS},
    "control, beta = 1": {"noise.schedule": (0, 1, 1, 1)},
  },
  papers={"categorical": 4.71, "gaussian": 4.85},
  source="LlamaGen-B; categorical: P2, gaussian: P1",
)


def get_config(data: str = "digits"):
  return common.get_config(data, noise=AXIS)
