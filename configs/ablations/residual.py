"""Which outputs get the backbone's hidden state added, if any.

python -m tensorar_jax.main --config=configs/ablations/residual.py

:fashion_mnist or :llamagen_b after the file name picks another data set.
"""

from configs.ablations import common

OUTPUT, INPUT = "tensorar.output_residual", "tensorar.input_residual"
AXIS = common.axis(
  "residual",
  variants={
    "first output": {OUTPUT: "first"},
    "all outputs": {OUTPUT: "all"},
    "no output": {OUTPUT: "none"},
    "no output, no input": {OUTPUT: "none", INPUT: False},
  },
  papers={"first output": 4.71, "no output, no input": 4.87},
  source="P2, LlamaGen-B; without residual: P1, which does not say which one",
)


def get_config(data: str = "digits"):
  return common.get_config(data, residual=AXIS)
