"""The typed parts of an experiment: each section, its defaults and its checks.

    Experiment
      stages      {name: Stage}, parents before what starts from them
      evaluation  how the trained models are compared, if they are
      ablation    variants of one stage, if there are any

A `Stage` is one model to train or import, with every section resolved. A config
file holds what differs from the defaults below; `parse` makes these objects and
everything after it takes them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from tensorar_jax.method.drawing import Guidance
from tensorar_jax.method.noising import NoiseConfig
from tensorar_jax.method.objective import LossConfig
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.nn import checks, layers
from tensorar_jax.nn.classifier import Config as ClassifierConfig
from tensorar_jax.parallel.sharding import MeshConfig
from tensorar_jax.paths import DataName, LocalPath, PublishedPath

SCHEDULES = ("constant", "linear", "cosine")  # of learning rates


def choose(kind: str, name: str, known: Mapping | list | tuple) -> Any:
  """Returns known[name] (of a list, name); ValueError lists what there is."""
  if name not in known:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(
      f"{kind} {name!r} is unknown.{hint} Known: {sorted(known)}."
    )
  return known[name] if isinstance(known, Mapping) else name


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the training images, or their tokens, come from."""

  # digits, shapes, tfds:NAME, folder:DIR, tokens:DIR, codes:DIR, ...
  name: DataName = ""
  train_split: str = "train"
  test_split: str = "test"  # of held-out images, where evaluation needs them
  # Where TFDS keeps its files; None: its default.
  data_dir: LocalPath | None = None
  flip: bool = False  # mirror each image with probability 1/2
  # Whether a training goes on although its data have changed since it began.
  accept_changed: bool = False


@dataclasses.dataclass(frozen=True)
class ComponentConfig:
  """A model of a family: its name, a published size, and what differs from it.

  In a config the fields of `config` stand beside `name`, as in
  `dict(name="pixels", levels=17)`.
  """

  kind: ClassVar[str]  # the package that holds the families

  name: str = ""  # a module of that package
  variant: str | None = None  # a key of its VARIANTS; None: Config's defaults
  config: Any = None  # the family's Config, complete


@dataclasses.dataclass(frozen=True)
class BackboneConfig(ComponentConfig):
  """The section `backbone`: the causal transformer that TensorAR wraps."""

  kind: ClassVar[str] = "backbones"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(ComponentConfig):
  """The section `tokenizer`: images to tokens and back."""

  kind: ClassVar[str] = "tokenizers"

  # A stage or checkpoint with its weights; None: fresh ones.
  init: LocalPath | None = None


@dataclasses.dataclass(frozen=True)
class ClassOptions:
  """Images are made from class labels."""

  num_classes: int = 1000


@dataclasses.dataclass(frozen=True)
class TextOptions:
  """Images are made from the features of a text."""

  width: int = 2048  # features of a text token
  length: int = 120  # tokens of a text
  encoder: PublishedPath = (
    ""  # "words", or the folder of a text encoder; "": none
  )
  encoder_dtype: str = "bfloat16"  # of the encoder's weights and computation


@dataclasses.dataclass(frozen=True)
class PromptOptions:
  """Images are made from the token ids of a prompt."""

  length: int = 256  # ids of a prompt at most
  vocab_size: int = 102400  # ids are below it
  encoder: PublishedPath = (
    ""  # the folder of the model, which has tokenizer.json
  )


CONDITIONINGS = {
  "class": ClassOptions,
  "text": TextOptions,
  "prompt": PromptOptions,
}


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
  """What images are made from; the options stand beside `name` in a config."""

  name: str = ""  # of CONDITIONINGS
  options: ClassOptions | TextOptions | PromptOptions | None = None

  @property
  def encoder(self) -> str:
    """Names what turns texts into conditions; "" where nothing does."""
    return getattr(self.options, "encoder", "")


@dataclasses.dataclass(frozen=True)
class TensorARConfig:
  """What TensorAR adds to a backbone; `method.tensorar.TensorAR` checks it."""

  window: int = 1  # k, tokens of a window; 1 is the base model itself
  depth: int = 1  # blocks in each of the two query transformers
  mlp_ratio: float = 0.25  # hidden units of their MLPs, in widths
  input_residual: bool = True  # add the embedding of a window's first token
  output_residual: str = "first"  # slots that get the hidden state added

  def __post_init__(self):
    checks.numbers(self, checks.COUNT, "window", "depth", where="tensorar.")
    checks.numbers(self, checks.POSITIVE, "mlp_ratio", where="tensorar.")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW with two learning rates; see `training.optimizer`."""

  learning_rate: float = 1e-4  # peak, of the new modules; without any, of all
  backbone_learning_rate: float | None = None  # peak; None: learning_rate
  schedule: str = "constant"  # or linear, or cosine, down to final_rate
  backbone_schedule: str | None = None  # None: as schedule
  warmup_steps: int = 0  # linear, from warmup_start
  warmup_start: float = 0.0  # at step 0, as a share of the peak
  final_rate: float = 0.0  # after the last step, as a share of the peak
  hold: float = 0.0  # share of the steps after the warm-up that keep the peak
  weight_decay: float = 0.05  # as in AdamW
  # A cosine leads from weight_decay to it; None: the decay is constant.
  final_weight_decay: float | None = None
  # Regular expression of the paths without decay; "" decays all. By default
  # norms, biases and gains (`gain` is [k, D], but no matrix).
  no_decay: str = r"(^|/)(scale|bias|gain|pad)$"
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  clip_norm: float = 1.0  # global gradient norm; 0 does not clip
  ema_decay: float = 0.0  # of the average of the weights; 0 keeps none

  def __post_init__(self):
    for schedule in (self.schedule, self.backbone_schedule or self.schedule):
      if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}: choose one of {SCHEDULES}.")
    sizes = ("learning_rate", "backbone_learning_rate", "weight_decay")
    sizes += ("final_weight_decay", "clip_norm", "warmup_steps")
    shares, rates = ("warmup_start", "final_rate"), ("hold", "ema_decay")
    for rule, names in (
      (checks.NOT_NEGATIVE, sizes),
      (checks.POSITIVE, ("eps",)),
      (checks.SHARE, shares),
      (checks.RATE, (*rates, "beta1", "beta2")),
    ):
      checks.numbers(self, rule, *names, where="optim.")
    try:
      re.compile(self.no_decay)
    except re.error as error:
      raise ValueError(
        f"optim.no_decay={self.no_decay!r}: expected a regular expression"
        f" ({error})."
      ) from error


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How long, how much at once, and how often to write."""

  batch_size: int = 256  # images of a step, over all devices
  num_steps: int = 1000
  log_every: int = 50  # steps
  checkpoint_every: int = 500  # steps
  keep: int = 2  # how many of the newest checkpoints stay
  keep_every: int = 0  # those at multiples of it stay as well; 0: none
  accumulate: int = 1  # parts of a batch, one after another, in less memory
  # What of the activations the backward pass computes again: "none", all but
  # the products with weights ("dots"), or "full", all.
  remat: str = "none"

  def __post_init__(self):
    if self.remat not in layers.REMAT:
      raise ValueError(
        f"train.remat={self.remat!r}: choose one of {tuple(layers.REMAT)}."
      )
    counts = ("batch_size", "num_steps", "log_every", "checkpoint_every")
    counts += ("keep", "accumulate")
    checks.numbers(self, checks.COUNT, *counts, where="train.")
    checks.numbers(self, checks.NOT_NEGATIVE, "keep_every", where="train.")
    if self.batch_size % self.accumulate:
      raise ValueError(
        f"train.batch_size={self.batch_size} is no multiple of"
        f" accumulate={self.accumulate}: a batch has equal parts."
      )
    if self.keep_every % self.checkpoint_every:
      raise ValueError(
        f"train.keep_every={self.keep_every} is no multiple of"
        f" checkpoint_every={self.checkpoint_every}: there would be no"
        " checkpoint to keep. Change one of them; keep_every=0 keeps none."
      )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """How the trained models are compared; see `evaluation.yardsticks`."""

  # "classifier": by the features and classes of a small classifier; "shapes":
  # by reading drawings back.
  yardstick: str = "classifier"
  classifier: str = "classifier"  # the stage that is the classifier
  models: tuple[str, ...] = ()  # the stages to compare
  # Scales of the scan; a tuple among them is one scale for each sub-token.
  guidance: tuple[Guidance, ...] = (1.0, 1.5, 2.0)
  scan_images: int = 500  # images for each scale of the scan
  num_images: int = 1000  # images for each seed; of prompts, one image of each
  seeds: int = 3  # sampling seeds
  batch_size: int = 250  # images sampled at once
  real_images: int = 10_000  # training images the classifier compares with
  held_out_images: int = 1000  # test images for the refinement diagnostics

  def __post_init__(self):
    images = ("scan_images", "num_images", "held_out_images")
    few = checks.Rule(
      f"10 to {checks.MAX_IMAGES:,}", lambda n: 10 <= n <= checks.MAX_IMAGES
    )
    checks.numbers(self, few, *images, where="evaluation.")
    counts = ("seeds", "batch_size", "real_images")
    checks.numbers(self, checks.COUNT, *counts, where="evaluation.")
    for scale in self.guidance:
      SamplingConfig(guidance=scale)  # says what is wrong with one
    if not self.models or not self.guidance:
      raise ValueError(
        f"evaluation.models={self.models}, guidance={self.guidance}: name at"
        " least one stage and one scale."
      )


@dataclasses.dataclass(frozen=True)
class AblationConfig:
  """Variants of one stage, each with a few values changed; see `ablations`.

  An axis is {"title", "rows", "source", "paper_base", "paper_base_seconds"}; a
  row is {"name", "change", "paper", "paper_seconds"}. `change` is
  [["section.key", value], ...]; `paper` and `paper_seconds` are the FID and the
  time that a paper prints, or None, and `paper_base` those of its base model.
  """

  data: str = ""  # what the data set is called; names the files of results
  # {name: axis}. On the command line: a Python literal.
  axes: dict = dataclasses.field(default_factory=dict)
  centre: str = "tensorar"  # the stage that every variant changes
  seeds: int = 1  # training seeds of each variant: 0, 1, ...

  def __post_init__(self):
    if self.seeds < 1 or not self.axes or not self.data:
      raise ValueError(
        f"ablation.data={self.data!r}, seeds={self.seeds},"
        f" axes={sorted(self.axes)}: expected a name, and at least one of each."
      )


@dataclasses.dataclass(frozen=True)
class Stage:
  """One model to train or import, with every section of its config."""

  name: str = ""  # of its folder in the work directory
  objective: str = "tensorar"  # what is trained: a key of OBJECTIVES
  seed: int = 0  # of initial weights, noise and the order of the data
  # Weights to start from: another stage or a checkpoint; None: fresh ones.
  init: LocalPath | None = None
  # Published file to import in place of training; None (or ""): train.
  source: PublishedPath | None = None
  # Its entry with the weights, such as "ema"; None (or ""): the first of
  # `torch_files.CONTAINERS`.
  source_key: str | None = None
  source_dtype: str | None = "float32"  # of imported weights; None: float32
  data: DataConfig = DataConfig()
  tokenizer: TokenizerConfig = TokenizerConfig()
  conditioning: ConditioningConfig = ConditioningConfig()
  backbone: BackboneConfig = BackboneConfig()
  tensorar: TensorARConfig = TensorARConfig()
  noise: NoiseConfig = NoiseConfig()  # on input windows in training
  loss: LossConfig = LossConfig()
  optim: OptimConfig = OptimConfig()
  train: TrainConfig = TrainConfig()
  sampling: SamplingConfig = SamplingConfig()  # how tokens are drawn
  # What arrays are split over; it may change from run to run.
  mesh: MeshConfig = MeshConfig()
  classifier: ClassifierConfig = ClassifierConfig()

  def __post_init__(self):
    choose("objective", self.objective, OBJECTIVES)
    checks.seed(self.seed)
    for field in (
      "init",
      "source",
      "source_key",
    ):  # "" on a command line is None
      object.__setattr__(self, field, getattr(self, field) or None)
    object.__setattr__(self, "source_dtype", self.source_dtype or "float32")

  @property
  def is_averaged(self) -> bool:
    """Says whether the stage is sampled with its averaged weights."""
    return not self.source and self.optim.ema_decay > 0

  @property
  def component(self) -> BackboneConfig | TokenizerConfig:
    """Returns what published files hold: the backbone, or the tokenizer."""
    if self.objective == "classifier":
      raise ValueError(
        f"stage {self.name!r} trains a classifier: only backbones and"
        " tokenizers are imported and exported."
      )
    return self.backbone if self.objective == "tensorar" else self.tokenizer


# What each objective's training depends on; other sections may change.
OBJECTIVES = {
  "tensorar": (
    "tokenizer",
    "conditioning",
    "backbone",
    "tensorar",
    "noise",
    "loss",
  ),
  "tokenizer": ("tokenizer",),
  "classifier": ("classifier",),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that a config holds."""

  name: str  # of the config file, without its suffix
  stages: Mapping[str, Stage]  # by name, parents first
  evaluation: EvaluationConfig | None = None
  ablation: AblationConfig | None = None
