"""GenEval: prompt files, the folders of its scorer, the table of its scores."""

import json

import numpy as np
import pytest
from PIL import Image

from tensorar_jax.evaluation import geneval, papers, summary
from tensorar_jax.generation import requests

LINE = '{"tag": "colors", "prompt": "a red cat"}'


@pytest.fixture(scope="module")
def layouts(parity):
  return parity / "evaluation" / "layouts"


def test_the_folders_are_those_of_the_fixture(layouts, tmp_path):
  example = layouts / "geneval_example"
  lines = [
    (p / "metadata.jsonl").read_text() for p in sorted(example.iterdir())
  ]
  file = tmp_path / "evaluation_metadata.jsonl"
  file.write_text("\n".join(lines) + "\n")
  prompts, sources = requests.read_prompts(file, "geneval")
  assert prompts[1] == "a photo of two clocks" and sources == tuple(lines)
  asked = requests.Request(
    4, prompts=prompts, layout="geneval", sources=sources
  )
  found = {}
  for number in range(3):
    pictures = sorted((example / f"{number:05d}" / "samples").iterdir())
    images = np.stack([np.asarray(Image.open(p)) for p in pictures])
    part = range(4 * number, 4 * number + 4)
    found |= zip(asked.names(part), asked.contents(part, images), strict=True)
  want = {str(p.relative_to(example)): p for p in example.rglob("*.*")}
  assert found.keys() == want.keys() and len(want) == 18
  for name, path in want.items():
    content = found[name]
    if path.suffix == ".jsonl":
      assert content == path.read_text()
    else:
      np.testing.assert_array_equal(content, np.asarray(Image.open(path)))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (LINE + "\n{nothing}\n", "line 2 is not JSON"),
    (LINE + '\n{"tag": "colors"}\n', "line 2: .* the key 'prompt'"),
    ('{"prompt": "a cat"}', "line 1: .* the key 'tag'"),
    ("[1]", "line 1: expected an object"),
    ('{"tag": "colors", "prompt": " "}', "line 1: the prompt is empty"),
    (f"{LINE}\n\n{LINE}", "line 2 is empty"),
    (f"{LINE}\n{LINE}", "line 2 is line 1 again"),
    (b"\xff\xfe", "not text in UTF-8"),
    (
      f'{LINE}\n{{"tag": "colors", "prompt": "a \\ud83d"}}',
      "line 2: the prompt .* is no text in UTF-8",
    ),
    ('{"tag": ' + "1" * 5000 + "}", "line 1 is not JSON .Exceeds the limit"),
    ("", "is empty"),
  ],
)
def test_prompt_files_that_are_refused(tmp_path, content, message):
  content = content if isinstance(content, bytes) else content.encode()
  (tmp_path / "p").write_bytes(content)
  with pytest.raises(ValueError, match=message):
    requests.read_prompts(tmp_path / "p", "geneval")


def test_the_scores_of_the_fixture(layouts, tmp_path):
  expected = json.loads((layouts / "layouts_expected.json").read_text())
  expected = expected["geneval_toy_expected"]
  scores = layouts / "geneval_toy_results.jsonl"
  record = summary.summarise(scores, None, tmp_path / "out")
  assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == record
  values = {name: one["value"] for name, one in record["metrics"].items()}
  assert values == pytest.approx(
    {
      "correct_images": expected["correct_images"],
      "correct_prompts": expected["correct_prompts_any"],
      "overall": expected["overall_mean_over_tasks"],
      **{geneval.NAMES[t]: v for t, v in expected["task_scores"].items()},
    },
    abs=1e-12,
  )
  assert record["num_images"] == expected["total_images"]
  assert record["num_prompts"] == expected["total_prompts"]
  assert not record["complete"]
  assert "single_object: 3 of 80 prompts" in record["missing"]
  table = (tmp_path / "out" / "metrics.md").read_text()
  assert "| single object | two objects | counting | colors | posit" in table
  row = next(line for line in table.splitlines() if "toy_results" in line)
  assert "(incomplete) | 18 | 72 | 0.333 [" in row and "| 0.465 [" in row
  assert "| LlamaGen with TensorAR, published" in table and "| 0.61 |" in table
  assert papers.OVERALL["geneval"]["Janus-Pro-7B, published"] == 0.8


def result(tag: str, prompt: int, image: int, correct: bool) -> str:
  name = f"{tag}-{prompt:03d}/samples/{image:05d}.png"
  found = dict(filename=name, tag=tag, correct=correct)
  return json.dumps(found | {"metadata": f"{tag} {prompt}"})


def test_a_complete_file_and_its_spread(tmp_path):
  """Of prompts: four equal images of each say no more than one."""
  lines = [
    result(tag, prompt, image, prompt % 2 == 0)
    for tag, count in geneval.TAGS.items()
    for prompt in range(count)
    for image in range(4)
  ]
  (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")
  record = summary.summarise(tmp_path / "all.jsonl", None, tmp_path / "out")
  assert record["complete"] and record["num_prompts"] == 553
  metrics = record["metrics"]
  for name, count in zip(geneval.NAMES.values(), geneval.TAGS.values()):
    assert metrics[name]["std"] == pytest.approx(0.5 / count**0.5, rel=0.1)
  counts = np.array(list(geneval.TAGS.values()))
  error = 0.5 * (1 / counts).sum() ** 0.5 / 6
  assert metrics["overall"]["std"] == pytest.approx(error, rel=0.1)
  low, high = metrics["overall"]["interval"]
  assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
  # The same file again is the same, another one is refused.
  again = summary.summarise(tmp_path / "all.jsonl", None, tmp_path / "out")
  assert again == record
  (tmp_path / "all.jsonl").write_text("\n".join(lines[1:]))
  with pytest.raises(ValueError, match="holds other scores"):
    summary.summarise(tmp_path / "all.jsonl", None, tmp_path / "out")
  fewer = summary.summarise(tmp_path / "all.jsonl", None, tmp_path / "fewer")
  assert fewer["missing"] == ["prompts without 4 images: 1"]


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    ([], "holds no scores"),
    (["{"], "line 1 is not JSON"),
    ([result("colors", 0, 0, True)] * 2, "line 2: .* is there twice"),
    ([result("shapes", 0, 0, True)], "tag 'shapes'; expected"),
    ([result("colors", 0, 0, True).replace("true", "1")], "key 'correct'"),
  ],
)
def test_scores_that_are_refused(tmp_path, lines, message):
  (tmp_path / "r.jsonl").write_text("\n".join(lines))
  with pytest.raises(ValueError, match=message):
    summary.summarise(tmp_path / "r.jsonl", None, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_what_else_the_command_refuses(tmp_path):
  (tmp_path / "r.jsonl").write_text(result("colors", 0, 0, True))
  (tmp_path / "r").mkdir()
  (tmp_path / "r" / "metrics.json").write_text("mine")
  for scores, questions, message in (
    ("r.jsonl", None, "is there already, and not of these"),
    ("r.jsonl", tmp_path / "q.csv", "--questions goes with"),
    ("r.csv", None, "expected the .jsonl file"),
    ("no.txt", None, "no such file"),
  ):
    with pytest.raises(ValueError, match=message):
      summary.summarise(tmp_path / scores, questions, tmp_path / "r")
  assert (tmp_path / "r" / "metrics.json").read_text() == "mine"
