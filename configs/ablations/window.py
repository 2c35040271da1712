"""Window k: how often a token is looked at before it is committed.

python -m tensorar_jax.main --config=configs/ablations/window.py

:fashion_mnist or :llamagen_b after the file name picks another data set.
"""

from configs.ablations import common

AXIS = common.axis(
  "window k",
  variants={f"k = {k}": {"tensorar.window": k} for k in (1, 2, 4, 8)},
  papers={"k = 1": 5.46, "k = 2": 4.78, "k = 4": 4.71, "k = 8": 4.68},
  source="P2, LlamaGen-B",
)


def get_config(data: str = "digits"):
  return common.get_config(data, window=AXIS)
