"""What each mode of the command line does with its flags.

`given` has the value of every flag of `main.py` as an attribute.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
from absl.flags import FlagValues as Flags
from ml_collections import ConfigDict

from tensorar_jax import (
  benchmark,
  build,
  compile,
  demo,
  demo_page,
  drawing,
  hardware,
  published,
  sharding,
  targets,
  train,
)
from tensorar_jax.ablations import report, runs, variants
from tensorar_jax.data import codes, sources, tokenize
from tensorar_jax.evaluation import (
  progress,
  protocol,
  request,
  sample_files,
  summary,
)
from tensorar_jax.evaluation.yardsticks import EvaluationConfig


def checked_stages(
  given: Flags, config: ConfigDict
) -> tuple[variants.Ablation | None, dict[str, dict]]:
  """The stages of a config, with what --init names, if all can be built.

  From here on JAX multiplies as --precision says.
  """
  ablation = variants.Ablation(config) if "ablation" in config else None
  stages = ablation.stages if ablation else build.stages(config)
  if given.stage:
    build.choose("--stage", given.stage, stages)
  if given.init:
    published.start_from(stages, given.init, given.stage)
  hardware.set_precision(given.precision, stages)
  for name, stage in stages.items():
    try:
      train.check(stage)
    except ValueError as error:
      raise ValueError(f"stage {name}: {error}") from error
  return ablation, stages


def asked(given: Flags, num_images: int) -> request.Request:
  """--num_images and the other flags that say which images."""
  classes, prompts, sources = given.classes, given.prompt, None
  try:
    classes = tuple(map(int, classes)) if classes is not None else None
  except ValueError as error:
    raise ValueError(f"--classes={classes}: expected integers.") from error
  if given.prompts is not None:
    if prompts is not None:
      raise ValueError("--prompts and --prompt: expected one or the other.")
    path = pathlib.Path(given.prompts)
    prompts, sources = request.read_prompts(path, given.layout)
  prompts = None if prompts is None else tuple(prompts)
  count = given.num_images or (num_images if prompts is None else 4)
  return request.Request(
    *(count, classes, given.seed, given.resize),
    *(prompts, given.layout, sources),
  )


def sample(given: Flags, stages: dict, folder: pathlib.Path) -> None:
  """--mode=sample."""
  if given.layout and given.pngs is False:
    raise ValueError("--layout and --nopngs: a layout is of PNGs.")
  sample_files.sample(
    *(stages, folder, asked(given, 100)),
    stage=given.stage,
    output=given.output,
    batch_size=given.batch_size,
    pngs=given.pngs,
  )


def make_judge(given: Flags):
  """What --reference, --inception and --bootstrap say."""
  return protocol.Judge(
    *(given.reference, given.inception),
    bootstrap=given.bootstrap,
    batch_size=given.batch_size,
    share=(jax.process_index(), jax.process_count()),
  )


def measure_file(given: Flags) -> None:
  """--mode=evaluate --samples."""
  if given.mode != "evaluate" or not given.reference:
    raise ValueError("--samples goes with --mode=evaluate and --reference.")
  samples, judge = pathlib.Path(given.samples), make_judge(given)
  folder = given.output or protocol.place_of(samples, given.reference)
  record = judge.measure(samples, folder)
  if record:
    print(protocol.table({samples.name: record}))
    print(f"{pathlib.Path(folder, 'metrics.json')}")


def summarise_scores(given: Flags) -> None:
  """--mode=evaluate --scores."""
  if given.mode != "evaluate" or given.samples or given.reference:
    raise ValueError(
      "--scores goes with --mode=evaluate, and not with --samples and"
      " --reference."
    )
  scores = pathlib.Path(given.scores)
  questions = given.questions and pathlib.Path(given.questions)
  folder = pathlib.Path(given.output or scores.with_suffix(""))
  print(
    summary.table(scores.stem, summary.summarise(scores, questions, folder))
  )
  print(folder / "metrics.json")


def measure_stage(given: Flags, stages: dict, folder: pathlib.Path) -> None:
  """--mode=evaluate --reference: samples a stage for it first."""
  if given.output:
    raise ValueError("--output: samples and metrics go to the stage's folder.")
  name = sample_files.drawable(stages, given.stage)
  request.check_classes(name, stages[name])
  default = stages[name].get("sampling", {}).get("guidance", 1.0)
  scales = [default]
  if given.guidance is not None:
    scales = list(map(drawing.parse_guidance, given.guidance))
  records = protocol.sweep(
    *(make_judge(given), stages, folder, asked(given, 50_000)),
    stage=name,
    scales=scales,
    batch_size=given.batch_size,
  )
  if records:
    print(protocol.table(records))


def measure_checkpoints(
  given: Flags,
  stages: dict,
  settings: EvaluationConfig | None,
  folder: pathlib.Path,
) -> None:
  """--mode=evaluate --every_checkpoint, with --reference or without."""
  if given.output or given.guidance:
    raise ValueError(
      "--every_checkpoint goes without --output and --guidance: set"
      " config.sampling.guidance, one scale for all checkpoints."
    )
  if given.reference:
    name = sample_files.drawable(stages, given.stage)
    request.check_classes(name, stages[name])
    judge, asks = make_judge(given), asked(given, 50_000)
    found = progress.by_reference(
      judge, stages, folder, asks, name=name, batch_size=given.batch_size
    )
    title = f"{asks.num_images:,} images against {judge.file.path.stem}"
  elif settings:
    names = (given.stage,) if given.stage else settings.models
    found = progress.by_yardstick(stages, settings, folder, names)
    title = f"{settings.num_images:,} images of each checkpoint"
  else:
    raise ValueError(
      "--every_checkpoint: the config has no section `evaluation`; name a"
      " reference batch with --reference=FILE.npz."
    )
  progress.save(found, stages, folder, title)


def tokenize_images(given: Flags, stages: dict, folder: pathlib.Path) -> None:
  """--mode=tokenize, with the tokenizer of --stage or of the last stage."""
  if not (given.images and given.output):
    raise ValueError("--mode=tokenize needs --images and --output.")
  readers = [n for n, s in stages.items() if s["objective"] == "tensorar"]
  stage = stages[given.stage or readers[-1]]
  tokenizer = build.frozen_tokenizer(stage, folder)
  rows, cols = tokenizer.config.image_size
  if rows != cols:
    raise ValueError(f"image_size {rows} x {cols}: crops are square.")
  source = sources.load(given.images, "train")
  if isinstance(source, codes.TokenSource):
    raise ValueError(f"--images={given.images}: these are tokens already.")
  text, section = None, stage["conditioning"]
  if source.num_classes is None and build.conditioning(section).is_text:
    mesh = sharding.local_mesh(build.mesh_config(stage))
    text = build.text_encoder(section, mesh)
  tokenize.tokenize(
    source,
    tokenizer,
    given.output,
    recipe=given.recipe,
    image_size=rows,
    crop_range=tuple(given.crop_range),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    text=text,
  )


def run_benchmark(given: Flags, stages: dict, folder: pathlib.Path) -> None:
  """--mode=benchmark."""
  names = [field.name for field in dataclasses.fields(benchmark.Settings)]
  values = {name: getattr(given, name) for name in names}
  values = {name: value for name, value in values.items() if value is not None}
  benchmark.run(
    *(stages, folder, benchmark.parse(values)),
    stage=given.stage,
    output=given.output,
  )


def serve_demo(given: Flags, stages: dict, folder: pathlib.Path) -> None:
  """--mode=demo, until it is stopped."""
  most = given.num_images or 4
  studio = demo.Studio(stages, folder, given.stage, most)
  demo_page.serve(studio, folder.name, given.host, given.port)


def export(given: Flags, folder: pathlib.Path) -> None:
  """--mode=export."""
  if not (given.stage and given.output):
    raise ValueError("--mode=export needs --stage and --output.")
  published.export_stage(folder / given.stage, pathlib.Path(given.output))


def compile_stage(given: Flags, stages: dict) -> None:
  """--mode=compile."""
  compile.report(
    *(stages, given.stage, targets.find(given.target)),
    batch_size=given.batch_size,
    output=given.output,
  )


def ablate(given: Flags, ablation: variants.Ablation, folder: pathlib.Path):
  """--mode=run of a config with a section `ablation`; visualize draws only."""
  output = pathlib.Path(given.output or "configs/ablations").absolute()
  if given.mode == "visualize":
    report.render(output)
    return
  if given.reference:
    images = asked(given, 50_000)
    measure = runs.ByReference(
      *(ablation, folder, make_judge(given), images, given.batch_size)
    )
  else:
    measure = runs.ByEvaluation(ablation, folder)
  runs.run(ablation, folder, output, measure)
