"""The command line: `python -m tensorar_jax.main --config=configs/digits.py`.

Modes:
  run        (default) train every stage of the config, evaluate, and draw the
             report. What is done is skipped, what was interrupted continues.
             With a config of configs/ablations: every variant, then tables and
             plots, there or in --output; --reference measures as papers do.
  train      train the stages only; --stage picks one. --profile=10:12 traces
             these steps of this start into the stage's folder `profile`.
  sample     draw images from a trained stage: samples.npz as the ADM suite has
             it, manifest.json, a grid, the refinement strip, and PNGs. --stage,
             --num_images, --classes, --seed, --resize, --batch_size, --pngs,
             --output=FOLDER or FILE.npz. A stage that reads text takes
             --prompts=FILE, a prompt a line, or --prompt=TEXT, and draws
             --num_images of each; --layout=geneval|dpg reads that benchmark's
             prompts, and writes the folders that its scorer takes. The same
             command continues a run that was stopped; all local devices share
             the work.
  evaluate   measure samples. --samples=FILE.npz --reference=FILE.npz: FID,
             sFID, IS, precision and recall of images that any program made, as
             the ADM suite has them; no --config. --reference alone: those of a
             trained stage, sampled for it (--stage, --num_images=50000,
             --guidance=1.5,2 for a scan with a plot, --classes, --seed,
             --resize). Neither: the config's models by its small classifier,
             for tiny images: metrics.json. --every_checkpoint: those that
             train.keep_every has kept, a plot over training steps.
             --inception, --bootstrap, --output.
             --scores=FILE: the table of what GenEval's or DPG-Bench's scorer
             has written; no --config. --questions=FILE.csv, --output.
  demo       a page in the browser to try the trained stages: --stage to begin
             with, --num_images at most, --host=127.0.0.1, --port. Needs
             requirements-demo.txt.
  visualize  draw the pictures and report.html from what is there.
  import     fill the stages that have a `source` from published PyTorch files,
             which --init=hf:// downloads by name; --init=FILE, or
             --init=hf://OWNER/REPOSITORY/FILE, names that of the base model.
  tokenize   turn images into token shards: --images=folder:DIR (or tfds:NAME;
             with captions webdataset:DIR, captions:DIR), --output,
             --recipe=center|flip|ten_crop, --crop_range.
  export     write a stage's base weights as published: --stage, --output.
  benchmark  measure speed on random weights, beside the machine's own limits:
             --stage, --batches, --windows, --depths, --rounds, --train_batch,
             --parts, --nounguided, --peer=torch, --peer_modes, --profile,
             --seconds, --output=FOLDER.
  compile    compile a stage's train step and sampler for hardware that need not
             be there: memory, traffic and a bound on the time of each; fails if
             one does not fit. --target=v5e:4x4, --stage, --batch_size,
             --output=FILE.json.

Several processes train, import, sample and tokenize together: the same command
in each with --coordinator=HOST:PORT, --num_processes and --process_id. Under
SLURM and Open MPI they find one another; --coordinator=auto asks a TPU pod.
launch/ has a script for each of these. What an array is split over:
--config.mesh.data, .fsdp and .tensor.

SIGTERM makes training save and exit with 75: the same command continues.

--precision=float32|tensorfloat32|bfloat16 says what matrix products are made
of; without it the config's dtype, and on GPUs TF32 for float32.

Any value of the config can be set from here:
  python -m tensorar_jax.main --config=configs/digits.py \\
    --workdir=runs/k8 --config.stages.tensorar.tensorar.window=8
"""

from __future__ import annotations

import pathlib
import signal
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from tensorar_jax import hardware, metrics

SHARED_MODES = ("train", "sample", "import", "tokenize")  # and --reference
MODES = (
  *("run", "train", "sample", "evaluate", "demo", "visualize"),
  *("import", "tokenize", "export", "compile", "benchmark"),
)

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The experiment: a file of configs/.", lock_config=True
)
_MODE = flags.DEFINE_enum("mode", "run", MODES, "What to do; see above.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where everything is written. Default: runs/<config name>."
)
_INIT = flags.DEFINE_string(
  "init",
  None,
  "Weights that --stage, by default the base model, starts from: a published"
  " file, hf://OWNER/REPOSITORY/FILE, or a checkpoint. hf:// alone: all"
  " published files of the config, by name. Give it to every command of a run.",
)
_STAGE = flags.DEFINE_string(
  "stage", None, "Which stage to train or sample. Default: all; the last."
)
_NUM_IMAGES = flags.DEFINE_integer(
  "num_images",
  None,
  "How many images to sample. Default: 100; 50,000 for --reference. Of each"
  " prompt, if there are prompts; default: 4.",
  lower_bound=1,
)
_CLASSES = flags.DEFINE_list(
  "classes", None, "Class ids to sample in turn. Default: all."
)
_PROMPTS = flags.DEFINE_string(
  "prompts", None, "Text file in UTF-8 with a prompt to sample in each line."
)
_LAYOUT = flags.DEFINE_enum(
  "layout",
  None,
  ("geneval", "dpg"),
  "Folders to write, for the scorer of a benchmark. --prompts is GenEval's"
  " evaluation_metadata.jsonl, or DPG-Bench's folder of .txt files.",
)
_PROMPT = flags.DEFINE_multi_string(
  "prompt", None, "A prompt to sample; may be given several times."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  None,
  "Images sampled or measured at once, over the local devices. Default: 32 for"
  " each; for features 64, on a CPU 16.",
  lower_bound=1,
)
_PNGS = flags.DEFINE_bool(
  "pngs", None, "Whether every sample is a PNG too. Default: up to 1000."
)
_RESIZE = flags.DEFINE_integer(
  "resize",
  None,
  "Side of the samples in pixels; 384 px models are judged at 256.",
  lower_bound=1,
)
_OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "Of --mode=export: a .pt or .safetensors file. Of --mode=tokenize: a folder."
  " Of --mode=sample: a folder or a .npz file; default: a numbered folder. Of"
  " --samples and --scores: a folder; default: beside them. Of --mode=compile:"
  " a .json file. Of ablations: a folder; default: configs/ablations.",
)
_TARGET = flags.DEFINE_string(
  "target",
  "here",
  "What to compile for: v5e:4x4, v5p:2x2x2, v6e:4x4, v4:2x2x2, tpu7x:2x2x1,"
  " h100:8, a100:8, or the devices that are here.",
)
_SAMPLES = flags.DEFINE_string(
  "samples", None, "Images to measure: .npz with arr_0, uint8 [n, h, w, 3]."
)
_REFERENCE = flags.DEFINE_string(
  "reference",
  None,
  "What to measure against: .npz with images, as VIRTUAL_imagenet256_labeled.",
)
_SCORES = flags.DEFINE_string(
  "scores", None, "Of GenEval's scorer, a .jsonl; of DPG-Bench's, a .txt file."
)
_QUESTIONS = flags.DEFINE_string(
  "questions", None, "With --scores: DPG-Bench's csv, for its categories."
)
_INCEPTION = flags.DEFINE_string(
  "inception",
  "weights/pt_inception-2015-12-05-6726825d.pth",
  "The network of FID, as pytorch-fid publishes it.",
)
_BOOTSTRAP = flags.DEFINE_integer(
  "bootstrap", 20, "Resamples behind the intervals of --reference; 0: none."
)
_EVERY_CHECKPOINT = flags.DEFINE_bool(
  "every_checkpoint", False, "Measure all kept checkpoints of the stages."
)
_GUIDANCE = flags.DEFINE_list(
  "guidance",
  None,
  "Scales to measure with --reference, as 1.5,2; 4:6 is one for each of two"
  " sub-tokens. Default: the config's.",
)
_IMAGES = flags.DEFINE_string(
  "images",
  None,
  "Images to tokenize: folder:DIR, tfds:NAME; webdataset:DIR, captions:DIR.",
)
_RECIPE = flags.DEFINE_enum(
  "recipe", "ten_crop", ("center", "flip", "ten_crop"), "Crops to tokenize."
)
_CROP_RANGE = flags.DEFINE_multi_float(
  "crop_range", [1.1], "Shorter side before ten_crop, in image sizes."
)
_BENCHMARK = (
  flags.DEFINE_list("batches", None, "Images at once. Default: 1,8."),
  flags.DEFINE_list("windows", None, "Windows k. Default: 1,2,4,8."),
  flags.DEFINE_list("depths", None, "Depths of one window. Default: 1,2,4."),
  flags.DEFINE_integer("rounds", None, "How often all is timed. Default: 3."),
  flags.DEFINE_integer(
    "train_batch", None, "Images of a step. Default: the config's; on a CPU 4."
  ),
  flags.DEFINE_list("parts", None, "Of decode,tokenizer,train. Default: all."),
  flags.DEFINE_bool("unguided", None, "The base unguided, too. Default: yes."),
  flags.DEFINE_string("peer", None, "torch: runs it too, for comparison."),
  flags.DEFINE_list(
    "peer_modes",
    None,
    "Of eager,compile,graphs (CUDA graphs). Default: the first two.",
  ),
  flags.DEFINE_float("seconds", None, "Begins no case after so many."),
)
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Who can open --mode=demo; 0.0.0.0: other machines too."
)
_PORT = flags.DEFINE_integer(
  "port", None, "Of --mode=demo. Default: the first free one from 7860."
)
_PRECISION = flags.DEFINE_enum(
  "precision",
  None,
  tuple(hardware.PRECISIONS),
  "What matrix products are made of: sets backbone.dtype, and how float32 is"
  " multiplied; see hardware.py. Default: the config's dtype, and on GPUs TF32"
  " for float32.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of --mode=sample.")
_PROFILE = flags.DEFINE_string(
  "profile",
  None,
  "FIRST:LAST, steps counted from this start of training, to trace with the JAX"
  " profiler. Of --mode=benchmark: of decode,tokenizer,train, whose first case"
  " is traced.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT of process 0, or auto. Default: the cluster's.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes there are.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this is.", lower_bound=0
)


def workdir() -> pathlib.Path:
  """--workdir, or runs/<name of the config file>."""
  if _WORKDIR.value:
    return pathlib.Path(_WORKDIR.value).absolute()
  if "ablation" in _CONFIG.value:  # every axis of a data set shares its base
    data = _CONFIG.value.ablation.data
    return pathlib.Path("runs", "ablations", data).absolute()
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  return pathlib.Path("runs", pathlib.Path(path).stem).absolute()


def run(config, folder: pathlib.Path) -> None:
  """Carries out --mode. The heavy imports wait until the flags are right."""
  import jax

  from tensorar_jax import build, commands, report, throughput, train
  from tensorar_jax.evaluation import evaluate

  count = jax.process_count()
  shared = _MODE.value == "evaluate" and _REFERENCE.value
  alone = not shared and _MODE.value not in SHARED_MODES
  if count > 1 and alone:
    raise ValueError(
      f"--mode={_MODE.value} in {count} processes: expected one of"
      f" {SHARED_MODES}. Run the other modes in one process."
    )
  measures = _MODE.value == "benchmark"  # it traces cases in place of steps
  profile = None if measures else throughput.parse_profile(_PROFILE.value)
  mode, given = _MODE.value, flags.FLAGS
  ablation, stages = commands.checked_stages(given, config)
  if ablation and mode in ("run", "visualize"):
    return commands.ablate(given, ablation, folder)
  settings = None
  if "evaluation" in config and not ablation:
    section = config.evaluation.to_dict()
    settings = build.call(evaluate.EvaluationConfig, section, "evaluation")
    settings.check(stages)
  if mode in ("run", "train", "import"):
    for name, stage in stages.items():
      wanted = stage["source"] or mode != "import"
      if _STAGE.value in (None, name) and wanted:
        train.fit(stage, folder / name, profile)
  if mode == "sample":
    commands.sample(given, stages, folder)
  if mode == "tokenize":
    commands.tokenize_images(given, stages, folder)
  if mode == "export":
    commands.export(given, folder)
  if mode == "demo":
    commands.serve_demo(given, stages, folder)
  if mode == "benchmark":
    commands.run_benchmark(given, stages, folder)
  if mode == "compile":
    commands.compile_stage(given, stages)
  if mode == "evaluate" and _EVERY_CHECKPOINT.value:
    commands.measure_checkpoints(given, stages, settings, folder)
  elif mode == "evaluate" and _REFERENCE.value:
    commands.measure_stage(given, stages, folder)
  elif mode == "evaluate" and not settings:
    raise ValueError(
      "--mode=evaluate: the config has no section `evaluation`; name a"
      " reference batch with --reference=FILE.npz."
    )
  elif mode in ("run", "evaluate") and settings:
    evaluate.evaluate(stages, settings, folder)
  if mode in ("run", "visualize"):
    command = " ".join(["python -m tensorar_jax.main", *sys.argv[1:]])
    report.draw(stages, folder, command)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  from tensorar_jax import processes, targets

  metrics.log_to_console()
  if _MODE.value == "compile":
    targets.stay_off_devices(_TARGET.value)
  try:
    processes.join_processes(
      _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    if _MODE.value not in ("run", "train"):
      # With several processes JAX takes it, for training to see.
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not processes.is_first():
      logging.set_verbosity(logging.WARNING)
    if _SAMPLES.value or _SCORES.value:
      from tensorar_jax import commands

      if _SCORES.value:
        commands.summarise_scores(flags.FLAGS)
      else:
        commands.measure_file(flags.FLAGS)
    else:
      run(_CONFIG.value, workdir())
  except (ValueError, OSError) as error:
    # These are messages to the user: a traceback would bury them.
    if logging.vlog_is_on(1):
      raise
    processes.fail(f"error: {error}")
  except Exception:
    # Raised, it would end one of several processes only with the others, which
    # may be waiting for it. Nothing is hidden: the whole traceback is printed.
    processes.fail(traceback.format_exc())


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; a bad config or key ends in one line."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, ValueError, TypeError, OSError) as error:
    words = str(error).strip("'\"").splitlines()
    sys.exit(
      f"error: {words[0] if words else error!r}. The config has no such file,"
      " key or type of value: keys that a command line may set are those that"
      " the config file spells out."
    )


if __name__ == "__main__":
  flags.register_multi_flags_validator(
    ["config", "samples", "scores"],
    lambda given: any(given.values()),
    "Name --config=FILE, or with --mode=evaluate --samples=FILE.npz or"
    " --scores=FILE.",
  )
  app.run(main, flags_parser=parse_flags)
