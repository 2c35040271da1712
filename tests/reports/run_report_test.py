"""The page of a run: its tables, its verdicts, its pictures in one file."""

import base64
import io
import json
import re

import pytest
from PIL import Image

from tensorar_jax.experiment.schema import Stage, TensorARConfig
from tensorar_jax.generation import pictures
from tensorar_jax.reports import plots, run_report
from tests.generation.pictures_test import _decode, _diagnostics, _grid


def test_report_tells_of_refinement(tmp_path):
  metrics = _metrics() | {"diagnostics": {"wrapped": _diagnostics(2)}}
  head, *lines = run_report.refinement_lines(metrics)
  assert lines == [
    ["wrapped", "0", *["0.500 / 0.500"] * 2, "", ""],
    ["wrapped", "1", *["0.500 / 0.500"] * 3, "0.500"],
  ]
  assert len(head) == 6
  for given in (metrics, _metrics()):
    run_report.write_report(tmp_path / "r.html", "r", given, {}, "run")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    shown = "Given its own drafts" in page
    assert shown == ("<td>0.500 / 0.500</td>" in page)
    assert shown == ("diagnostics" in given)


def _entry(mean, std):
  return {"mean": mean, "std": std, "values": [mean - std, mean + std]}


def _metrics():
  return {
    "models": {
      "base": {"frechet": _entry(2.0, 0.1), "accuracy": _entry(0.9, 0.01)},
      "continued": {"frechet": _entry(1.5, 0.3), "accuracy": _entry(0.8, 0.03)},
      "wrapped": {"frechet": _entry(1.1, 0.4), "accuracy": _entry(0.7, 0.04)},
    },
    "reference": {"held-out": {"frechet": 0.25, "accuracy": 0.99}},
    "seconds": {"train base": 61.0, "sample": 2.5},
    "settings": {"guidance": 1.5},
    "notes": ["small <sample>"],
  }


def _verdict(mine, theirs, metric="frechet"):
  models = {"continued": {metric: theirs}, "wrapped": {metric: mine}}
  (sentence,) = run_report.verdicts({"models": models})
  assert sentence.startswith("wrapped compared with continued: ")
  return sentence.removeprefix("wrapped compared with continued: ")


def test_verdicts_follow_the_numbers():
  theirs = _entry(1.5, 0.3)  # with 0.4: a combined spread of 0.5
  assert _verdict(_entry(1.1, 0.4), theirs).startswith("within the spread in")
  assert _verdict(_entry(1.9, 0.4), theirs).startswith("within the spread in")
  assert _verdict(_entry(0.9, 0.4), theirs).startswith(
    "better in Fréchet distance"
  )
  assert _verdict(_entry(2.1, 0.4), theirs).startswith(
    "worse in Fréchet distance"
  )
  assert "(2.100 against 1.500)" in _verdict(_entry(2.1, 0.4), theirs)
  # The other direction for a metric where higher is better.
  assert _verdict(0.9, _entry(0.8, 0.05), "recall").startswith("better in")
  assert _verdict(0.7, _entry(0.8, 0.05), "recall").startswith("worse in")
  # Without any spread the verdict says so.
  assert _verdict(1.0, 1.5).startswith("better (spread not measured) in")
  assert _verdict(1.5, 1.5).startswith("equal (spread not measured) in")
  for nothing in (None, {}, {"mean": None}, float("nan")):
    assert _verdict(nothing, 1.5) == "no metric in common."


def test_verdicts_are_for_the_wrapped_models_alone():
  (sentence,) = run_report.verdicts(_metrics())
  assert "within the spread in Fréchet distance" in sentence
  assert "; worse in class accuracy (0.700 against 0.800)" in sentence
  metrics = _metrics()
  del metrics["models"]["continued"]
  assert run_report.verdicts(metrics) == []


def test_table():
  text = run_report.table(_metrics())
  lines = text.splitlines()
  assert re.split(r"  +", lines[0].strip()) == [
    "Fréchet distance ↓",
    "class accuracy ↑",
  ]
  rows = {re.split(r"  +", line)[0]: line for line in lines[2:6]}
  assert "1.100 ± 0.400 *" in rows["wrapped"]
  assert "0.900 ± 0.010 *" in rows["base"]
  assert "0.250" in rows["held-out"] and "*" not in rows["held-out"]
  assert text.count("*") == 2
  assert lines[-1] == run_report.verdicts(_metrics())[0]


def test_table_takes_what_there_is():
  assert run_report.table({}) == "\n"
  metrics = {
    "models": {"a": {"frechet": {"values": [1.0, 3.0]}}, "b": None, "c": {}},
    "reference": None,
  }
  assert "2.000 ± 1.000" in run_report.table(metrics)
  metrics["models"]["c"] = {"copy_rate": 0.5}  # no known direction, no best
  assert "copy rate" in run_report.table(metrics)
  assert "*" not in run_report.table(metrics)


def test_report_is_one_escaped_file(tmp_path):
  picture = tmp_path / "a.png"
  pictures.save_sample_grids(picture, {"base": _grid()}, ["0", "1"])
  metrics = _metrics()
  metrics["models"]["<b>bold</b>"] = {"frechet": 9.0}
  run_report.write_report(
    tmp_path / "r.html",
    "Shoes & <script>",
    metrics,
    {"Samples <i>": picture},
    "run --a='<x>' && b",
  )
  page = (tmp_path / "r.html").read_text(encoding="utf-8")
  for raw in ("<script", "<b>", "<i>", "<x>", "<sample>", "http", "url("):
    assert raw not in page
  for shown in (
    "Shoes &amp; &lt;script&gt;",
    "run --a=&#x27;&lt;x&gt;&#x27; &amp;&amp; b",
    "small &lt;sample&gt;",
    "guidance 1.5",
    "train base</td><td>61.0 s",
    "Wall time: 63.5 s",
    "<td class=best>1.100 ± 0.400</td>",
    "wrapped compared with continued: ",
  ):
    assert shown in page
  assert page.count("class=best") == 2
  assert re.findall(r"(?:src|href)='(.{22})", page) == [
    "data:image/png;base64,"
  ]
  (data,) = re.findall(r"base64,([^']+)'", page)
  assert base64.b64decode(data) == picture.read_bytes()
  assert Image.open(io.BytesIO(base64.b64decode(data))).format == "PNG"


def test_report_takes_what_there_is(tmp_path):
  run_report.write_report(tmp_path / "r.html", "empty", {}, {}, "run")
  metrics = {"models": {"base": {}}, "seconds": {"a": 0.0, "b": None}}
  run_report.write_report(tmp_path / "r.html", "bare", metrics, {}, "run")
  assert "bare" in (tmp_path / "r.html").read_text(encoding="utf-8")


def _case(window, batch, rate, **more):
  row = {"kind": "decode", "guided": True, "program": "tensorar_jax"}
  speed = {"median": rate, "min": rate - 1, "max": rate + 1}
  row |= {"window": window, "depth": 1, "batch": batch, **more}
  return row | {"images_per_second": speed}


def test_throughput_joins_distances_and_the_newest_benchmark(tmp_path):
  names = {"base": 1, "wrapped": 4, "deep": 4, "other": 2}
  stages = {
    name: Stage(tensorar=TensorARConfig(window=k)) for name, k in names.items()
  }
  stages["deep"] = Stage(tensorar=TensorARConfig(window=4, depth=2))
  stages["classifier"] = Stage(objective="classifier")
  measured = {"models": {name: {"frechet": _entry(2.0, 0.5)} for name in names}}
  find = lambda: run_report.throughput_points(stages, measured, tmp_path)
  assert find() == {}
  cases = [_case(1, 1, 9.0), _case(1, 8, 30.0), _case(4, 8, 20.0)]
  cases += [_case(1, 8, 99.0, guided=False), _case(4, 8, 5.0, program="torch")]
  for number, found in (("000", []), ("001", cases)):
    (tmp_path / "benchmark" / number).mkdir(parents=True)
    file = tmp_path / "benchmark" / number / "benchmark.json"
    file.write_text(json.dumps({"cases": found}))
  (tmp_path / "base").mkdir()
  records = {
    f"guidance {i}": {"metrics": {"fid": {"value": value, "std": 0.25}}}
    for i, value in enumerate([5.0, 3.0, 4.0])
  }
  file = tmp_path / "base" / "against-real.json"
  file.write_text(json.dumps(records))
  speed = (30.0, 29.0, 31.0)
  assert find() == {
    "Fréchet distance by images/s, 8 at once": {
      "base, k = 1": (speed, (2.0, 0.5)),
      "wrapped, k = 4": ((20.0, 19.0, 21.0), (2.0, 0.5)),
    },
    "FID, real by images/s, 8 at once": {"base, k = 1": (speed, (3.0, 0.25))},
  }
  plots.save_throughput(tmp_path / "a.png", find())
  assert _decode(tmp_path / "a.png").shape == (440, 1232, 3)
  with pytest.raises(ValueError, match="expected a group"):
    plots.save_throughput(tmp_path / "a.png", {})
