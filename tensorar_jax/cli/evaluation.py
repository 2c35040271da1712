"""The mode that measures: evaluate."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tensorar_jax.cli.config import Experiment
from tensorar_jax.cli.options import Products, Shared, changed, option
from tensorar_jax.cli.sampling import Images
from tensorar_jax.paths import LocalPath, PublishedPath

if TYPE_CHECKING:
  from tensorar_jax.evaluation.protocol import Judge
  from tensorar_jax.experiment.schema import Stage


@dataclasses.dataclass(frozen=True)
class Reference:
  """What images are measured against."""

  reference: LocalPath | None = option(
    None,
    "A reference batch of images, such as VIRTUAL_imagenet256_labeled.npz:"
    " measures FID, sFID, IS, precision and recall against it, as papers do."
    " Default: the config's own measure.",
    metavar="FILE.npz",
  )
  inception: PublishedPath = option(
    "weights/pt_inception-2015-12-05-6726825d.pth",
    "The network of FID, as pytorch-fid publishes it.",
    metavar="FILE",
  )
  bootstrap: int = option(
    20, "Resamples for the intervals of the metrics; 0: no intervals.", least=0
  )
  batch_size: int | None = option(
    None,
    "Images drawn or measured at once, over the local devices. Default: 32 for"
    " each device to draw, 64 to measure, on a CPU 16.",
    least=1,
  )

  def judge(self) -> Judge:
    """Loads network and reference; each of several processes has a share."""
    from tensorar_jax.checkpoints import resumable
    from tensorar_jax.evaluation import protocol

    if self.reference is None:
      raise ValueError("name a reference batch with --reference=FILE.npz.")
    return protocol.Judge(
      self.reference,
      self.inception,
      bootstrap=self.bootstrap,
      batch_size=self.batch_size,
      worker=resumable.Worker.of_this_process(),
    )


@dataclasses.dataclass(frozen=True)
class Evaluate(Images, Reference, Products, Shared):
  """Measures trained models, or images that any program made.

  There are four ways:
    --config                     The models that the section `evaluation` names,
                                 by the measure it names: metrics.json.
    --config --reference         A stage against a reference batch, as papers
                                 do; draws its images first.
    --samples --reference        The images of a file; no config.
    --scores                     A table of what GenEval's or DPG-Bench's scorer
                                 has written; no config.
  The first two take --every_checkpoint, which plots what train.keep_every has
  kept over the steps of training.
  """

  example = (
    "--config=configs/llamagen_b.py --mode=evaluate \\\n"
    "    --stage=base --reference=VIRTUAL_imagenet256_labeled.npz \\\n"
    "    --num_images=50000 --guidance=1.5,1.75,2"
  )

  stage: str | None = option(
    None,
    "The stage to measure. Default: with --reference the last one that draws"
    " images; else all that the config names.",
    metavar="NAME",
  )
  guidance: tuple[str, ...] | None = option(
    None,
    "With --reference: scales to measure, with a plot over them; 4:6 is one for"
    " each of two sub-tokens. Default: the config's.",
    metavar="SCALE,...",
  )
  every_checkpoint: bool = option(
    False, "Whether to measure all checkpoints that were kept."
  )
  samples: LocalPath | None = option(
    None,
    "Images to measure: arr_0 of the file, uint8 [n, h, w, 3].",
    metavar="FILE.npz",
  )
  scores: LocalPath | None = option(
    None,
    "What a benchmark's scorer has written: GenEval's .jsonl, or DPG-Bench's"
    " .txt.",
    metavar="FILE",
  )
  questions: LocalPath | None = option(
    None,
    "With --scores of DPG-Bench: its questions, for the table's categories.",
    metavar="FILE.csv",
  )
  output: LocalPath | None = option(
    None,
    "With --samples or --scores: the folder of the results. Default: one beside"
    " that file.",
    metavar="FOLDER",
  )

  def needs_config(self) -> bool:
    return not (self.samples or self.scores)

  def shares_work(self) -> bool:
    return self.reference is not None


def evaluate(
  options: Evaluate,
  experiment: Experiment | None,
  workdir: pathlib.Path | None,
) -> None:
  """Carries out --mode=evaluate, in one of its four ways."""
  if options.questions and not options.scores:
    raise ValueError("--questions goes with --scores=FILE of DPG-Bench.")
  if options.scores:
    summarise_scores(options, pathlib.Path(options.scores))
  elif options.samples:
    measure_file(options, pathlib.Path(options.samples))
  elif experiment is None or workdir is None:
    raise ValueError(
      "--mode=evaluate needs --config=FILE.py, or images by --samples=FILE.npz,"
      " or a scorer's results by --scores=FILE."
    )
  elif options.every_checkpoint:
    measure_checkpoints(options, experiment, workdir)
  elif options.reference:
    measure_stage(options, experiment, workdir)
  else:
    measure_models(options, experiment, workdir)


def summarise_scores(options: Evaluate, scores: pathlib.Path) -> None:
  """Makes the table of --scores."""
  from tensorar_jax.evaluation import summary

  if options.samples or options.reference:
    raise ValueError("--scores goes without --samples and --reference.")
  questions = pathlib.Path(options.questions) if options.questions else None
  folder = pathlib.Path(options.output or scores.with_suffix(""))
  metrics = summary.summarise(scores, questions, folder)
  print(summary.table(scores.stem, metrics))
  print(folder / "metrics.json")


def measure_file(options: Evaluate, samples: pathlib.Path) -> None:
  """Measures the images of --samples against --reference."""
  from tensorar_jax.evaluation import protocol

  if not options.reference:
    raise ValueError("--samples goes with --reference=FILE.npz.")
  if needless := changed(options, Images):
    raise ValueError(
      f"{needless[0]} with --samples: the images are drawn already."
    )
  protocol.check_images(
    protocol.open_images(options.reference), protocol.open_images(samples)
  )
  folder = options.output or protocol.default_folder(samples, options.reference)
  record = options.judge().measure(samples, folder)
  if record:
    print(protocol.table({samples.name: record}))
    print(pathlib.Path(folder, "metrics.json"))


def measure_stage(
  options: Evaluate, experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Draws images of a stage and measures them against --reference."""
  from tensorar_jax.evaluation import protocol
  from tensorar_jax.method import drawing
  from tensorar_jax.reports import guidance_report

  if options.output:
    raise ValueError("--output: samples and metrics go to the stage's folder.")
  name, stage = drawn_stage(options, experiment.stages)
  scales = [stage.sampling.guidance]
  if options.guidance is not None:
    scales = list(map(drawing.parse_guidance, options.guidance))
  judge = options.judge()
  records = protocol.sweep(
    judge,
    experiment.stages,
    workdir,
    options.request(50_000),
    stage=name,
    scales=scales,
    batch_size=options.batch_size,
  )
  if records:
    print(protocol.table(records))
    picture = guidance_report.draw(protocol.overview(judge, workdir, name))
    if picture:
      print(f"picture: {picture}")


def measure_checkpoints(
  options: Evaluate, experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Measures all checkpoints that were kept, with or without --reference."""
  from tensorar_jax.evaluation import progress
  from tensorar_jax.reports import progress_report

  if options.output or options.guidance:
    raise ValueError(
      "--every_checkpoint goes without --output and --guidance: set"
      " config.sampling.guidance, one scale for all checkpoints."
    )
  only_with_reference(options)
  stages, settings = experiment.stages, experiment.evaluation
  if options.reference:
    name, _ = drawn_stage(options, stages)
    judge, request = options.judge(), options.request(50_000)
    results = progress.by_reference(
      judge, stages, workdir, request, name=name, batch_size=options.batch_size
    )
    title = f"{request.num_images:,} images against {judge.file.path.stem}"
  elif settings:
    names = (options.stage,) if options.stage else settings.models
    results = progress.by_yardstick(stages, settings, workdir, names)
    title = f"{settings.num_images:,} images of each checkpoint"
  else:
    raise ValueError(
      "--every_checkpoint: the config has no section `evaluation`; name a"
      " reference batch with --reference=FILE.npz."
    )
  progress_report.draw(results, stages, workdir, title)


def measure_models(
  options: Evaluate, experiment: Experiment, workdir: pathlib.Path
) -> None:
  """Measures the models of the section `evaluation` as it says."""
  from tensorar_jax.evaluation import evaluate

  if not experiment.evaluation:
    raise ValueError(
      "--mode=evaluate: the config has no section `evaluation`; name a"
      " reference batch with --reference=FILE.npz."
    )
  only_with_reference(options)
  for name in ("output", "guidance"):
    if getattr(options, name) is not None:
      raise ValueError(
        f"--{name} goes with --reference, --samples or --scores. The config's"
        " section `evaluation` says what is measured, and metrics.json is in"
        f" {workdir}."
      )
  evaluate.evaluate(experiment.stages, experiment.evaluation, workdir)


def only_with_reference(options: Any) -> None:
  """Refuses flags that need --reference, without it.

  Args:
    options: with the flags of `Images` and `Reference`.

  Raises:
    ValueError: such a flag is given, and --reference is not.
  """
  if options.reference:
    return
  if needless := [*changed(options, Images), *changed(options, Reference)]:
    raise ValueError(
      f"{needless[0]} goes with --reference=FILE.npz: without it the config's"
      " section `evaluation` says what is drawn and measured, such as"
      " --config.evaluation.num_images=1000."
    )


def drawn_stage(
  options: Evaluate, stages: Mapping[str, Stage]
) -> tuple[str, Stage]:
  """Returns the (name, stage) to draw from; ValueError if it reads text."""
  from tensorar_jax.generation import requests, sample_files

  name = sample_files.drawable(stages, options.stage)
  requests.check_classes(name, stages[name])
  return name, stages[name]
