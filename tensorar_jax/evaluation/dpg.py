"""DPG-Bench (Hu et al., arXiv:2403.05135): the files that its scorer writes.

The scorer, `compute_dpg_bench.py`, cuts the picture of a prompt up into its
images, in the order top left, top right, bottom left, bottom right, and puts
the item's questions to a model that sees. They form a graph: a question counts
as answered by no if one that it depends on does. Of an image the score is the
share of questions with a yes, and the overall score the mean over images and
prompts.

Two files come of it: NAME.txt with the scores of every image and a summary, and
NAME_detail.txt with the answers, from which, with the csv of the questions, all
of that is computed here once more. The categories are the scorer's as well: the
answers about the last image, as they were given.
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
  TABLES,
  PromptScores,
  read_lines,
)

CATEGORIES = TABLES["dpg"][0]
PROMPTS = 1065
IMAGES = 4
TOLERANCE = 1e-6  # between what is printed and what is computed

_NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"
_IMAGE = re.compile(rf"(.+?)((?:, {_NUMBER}){{2,}})")
_ANSWER = re.compile(r"(.+), \((\d+), (\d+), \d+, \d+\), (.+), (.*)")
_SUMMARY = re.compile(rf"(\t?[\w -]+): ({_NUMBER})")

Answers = dict[tuple[int, int], dict[str, bool]]  # of the image at (y, x)


@dataclasses.dataclass(frozen=True)
class Question:
  """A row of the csv; the parents are numbers of other questions."""

  number: int
  parents: tuple[int, ...]
  category: str
  text: str


def read_questions(path: pathlib.Path) -> dict[str, list[Question]]:
  """The questions of each item, in the order of the csv."""
  found = collections.defaultdict(list)
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
      found[row["item_id"]].append(question)
  if not found:
    raise ValueError(f"{path} holds no questions.")
  return dict(found)


def zeroed(
  answers: Mapping[int, bool], questions: Sequence[Question]
) -> dict[int, bool]:
  """The answers, no where a question depends on a no, in the given order.

  So a no goes on to the children of children, if they come later.
  """
  found = dict(answers)
  for question in questions:
    if not all(found[parent] for parent in question.parents):
      found[question.number] = False
  return found


def read_scores(
  path: pathlib.Path, questions: pathlib.Path | None = None
) -> PromptScores:
  """What the scorer has written, NAME.txt; ValueError for other files.

  Args:
    path: NAME.txt. Categories have no interval from it alone.
    questions: the csv. Then NAME_detail.txt is read too; if its answers do not
      make the scores of NAME.txt, that is a ValueError.
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
  """As the scorer has it: up to the first dot."""
  return re.split(r"[/\\]", image)[-1].split(".")[0]


def _read_images(
  path: pathlib.Path,
) -> tuple[dict[str, list[float]], dict[str, float]]:
  """The scores of the images of each item; the summary, in percent."""
  images, printed, summary = {}, {}, False
  for number, line in enumerate(read_lines(path), 1):
    summary = summary or line.startswith("Model: ")
    found = (_SUMMARY if summary else _IMAGE).fullmatch(line)
    if summary:
      if found:
        name = found[1].strip().replace("DPG-Bench score", "overall")
        printed.setdefault(name, float(found[2]))
      continue
    if not found:
      raise ValueError(
        f"{path}, line {number}: {line[:60]!r}; expected the scorer's IMAGE,"
        " SCORE, ..., MEAN."
      )
    *scores, mean = map(float, found[2][2:].split(", "))
    _agree(f"{path}, line {number}", "the mean", mean, float(np.mean(scores)))
    if _item(found[1]) in images:
      raise ValueError(f"{path}, line {number}: {found[1]} is there twice.")
    images[_item(found[1])] = scores
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
  """What was answered about each image of an item."""
  if not path.exists():
    raise ValueError(
      f"{path} is missing: the scorer writes it beside its results; without it"
      " leave --questions out."
    )
  answers: dict[str, Answers] = collections.defaultdict(
    lambda: collections.defaultdict(dict)
  )
  for number, line in enumerate(read_lines(path), 1):
    found = _ANSWER.fullmatch(line)
    if not found:
      raise ValueError(
        f"{path}, line {number}: {line[:60]!r}; expected the scorer's IMAGE,"
        " (LEFT, TOP, RIGHT, BOTTOM), QUESTION, ANSWER."
      )
    place = int(found[3]), int(found[2])
    answers[_item(found[1])][place][found[4]] = found[5] == "yes"
  return answers


def _recount(
  path: pathlib.Path,
  images: Mapping[str, Sequence[float]],
  answers: Mapping[str, Answers],
  known: Mapping[str, list[Question]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """(sum, count) of the answers by category and item; compares the scores."""
  first = next(iter(known))
  totals = collections.defaultdict(lambda: ([], []))
  for item, scores in images.items():
    own = known.get(item, [])
    given = [answers[item][at] for at in sorted(answers.get(item, ()))]
    # The scorer leaves the first row of the csv out.
    if item == first and given and own[0].text not in given[0]:
      own = own[1:]
    numbers = {q.number for q in own}
    unknown = any(not numbers.issuperset(q.parents) for q in own)
    unasked = any(q.text not in one for one in given for q in own)
    if not own or unknown or unasked:
      raise ValueError(
        f"{path} and the csv differ in the questions of {item!r}: expected the"
        " answers to all of them, of the run of the results."
      )
    by_image = [{q.number: one[q.text] for q in own} for one in given]
    found = [np.mean(list(zeroed(one, own).values())) for one in by_image]
    if len(found) != len(scores) or not np.allclose(found, scores, atol=1e-6):
      raise ValueError(
        f"{path}: the answers about {item!r} give the scores {found}, but the"
        f" results say {scores}: expected the files of one run."
      )
    for category in {q.category for q in own}:
      asked = [q.number for q in own if q.category == category]
      sums, counts = totals[category]
      sums.append(sum(by_image[-1][number] for number in asked))
      counts.append(len(asked))
  return {
    name: (np.array(totals[name][0], float), np.array(totals[name][1], float))
    for name in CATEGORIES
    if name in totals
  }
