"""Published results, for comparison in tables.

The overall scores of base models, alone and with TensorAR around them, as the
papers print them: GenEval in shares, DPG-Bench in percent.
"""

OVERALL = {
  "geneval": {
    "LlamaGen, published": 0.32,
    "LlamaGen with TensorAR, published": 0.61,
    "Janus-Pro-7B, published": 0.80,
    "Janus-Pro-7B with TensorAR, published": 0.83,
  },
  "dpg": {
    "LlamaGen, published": 43.13,
    "LlamaGen with TensorAR, published": 73.33,
    "Janus-Pro-7B, published": 84.19,
    "Janus-Pro-7B with TensorAR, published": 85.57,
  },
}
