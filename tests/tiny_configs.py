"""Stages of tiny models on the digits, which train in seconds.

Config files of the same sizes, for command lines, are tests/e2e/tiny_*.py.
"""

from tensorar_jax.experiment import parse
from tensorar_jax.experiment.schema import Stage

# Of a LlamaGen on any tokens.
SIZES = dict(width=16, num_layers=2, num_heads=2, mlp_multiple=8)
SECTIONS = {
  "data": dict(name="digits"),
  "tokenizer": dict(name="pixels", image_size=(8, 8), levels=17),
  "conditioning": dict(name="class", num_classes=10),
  "backbone": dict(
    name="llamagen",
    vocab_size=17,
    grid=(8, 8),
    num_classes=10,
    **SIZES,
  ),
  "tensorar": dict(window=3),
  "optim": dict(learning_rate=3e-3, ema_decay=0.9),
  "train": dict(batch_size=8, log_every=2, checkpoint_every=2),
}


def stage(num_steps: int = 6, name: str = "stage", **sections) -> Stage:
  """Makes a stage; keys of `sections` are set on top of SECTIONS.

  A section of another `name` (family, kind) takes the place of the one there.
  """
  tree = {**SECTIONS, "train": {**SECTIONS["train"], "num_steps": num_steps}}
  for key, value in sections.items():
    default = tree.get(key, {})
    if isinstance(value, dict) and (
      value.get("name") in (None, default.get("name"))
    ):
      value = {**default, **value}
    tree[key] = value
  return parse.stage_of(tree, name)
