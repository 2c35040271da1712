"""Files of a benchmark's scorer -> metrics.json and a table's row."""

from __future__ import annotations

import pathlib

from tensorar_jax.checkpoints import resumable
from tensorar_jax.checkpoints.files import sha256, write_json, write_text
from tensorar_jax.evaluation import dpg, geneval, papers, tables
from tensorar_jax.evaluation.prompt_scores import BENCHMARKS, RESAMPLES

SPREAD = (
  f"std and the 95 % interval are of {RESAMPLES} resamples of the"
  " prompts, each with all of its images."
)


def summarise(
  path: pathlib.Path, questions: pathlib.Path | None, folder: pathlib.Path
) -> dict:
  """The record of a scorer's file, as in `folder/metrics.json`.

  Args:
    path: a .jsonl file of GenEval or a .txt file of DPG-Bench.
    questions: the csv of DPG-Bench, for intervals of the categories.
    folder: of metrics.json and metrics.md; ValueError if it is of other scores.
  """
  kinds = {".jsonl": "geneval", ".txt": "dpg"}
  if path.suffix not in kinds:
    raise ValueError(
      f"--scores={path}: expected the .jsonl file of GenEval's scorer or the"
      " .txt file of DPG-Bench's."
    )
  if path.suffix == ".jsonl" and questions:
    raise ValueError("--questions goes with the .txt file of DPG-Bench.")
  files = [path] if questions is None else [path, questions]
  for file in files:
    if not file.is_file():
      raise ValueError(f"{file}: there is no such file.")
  try:
    if path.suffix == ".jsonl":
      scores = geneval.read_scores(path)
    else:
      scores = dpg.read_scores(path, questions)
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not text in UTF-8 ({error}).") from error
  settings = {
    "scores": [{"file": f.name, "sha256": sha256(f)} for f in files],
  }
  done = folder / "metrics.json"
  if done.exists() and not (folder / resumable.SETTINGS).exists():
    raise ValueError(
      f"{done} is there already, and not of these scores: name a new --output."
    )
  resumable.claim_settings(folder, settings, "scores")
  record = {
    "benchmark": scores.benchmark,
    "metrics": scores.metrics(),
    "num_prompts": scores.num_prompts,
    "num_images": scores.num_images,
    "complete": not scores.missing,
    "missing": scores.missing,
    "published_overall": papers.OVERALL[scores.benchmark],
    "settings": settings,
    "notes": [*BENCHMARKS[scores.benchmark].notes, SPREAD],
  }
  write_json(done, record)
  write_text(folder / "metrics.md", table(path.stem, record) + "\n")
  return record


def table(name: str, record: dict) -> str:
  """The row of a record, under its name, above those of the papers."""
  benchmark = BENCHMARKS[record["benchmark"]]
  columns = (*benchmark.categories, "overall")
  heads = [column.replace("_", " ") for column in columns]
  name = name if record["complete"] else f"{name} (incomplete)"
  numbers = [
    tables.with_interval(record["metrics"].get(column), benchmark.decimals)
    for column in columns
  ]
  rows = [
    [benchmark.title, "prompts", "images", *heads],
    [name, f"{record['num_prompts']:,}", f"{record['num_images']:,}", *numbers],
  ]
  for other, value in papers.OVERALL[record["benchmark"]].items():
    rows.append([other, *[""] * (len(heads) + 1), f"{value:.2f}"])
  incomplete = [f"\nIncomplete: {what}." for what in record["missing"]]
  return "\n".join([tables.markdown(rows), *incomplete])
