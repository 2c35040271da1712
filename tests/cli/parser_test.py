"""Flags, help pages and errors of the command line, mode by mode."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from tensorar_jax.cli import config, parser
from tensorar_jax.cli.modes import MODES
from tensorar_jax.cli.options import Products, Shared, flags_of, summary
from tensorar_jax.parallel import chips
from tensorar_jax.performance import benchmark

ROOT = pathlib.Path(__file__).parents[2]
PUBLISHED = ROOT / "configs" / "published.py"  # what configs share
SHARED = flags_of(Shared)
ALL = [(mode, flag) for mode in MODES for flag in flags_of(MODES[mode].options)]
# A value of each kind, as written and as read.
VALUES = {int: ("3", 3), float: ("1.5", 1.5), str: ("a b=c", "a b=c")}
DIGITS = "--config=configs/digits.py"


def parse(*words):
  return parser.parse(words)


def page(capsys, *words):
  with pytest.raises(SystemExit) as ended:
    parse(*words)
  assert ended.value.code == 0
  return capsys.readouterr().out


# --- options ------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_option_is_documented(mode):
  options = MODES[mode].options
  assert options.__dataclass_params__.frozen
  assert summary(options).endswith(".") and len(summary(options)) < 80
  flags = flags_of(options)
  assert flags.keys() == {f.name for f in dataclasses.fields(options)}
  for name, flag in flags.items():
    assert len(flag.help.split()) > 1 and flag.help.endswith("."), name
    assert flag.default is None or "Default" not in flag.help, name


@pytest.mark.parametrize("mode, name", ALL)
def test_every_flag_is_read_as_its_field_says(mode, name):
  flag = flags_of(MODES[mode].options)[name]
  if flag.kind is bool:
    for words, want in (
      ([f"--{name}"], True),
      ([f"--no{name}"], False),
      ([f"--{name}=false"], False),
      ([f"--{name}", "true"], True),
    ):
      got = parse(DIGITS, f"--mode={mode}", *words).options
      assert getattr(got, name) is want
    return
  text, want = VALUES[flag.kind]
  if flag.choices:
    text = want = flag.choices[-1]
  if flag.is_list and not flag.repeat:
    text, want = f"{text},{text}", (want, want)
  for words in ([f"--{name}={text}"], [f"--{name}", text]):
    if flag.repeat:
      words, expected = 2 * words, (want, want)
    else:  # the last one counts
      words, expected = [f"--{name}={text}", *words], want
    got = parse(DIGITS, f"--mode={mode}", *words).options
    assert getattr(got, name) == expected


def test_defaults_are_those_of_the_dataclasses():
  command = parse(DIGITS)
  assert command.mode == "run" and command.overrides == {}
  assert command.options == MODES["run"].options(config="configs/digits.py")
  own = MODES["benchmark"].options()
  for field in dataclasses.fields(benchmark.Settings):
    assert getattr(own, field.name) == field.default, field.name


def test_values_of_the_config_are_kept_as_written():
  command = parse(
    "--mode",
    "train",
    DIGITS,
    "--config.a.b=1,2",
    "--config.c",
    "x y",
    "--config.d",
    "--noconfig.e",
    "--config.f=",
    "--config.a.b=3",
  )
  assert command.mode == "train"
  want = {"a.b": "3", "c": "x y", "d": "true", "e": "false", "f": ""}
  assert command.overrides == want


# --- help ---------------------------------------------------------------------


def test_help_lists_the_modes(capsys):
  text = page(capsys, "--help")
  for mode, entry in MODES.items():
    assert f"\n  {mode:<10} {summary(entry.options)[:30]}" in text
  assert "--mode=sample --help" in text
  assert text == parser.overview()


@pytest.mark.parametrize("mode", MODES)
def test_help_of_a_mode_shows_its_flags_and_an_example(mode, capsys):
  text = page(capsys, f"--mode={mode}", "--help")
  options = MODES[mode].options
  assert summary(options) in " ".join(text.split())
  own, shared = text.split("Flags of every mode:")
  for name, flag in flags_of(options).items():
    part = shared if name in SHARED else own
    assert f"\n  --{name} " in part, name
    if flag.default is not None and not flag.is_list:
      assert f"Default: {str(flag.default).lower()}" in " ".join(part.split())
  example = own.split("Example:\n")[1].split("\n\n")[0].replace("\\\n", " ")
  program, *words = example.split(" -m tensorar_jax.main ")
  assert program.split() == ["python"]
  assert parse(*words[0].split()).mode == mode


def test_help_and_wrong_flags_do_not_load_jax():
  code = (
    "import sys\nfrom tensorar_jax import main\n"
    "try: main.main(['main', *sys.argv[1:]])\n"
    "finally: assert not {'jax', 'numpy', 'flax'} & sys.modules.keys()"
  )
  for words in (["--help"], ["--mode=train", "--help"], ["--mode=x"]):
    done = subprocess.run(
      [sys.executable, "-c", code, *words],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    assert "AssertionError" not in done.stderr
    assert done.returncode == (words == ["--mode=x"]), done.stderr


# --- errors -------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_flag_of_another_mode_is_named_with_its_modes(mode):
  known = flags_of(MODES[mode].options)
  others = {name for _, name in ALL if name not in known}
  for name in others:
    with pytest.raises(ValueError) as caught:
      parse(DIGITS, f"--mode={mode}", f"--{name}=1")
    text = str(caught.value)
    assert text.startswith(
      f"--{name} with --mode={mode}: it belongs to --mode="
    )
    for home, entry in MODES.items():
      named = f"--mode={home} " in f"{text.split(':')[1][:-1]} ".replace(
        ",", " "
      )
      assert named == (name in flags_of(entry.options)), (name, home)


@pytest.mark.parametrize(
  "words, text",
  [
    (["--mode=train", "--resize=3"], "--mode=sample and --mode=evaluate."),
    (["--mode=train", "--nopngs"], "--nopngs with --mode=train: it belongs to"),
    (["--mode=sample", "--num_image=3"], "Did you mean --num_images"),
    (["--mode=sample", "--xyz"], "--xyz is unknown. --mode=sample --help"),
    (["--train.keep=3"], "is set with --config.train.keep=VALUE"),
    (["--mode=smaple"], "unknown. Did you mean sample"),
    (["train"], "'train' is no flag"),
    (["--num_images=x"], "--num_images: expected a whole number, got 'x'"),
    (["--num_images=0"], "--num_images: expected at least 1, got 0"),
    (["--mode=sample", "--classes=1,x"], "--classes: expected a whole number"),
    (
      ["--mode=sample", "--classes=dog"],
      "such as 207,360 (no names), got 'dog'",
    ),
    (["--mode=sample", "--pngs=maybe"], "expected true or false"),
    (["--mode=tokenize", "--recipe=centre"], "one of center, flip, ten_crop"),
    (["--workdir"], "--workdir: expected one argument"),
  ],
)
def test_what_is_wrong_is_said_in_one_line(words, text):
  with pytest.raises(ValueError) as caught:
    parse(DIGITS, *words)
  assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_mode_without_a_config_says_what_it_needs():
  for mode in MODES:
    with pytest.raises(ValueError, match=f"--mode={mode} needs --config=FILE"):
      parse(f"--mode={mode}")
  assert parse("--mode=evaluate", "--scores=x").options.scores == "x"
  with pytest.raises(ValueError, match="takes --samples=FILE.npz or --scores"):
    parse("--mode=evaluate")


# --- the config ---------------------------------------------------------------


def test_values_of_the_config_are_changed():
  values = config.read(
    str(ROOT / "configs" / "digits.py"),
    {"train.batch_size": "3", "stages.base.train.num_steps": "5"},
  )
  assert values.stages["base"].train.batch_size == 3
  assert values.stages["base"].train.num_steps == 5


def test_a_missing_config_lists_the_configs():
  for name in ("digts.py", "digts.py:x"):
    with pytest.raises(ValueError) as caught:
      config.read(str(ROOT / "configs" / name), {})
    for path in {*(ROOT / "configs").glob("*.py")} - {PUBLISHED}:
      assert str(path) in str(caught.value)
    assert "Did you mean" in str(caught.value)


@pytest.mark.parametrize(
  "name, overrides, words",
  [
    ("digits.py", {"backbone.wdith": "3"}, "Did you mean 'width'"),
    ("digits.py", {"backbone.width": "x"}, "backbone.width='x'"),
    ("digits.py:x", {}, "'x' after a colon: expected nothing"),
    ("ablations/all.py:x", {}, "data set 'x'"),
  ],
)
def test_a_bad_config_is_one_line(name, overrides, words):
  with pytest.raises(ValueError) as caught:
    config.read(str(ROOT / "configs" / name), overrides)
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_precision_is_of_every_mode_that_computes():
  modes = {
    m for m, entry in MODES.items() if issubclass(entry.options, Products)
  }
  assert set(MODES) - modes == {"import", "export", "visualize"}
  choices = flags_of(MODES["run"].options)["precision"].choices
  assert choices == tuple(chips.PRECISIONS)
