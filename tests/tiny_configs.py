"""Stages of tiny models on the digits, which train in seconds.

The config files of the same size, for command lines, are tests/e2e/tiny_*.py.
"""

from tensorar_jax.experiment import parse
from tensorar_jax.experiment.schema import Stage

SECTIONS = {
  "data": dict(name="digits"),
  "tokenizer": dict(name="pixels", image_size=(8, 8), levels=17),
  "conditioning": dict(name="class", num_classes=10),
  "backbone": dict(
    name="llamagen",
    vocab_size=17,
    grid=(8, 8),
    mlp_multiple=8,
    width=16,
    num_layers=2,
    num_heads=2,
    num_classes=10,
  ),
  "tensorar": dict(window=3),
  "optim": dict(learning_rate=3e-3, ema_decay=0.9),
  "train": dict(batch_size=8, log_every=2, checkpoint_every=2),
}


def stage(num_steps: int = 6, name: str = "stage", **sections) -> Stage:
  """A stage; keys of `sections` are set on top of SECTIONS.

  A section of another `name` (family, kind) takes the place of the one there.
  """
  tree = {**SECTIONS, "train": {**SECTIONS["train"], "num_steps": num_steps}}
  for key, value in sections.items():
    own = tree.get(key, {})
    if isinstance(value, dict) and value.get("name") in (None, own.get("name")):
      value = {**own, **value}
    tree[key] = value
  return parse.stage_of(tree, name)
