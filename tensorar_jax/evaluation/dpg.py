"""DPG-Bench (Hu et al., arXiv:2403.05135): the files that its scorer writes.

The scorer, `compute_dpg_bench.py`, cuts the picture of a prompt into its images
(in the order top left, top right, bottom left, bottom right) and asks a
vision-language model the item's questions about each. The questions form a
graph: if the answer to one is no, all that depend on it count as no. The score
of an image is its share of yes; the overall score is the mean over images and
prompts.

The scorer writes two files: NAME.txt with the scores of every image and a
summary, and NAME_detail.txt with the answers. From the answers and the csv of
the questions, all scores are computed here again. Categories are defined as the
scorer defines them: by the answers about the last image, as they were given.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tensorar_jax.evaluation.prompt_scores import (
  BENCHMARKS,
  PromptScores,
  read_lines,
)

CATEGORIES = BENCHMARKS["dpg"].categories
PROMPTS = 1065
IMAGES = 4
TOLERANCE = 1e-6  # between printed and computed scores

_NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"
_IMAGE = re.compile(rf"(.+?)((?:, {_NUMBER}){{2,}})")
_ANSWER = re.compile(r"(.+), \((\d+), (\d+), \d+, \d+\), (.+), (.*)")
_SUMMARY = re.compile(rf"(\t?[\w -]+): ({_NUMBER})")

Answers = dict[tuple[int, int], dict[str, bool]]  # by image, at (top, left)


@dataclasses.dataclass(frozen=True)
class Question:
  """A row of the csv; the parents are numbers of other questions."""

  number: int
  parents: tuple[int, ...]
  category: str
  text: str


def read_questions(path: pathlib.Path) -> dict[str, list[Question]]:
  """The questions of each item, in the order of the csv."""
  questions = collections.defaultdict(list)
  with path.open(encoding="utf-8-sig", newline="") as lines:
    for number, row in enumerate(csv.DictReader(lines), 1):
      try:
        parents = [int(parent) for parent in row["dependency"].split(",")]
        question = Question(
          int(row["proposition_id"]),
          tuple(parent for parent in parents if parent),
          re.split(r"[-(]", row["tuple"])[0].strip(),
          row["question_natural_language"],
        )
      except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
          f"{path}, question {number}: {error!r}; expected the columns item_id,"
          " proposition_id, dependency (numbers with commas, 0 for none), tuple"
          " and question_natural_language."
        ) from error
      if question.category not in CATEGORIES:
        raise ValueError(
          f"{path}, question {number}: tuple {row['tuple']!r}; expected it to"
          f" start with one of {CATEGORIES}."
        )
      questions[row["item_id"]].append(question)
  if not questions:
    raise ValueError(f"{path} holds no questions.")
  return dict(questions)


def zeroed(
  answers: Mapping[int, bool], questions: Sequence[Question]
) -> dict[int, bool]:
  """The answers, with a no for every question that depends on a no.

  Questions are taken in the given order, so a no reaches the children of
  children if they come later.
  """
  answers = dict(answers)
  for question in questions:
    if not all(answers[parent] for parent in question.parents):
      answers[question.number] = False
  return answers


def read_scores(
  path: pathlib.Path, questions: pathlib.Path | None = None
) -> PromptScores:
  """Reads the scorer's results; ValueError for other files.

  Args:
    path: NAME.txt. From it alone, categories have no interval.
    questions: the csv. With it NAME_detail.txt is read, too; a ValueError if
      its answers do not give the scores of NAME.txt.
  """
  images, printed = _read_images(path)
  means = np.array([np.mean(scores) for scores in images.values()])
  _agree(path, "the overall score", printed.get("overall"), 100 * means.mean())
  categories, expected = {}, PROMPTS
  if questions:
    known = read_questions(questions)
    detail = path.with_name(path.name.replace(".txt", "_detail.txt"))
    answers = _read_answers(detail)
    categories, expected = _recount(detail, images, answers, known), len(known)
    printed = {}
  missing = []
  if len(images) != expected or expected != PROMPTS:
    missing.append(f"{len(images)} of {max(expected, PROMPTS)} prompts")
  odd = sum(len(scores) != IMAGES for scores in images.values())
  if odd:
    missing.append(f"prompts without {IMAGES} images: {odd}")
  return PromptScores(
    benchmark="dpg",
    categories=categories,
    overall=(means, np.ones(len(means))),
    num_images=sum(map(len, images.values())),
    missing=missing,
    extra={name: printed[name] / 100 for name in CATEGORIES if name in printed},
  )


def _item(image: str) -> str:
  """The id of an item as the scorer has it: up to the first dot."""
  return re.split(r"[/\\]", image)[-1].split(".")[0]


def _read_images(
  path: pathlib.Path,
) -> tuple[dict[str, list[float]], dict[str, float]]:
  """The scores of the images of each item; the summary, in percent."""
  images, printed, summary = {}, {}, False
  for number, line in enumerate(read_lines(path), 1):
    summary = summary or line.startswith("Model: ")
    match = (_SUMMARY if summary else _IMAGE).fullmatch(line)
    if summary:
      if match:
        name = match[1].strip().replace("DPG-Bench score", "overall")
        printed.setdefault(name, float(match[2]))
      continue
    if not match:
      raise ValueError(
        f"{path}, line {number}: {line[:60]!r}; expected the scorer's IMAGE,"
        " SCORE, ..., MEAN."
      )
    *scores, mean = map(float, match[2][2:].split(", "))
    _agree(f"{path}, line {number}", "the mean", mean, float(np.mean(scores)))
    if _item(match[1]) in images:
      raise ValueError(f"{path}, line {number}: {match[1]} is there twice.")
    images[_item(match[1])] = scores
  if not images:
    raise ValueError(f"{path} holds no scores: expected those of DPG-Bench.")
  return images, printed


def _agree(where: Any, what: str, printed: float | None, value: float) -> None:
  if printed is not None and abs(printed - value) > TOLERANCE * max(1, value):
    raise ValueError(
      f"{where}: {what} is {printed}, but the scores give {value}: the file is"
      " damaged, or of several runs; score again."
    )


def _read_answers(path: pathlib.Path) -> dict[str, Answers]:
  """The answers about each image of an item."""
  if not path.exists():
    raise ValueError(
      f"{path} is missing: the scorer writes it beside its results; without it"
      " leave --questions out."
    )
  answers: dict[str, Answers] = collections.defaultdict(
    lambda: collections.defaultdict(dict)
  )
  for number, line in enumerate(read_lines(path), 1):
    match = _ANSWER.fullmatch(line)
    if not match:
      raise ValueError(
        f"{path}, line {number}: {line[:60]!r}; expected the scorer's IMAGE,"
        " (LEFT, TOP, RIGHT, BOTTOM), QUESTION, ANSWER."
      )
    corner = int(match[3]), int(match[2])
    answers[_item(match[1])][corner][match[4]] = match[5] == "yes"
  return answers


def _recount(
  path: pathlib.Path,
  images: Mapping[str, Sequence[float]],
  answers: Mapping[str, Answers],
  known: Mapping[str, list[Question]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """(sum, count) of the answers by category and item.

  ValueError if the answers do not give the scores of the images.
  """
  first = next(iter(known))
  totals = collections.defaultdict(lambda: ([], []))
  for item, scores in images.items():
    questions = known.get(item, [])
    given = [answers[item][corner] for corner in sorted(answers.get(item, ()))]
    # The scorer leaves the first row of the csv out.
    if item == first and given and questions[0].text not in given[0]:
      questions = questions[1:]
    numbers = {q.number for q in questions}
    unknown = any(not numbers.issuperset(q.parents) for q in questions)
    unasked = any(q.text not in image for image in given for q in questions)
    if not questions or unknown or unasked:
      raise ValueError(
        f"{path} and the csv differ in the questions of {item!r}: expected the"
        " answers to all of them, of the run of the results."
      )
    by_image = [{q.number: image[q.text] for q in questions} for image in given]
    computed = [
      np.mean(list(zeroed(image, questions).values())) for image in by_image
    ]
    same_length = len(computed) == len(scores)
    if not same_length or not np.allclose(computed, scores, atol=1e-6):
      raise ValueError(
        f"{path}: the answers about {item!r} give the scores {computed}, but"
        f" the results say {scores}: expected the files of one run."
      )
    for category in {q.category for q in questions}:
      asked = [q.number for q in questions if q.category == category]
      sums, counts = totals[category]
      sums.append(sum(by_image[-1][number] for number in asked))
      counts.append(len(asked))
  return {
    name: (np.array(totals[name][0], float), np.array(totals[name][1], float))
    for name in CATEGORIES
    if name in totals
  }
