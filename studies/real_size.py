"""Takes a published model's whole path at its real size: time and memory.

  python -m studies.real_size --config=configs/llamagen_b.py --folder=/tmp/real

Writes random weights in the published layout in place of the published files,
and some noise as JPEG images; for a model that reads prompts by itself also a
tokenizer of a few words, and captions. Then it runs the modes that a user
would: import, tokenize, two training steps at batch 2, one image. Each is a
process of its own; memory is the peak of what is resident, mapped file pages
included.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

from tensorar_jax import paths
from tensorar_jax.checkpoints import hub, torch_export
from tensorar_jax.experiment import config_file

flags.DEFINE_string("config", None, "As of main.")
flags.DEFINE_string("folder", None, "An empty folder to work in.")
_FAKE = flags.DEFINE_boolean("fake", False, "Only write the files.")
NUM_IMAGES = 4
CAPTION = "a red cat on a mat"


def write_weights(stages, folder: pathlib.Path) -> None:
  """Writes random weights for each `source`; stages may share a file."""
  import jax

  from tensorar_jax.experiment import build, families
  from tensorar_jax.parallel import weights

  rng, files = np.random.default_rng(0), {}

  def draw(path, like):
    scale = np.float32(0.02)
    values = rng.standard_normal(like.shape, np.float32) * scale
    return jax.numpy.asarray(values + path.endswith("scale"))

  for stage in stages.values():
    if not stage.source:
      continue
    part = stage.component
    module = families.family(part.kind, part.name)
    model = build.abstract(part)
    skeleton, params, frozen = weights.split(model)
    values = {p: draw(p, like) for p, like in {**params, **frozen}.items()}
    rules = module.import_rules(part.config)
    tensors = torch_export.export_state_dict(skeleton.merge(values), rules)
    files.setdefault(pathlib.Path(stage.source).name, {}).update(tensors)
  for name, tensors in files.items():
    if name.endswith(hub.INDEX):
      write_halves(tensors, folder / name)
    else:
      torch_export.save(folder / name, tensors)


def write_halves(tensors: dict, index: pathlib.Path) -> None:
  """Writes tensors in two files, and the index that names them."""
  stem, _, suffix = index.name.removesuffix(hub.INDEX).rpartition(".")
  weight_map = {}
  for i in (0, 1):
    file = f"{stem}-0000{i + 1}-of-00002.{suffix}"
    names = sorted(tensors)[i::2]
    torch_export.save(index.with_name(file), {n: tensors[n] for n in names})
    weight_map |= dict.fromkeys(names, file)
  index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tokenizer(folder: pathlib.Path) -> None:
  """Writes a chat model's tokenizer.json that knows the words of CAPTION."""
  import tokenizers

  from tensorar_jax.conditioning import chat

  words = {word: i for i, word in enumerate(["?", ":", *CAPTION.split()])}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "?"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens([chat.BEGIN, chat.PAD, chat.IMAGE])
  made.save(str(folder / "tokenizer.json"))


def write_images(folder: pathlib.Path) -> None:
  """Writes JPEG noise in folders by class, with captions."""
  from PIL import Image

  rng, lines = np.random.default_rng(0), []
  for i in range(NUM_IMAGES):
    name = f"class{i % 2}/{i}.jpg"
    lines.append(json.dumps({"file_name": name, "text": CAPTION}))
    path = folder / "images" / "train" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (300, 400, 3), np.uint8)).save(path)
  metadata = folder / "images" / "train" / "metadata.jsonl"
  metadata.write_text("\n".join(lines))


def measure(name: str, command: list[str]) -> tuple[str, float, float]:
  """Runs a command that must succeed: (name, seconds, GiB at the peak)."""
  started = time.monotonic()
  process = subprocess.Popen(command)
  _, status, usage = os.wait4(process.pid, 0)
  seconds = time.monotonic() - started
  if status:
    sys.exit(f"{name} failed: {' '.join(command)}")
  return name, seconds, usage.ru_maxrss / 2**20


def main(argv: list[str]) -> None:
  """Writes the files, runs the modes and prints a table of them."""
  del argv
  given = flags.FLAGS
  folder = pathlib.Path(paths.local(given.folder)).absolute()
  stages = config_file.load(given.config).stages
  prompted = stages["base"].conditioning.name == "prompt"
  if _FAKE.value:
    write_weights(stages, folder)
    write_images(folder)
    if prompted:
      write_tokenizer(folder)
    return
  folder.mkdir(parents=True)
  config = f"--config={given.config}"
  sources = [
    f"--config.stages.{name}.source={folder / pathlib.Path(stage.source).name}"
    for name, stage in stages.items()
    if stage.source
  ]
  run = [sys.executable, "-m", "tensorar_jax.main", config]
  run += [f"--workdir={folder / 'run'}", *sources]
  kind, condition = "folder", "--classes=1"
  if prompted:
    kind, condition = "captions", f"--prompt={CAPTION}"
    run += [f"--config.conditioning.encoder={folder}"]
  tokens = f"--config.data.name=tokens:{folder / 'tokens'}"
  small = ("batch_size=2", "num_steps=2", "log_every=1", "checkpoint_every=2")
  small = [f"--config.train.{setting}" for setting in small]
  fake = [sys.executable, "-m", "studies.real_size", config, "--fake"]
  rows = [
    measure("write random weights", [*fake, f"--folder={folder}"]),
    measure("import", [*run, "--mode=import"]),
    measure(
      f"tokenize {NUM_IMAGES} images",
      [
        *run,
        "--mode=tokenize",
        "--recipe=center",
        f"--images={kind}:{folder / 'images'}",
        f"--output={folder / 'tokens'}",
      ],
    ),
    measure("two steps at batch 2", [*run, tokens, *small, "--mode=train"]),
    measure(
      "one image",
      [*run, tokens, *small, "--mode=sample", "--num_images=1", condition],
    ),
  ]
  print("\n| step | seconds | GiB |\n| --- | --- | --- |")
  for name, seconds, memory in rows:
    print(f"| {name} | {seconds:.0f} | {memory:.1f} |")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "folder"])
  app.run(main)
