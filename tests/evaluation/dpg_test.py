"""DPG-Bench: prompt folders, grids of images, the table of its scores."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from tensorar_jax.evaluation import dpg, summary
from tensorar_jax.generation import requests
from tensorar_jax.generation.layouts import LAYOUTS


@pytest.fixture(scope="module")
def layouts(parity):
  return parity / "evaluation" / "layouts"


@pytest.fixture(scope="module")
def expected(layouts):
  return json.loads((layouts / "layouts_expected.json").read_text())


def write_run(folder, layouts, expected):
  """The two files that the scorer writes of the fixture's answers."""
  known = dpg.read_questions(layouts / "dpg_toy.csv")
  size = expected["dpg_grid_resolution"]
  scores, details, means = [], [], []
  for item, one in expected["dpg_toy"].items():
    image = f"/a, b (1, 2)/{item}.png"
    corners = [c["box_left_upper_right_lower"] for c in crops(expected, item)]
    assert corners[1] == [size, 0, 2 * size, size]
    for box, answers in zip(corners, one["answers_per_crop"], strict=True):
      for question in known[item]:
        answer = "yes" if answers[str(question.number)] else "no"
        place = tuple(box)
        details.append(f"{image}, {place}, {question.text}, {answer}")
    own = [crop["sequential"] for crop in one["score_per_crop"]]
    means.append(one["score_sequential"])
    scores.append(", ".join(map(str, [image, *own, means[-1]])))
  total = 100 * np.mean(means)
  scores += ["Model: toy", "L1 category scores:", "\tentity: 61.5"]
  scores += ["L2 category scores:", "\tentity - whole: 70.0", "Image path: /a"]
  scores += [f"DPG-Bench score: {total}"]
  (folder / "r.txt").write_text("\n".join(scores) + "\n")
  (folder / "r_detail.txt").write_text("\n".join(details) + "\n")
  return folder / "r.txt"


def crops(expected, item):
  return expected["dpg_crops"][item]


def test_the_grids_are_cut_as_in_the_fixture(layouts, expected):
  size = expected["dpg_grid_resolution"]
  for item, boxes in expected["dpg_crops"].items():
    with Image.open(layouts / "dpg_example" / f"{item}.png") as picture:
      grid = np.asarray(picture)
    images = []
    for one in boxes:
      left, upper, right, lower = one["box_left_upper_right_lower"]
      images.append(grid[upper:lower, left:right])
      assert images[-1].shape[:2] == (size, size)
      assert images[-1].sum(dtype=int) == one["pixel_sum"]
    (made,) = LAYOUTS["dpg"].contents(item, np.stack(images))
    np.testing.assert_array_equal(made, grid)
    (alone,) = LAYOUTS["dpg"].contents(item, images[0][None])
    np.testing.assert_array_equal(alone, images[0])
    assert LAYOUTS["dpg"].names(5, item, 4) == [f"{item}.png"]


def test_every_text_file_is_a_prompt(tmp_path):
  (tmp_path / "b.txt").write_text("two\ndogs  \n")
  (tmp_path / "10.txt").write_text("\ufeffa cat")
  (tmp_path / "README.md").write_text("no prompt")
  (tmp_path / "._b.txt").write_bytes(b"\0\5\x16\7")  # a Mac's
  os.mkfifo(tmp_path / "pipe.txt")
  prompts, sources = requests.read_prompts(tmp_path, "dpg")
  assert (prompts, sources) == (("a cat", "two dogs"), ("10", "b"))
  options = dict(prompts=prompts, layout="dpg", sources=sources)
  assert requests.Request(1, **options).names(range(1, 2)) == ["b.png"]
  with pytest.raises(ValueError, match=r"num_images=3: .*\(1, 4\)"):
    requests.Request(3, **options)
  with pytest.raises(ValueError, match="needs --prompts"):
    requests.Request(4, prompts=prompts, layout="dpg")


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.md", b"a cat", "expected a folder of .txt"),
    ("a.txt", b" \n", "a.txt is empty"),
    ("a.txt", b"\xff", "a.txt is not text in UTF-8"),
    ("a.txt", b"a\0", "a.txt, prompt 0 holds the control"),
    ("a.b.txt", b"a cat", "a.b.txt has a dot in its id"),
    (os.fsdecode(b"\xe9.txt"), b"a cat", "name 0: .* is no text in UTF-8"),
  ],
)
def test_prompt_folders_that_are_refused(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    requests.read_prompts(tmp_path, "dpg")


def test_a_no_goes_on_to_all_that_depends_on_it(layouts, expected):
  """As the scorer counts, and as it would if a no went one step only."""
  known = dpg.read_questions(layouts / "dpg_toy.csv")
  assert known.keys() == expected["dpg_toy"].keys()
  totals = {"sequential": [], "parents_unmodified": []}
  for item, one in expected["dpg_toy"].items():
    parents = {str(q.number): list(q.parents) or [0] for q in known[item]}
    assert parents == one["dependency"]
    means = {"sequential": [], "parents_unmodified": []}
    pairs = zip(one["answers_per_crop"], one["score_per_crop"], strict=True)
    for answers, want in pairs:
      answers = {int(number): bool(a) for number, a in answers.items()}
      found = dpg.zeroed(answers, known[item])
      steps = [dpg.zeroed(answers, [q])[q.number] for q in known[item]]
      scores = {
        "sequential": np.mean(list(found.values())),
        "parents_unmodified": np.mean(steps),
      }
      assert scores == pytest.approx(want, abs=1e-12)
      for kind, score in scores.items():
        means[kind].append(score)
    for kind, values in means.items():
      totals[kind].append(np.mean(values))
      assert totals[kind][-1] == pytest.approx(one[f"score_{kind}"], abs=1e-12)
  overall = {kind: 100 * np.mean(values) for kind, values in totals.items()}
  assert overall == pytest.approx(expected["dpg_toy_overall_percent"])


def test_the_scores_of_the_fixture(layouts, expected, tmp_path):
  scores = write_run(tmp_path, layouts, expected)
  alone = summary.summarise(scores, None, tmp_path / "alone")
  record = summary.summarise(scores, layouts / "dpg_toy.csv", tmp_path / "out")
  want = expected["dpg_toy_overall_percent"]["sequential"]
  for one in (alone, record):
    assert one["metrics"]["overall"]["value"] == pytest.approx(want)
    low, high = one["metrics"]["overall"]["interval"]
    assert 16 < low < want < high < 81
    assert (one["num_prompts"], one["num_images"]) == (3, 12)
    assert one["missing"] == ["3 of 1065 prompts"]
  # Of the last image alone, as given: 5 of 5, 4 of 6, 3 of 6 questions.
  assert record["metrics"]["entity"]["value"] == pytest.approx(1200 / 17)
  assert len(record["metrics"]["entity"]["interval"]) == 2
  assert alone["metrics"]["entity"] == {"value": 61.5}
  table = summary.table("ours", record)
  assert "| global | entity | attribute | relation | other | overall |" in table
  assert "| ours (incomplete) | 3 | 12 |  | 70.59 [" in table
  assert "| 73.33 |" in table and "Incomplete: 3 of 1065 prompts." in table


def test_the_first_row_that_the_scorer_skips(layouts, expected, tmp_path):
  """A new first question without children is not asked, and not missed."""
  scores = write_run(tmp_path, layouts, expected)
  text = (layouts / "dpg_toy.csv").read_text()
  row = 'partiprompts19,"t",,9,"0",entity,whole,entity - whole (x),Is it?'
  head, rest = text.split("\n", 1)
  (tmp_path / "q.csv").write_text(f"{head}\n{row}\n{rest}")
  summary.summarise(scores, tmp_path / "q.csv", tmp_path / "out")
  (tmp_path / "q.csv").write_text(f"{text.rstrip()}\n{row}\n")
  with pytest.raises(ValueError, match="differ in the questions of 'partip"):
    summary.summarise(scores, tmp_path / "q.csv", tmp_path / "out")


@pytest.mark.parametrize(
  ("name", "old", "new", "message"),
  [
    ("r.txt", "19.png, 0.6, ", "19.png, 0.7, ", "line 1: the mean is 0.8"),
    ("r.txt", "score: 51", "score: 50", "the overall score is 50"),
    ("r.txt", "7.png", "partiprompts19.png", "line 3: .* is there twice"),
    ("r.txt", "Model: toy", "toy", "line 4: 'toy'; expected the scorer's"),
    (
      "r_detail.txt",
      "thing5?, yes",
      "thing5?, no",
      "expected the files of one",
    ),
    ("r_detail.txt", "thing5?", "thing8?", "differ in the questions"),
    ("r_detail.txt", "8), Is", "Is", "line 1: .*expected the scorer's IMAGE"),
    ("q.csv", "dependency", "parents", "question 1: KeyError.*'dependency'"),
    ("q.csv", '"1,2"', '"1,b"', "question 3: ValueError"),
    ("q.csv", '"1,2"', '"1,9"', "differ in the questions"),
    ("q.csv", "entity - ", "thing - ", "question 1: tuple 'thing - whole"),
  ],
)
def test_files_that_are_refused(
  layouts, expected, tmp_path, name, old, new, message
):
  scores = write_run(tmp_path, layouts, expected)
  shutil.copyfile(layouts / "dpg_toy.csv", tmp_path / "q.csv")
  text = (tmp_path / name).read_text()
  assert old in text
  (tmp_path / name).write_text(text.replace(old, new))
  with pytest.raises(ValueError, match=message):
    summary.summarise(scores, tmp_path / "q.csv", tmp_path / "out")
  assert not (tmp_path / "out").exists()
