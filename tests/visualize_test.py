"""What the pictures and the report must get right, by what can be decoded."""

import base64
import io
import json
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageSequence

from tensorar_jax import plots, report, visualize, windows

MARK = (255, 106, 0)


def _grid(rows=2, columns=3, size=5, channels=1, seed=0):
  shape = (rows, columns, size, size, channels)
  return np.random.default_rng(seed).integers(0, 200, shape, dtype=np.uint8)


def _decode(path):
  with Image.open(path) as picture:
    return np.asarray(picture.convert("RGB"))


def _holds(picture, tile):
  """Whether the picture contains the tile, pixel for pixel."""
  windows = np.lib.stride_tricks.sliding_window_view(picture, tile.shape)
  corner = (windows[..., 0, 0, :] == tile[0, 0]).all(-1)
  return any((windows[tuple(at)] == tile).all() for at in np.argwhere(corner))


def _colored(picture):
  return int((picture == MARK).all(-1).sum())


def test_import_is_light():
  code = "import sys, tensorar_jax.plots; print(*sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert not {"matplotlib", "PIL"} & set(done.stdout.split())


@pytest.mark.parametrize("channels", [1, 3])
def test_sample_grids_keep_every_pixel(tmp_path, channels):
  grids = {
    "base": _grid(channels=channels),
    "TensorAR <k=2> $x_0$": _grid(columns=2, channels=channels, seed=1),
  }
  visualize.save_sample_grids(tmp_path / "a.png", grids, ["shoe", "bag"])
  picture = _decode(tmp_path / "a.png")
  for grid in grids.values():
    for image in grid.reshape(-1, *grid.shape[2:]):
      tile = image.repeat(14, 0).repeat(14, 1)  # 5 pixels -> 70
      assert _holds(picture, np.broadcast_to(tile, (70, 70, 3)))


def test_sample_grids_wrap(tmp_path):
  grids = {f"model {i}": _grid(columns=8, seed=i) for i in range(4)}
  visualize.save_sample_grids(tmp_path / "a.png", grids, ["0", "1"])
  height, width, _ = _decode(tmp_path / "a.png").shape
  assert width < 1800
  visualize.save_sample_grids(
    tmp_path / "b.png", {"model": grids["model 0"]}, ["0", "1"]
  )
  one_high, one_wide, _ = _decode(tmp_path / "b.png").shape
  assert 1.8 * one_wide < width < 2.2 * one_wide  # two and two
  assert 1.7 * one_high < height < 2.2 * one_high


def test_refinement_marks_the_changed_cells(tmp_path):
  strip = np.zeros((1, 3, 4, 4, 1), np.uint8)
  changed = np.zeros((1, 3, 2, 2), bool)
  changed[0, 1, 0, 0] = True
  path = tmp_path / "a.png"
  tiles, none, both = {"model": strip}, {"model": changed & False}, {}
  visualize.save_refinement(path, tiles, none)
  legend = _colored(_decode(path))
  visualize.save_refinement(path, tiles, {"model": changed})
  one = _colored(_decode(path)) - legend
  # A cell of 2 x 2 pixels is 58 x 58 on screen; its line is 2 pixels wide.
  assert one == 58**2 - 54**2
  changed[0, 1, 0, 1] = True  # the neighbour: one outline around both
  visualize.save_refinement(path, tiles, {"model": changed})
  assert _colored(_decode(path)) - legend == 58 * 116 - 54 * 112
  both["model"] = changed.copy()
  both["model"][:, 0] = True  # nothing comes before the first look
  visualize.save_refinement(path, tiles, both)
  assert _colored(_decode(path)) - legend == 58 * 116 - 54 * 112
  visualize.save_refinement(path, tiles)
  assert _colored(_decode(path)) == 0


def test_refinement_takes_windows_of_different_length(tmp_path):
  strips = {"base": _grid(3, 1), "k = 2": _grid(3, 2), "k = 5": _grid(3, 5)}
  changed = {"k = 5": np.ones((3, 5, 5, 5), bool)}  # not for every model
  visualize.save_refinement(tmp_path / "a.png", strips, changed)
  assert _colored(_decode(tmp_path / "a.png")) > 0


def _drafts(rows, window, seed=0):
  """(drafts, strip, changed) of an image of rows x rows tokens as pixels."""
  rng = np.random.default_rng(seed)
  shape = (1, rows**2, window, 1)
  drafts = rng.choice([10, 90, 170], shape)
  given = jnp.asarray(drafts)
  looks = [windows.after_looks(given, n + 1) for n in range(window)]
  strip = np.stack(looks, 1).reshape(1, window, rows, rows, 1)
  strip = strip.astype(np.uint8)
  changed = np.zeros(strip.shape[:4], bool)
  changed[:, 1:] = (strip[:, 1:] != strip[:, :-1])[..., 0]
  return drafts, strip, changed


def test_growth_shows_each_token_as_the_step_drew_it():
  drafts, strip, changed = _drafts(3, 3)
  plain = visualize.growth_tiles(strip, changed & False, 3)
  marked = visualize.growth_tiles(strip, changed, 3)
  assert plain.shape == marked.shape == (1, 9, 3, 3, 3)
  for n, p in np.ndindex(9, 9):
    at = (0, n, p // 3, p % 3)
    slot = max(0, p - n)
    if slot > 2:
      assert tuple(plain[at]) == tuple(visualize._BLANK) == tuple(marked[at])
      continue
    drawn = drafts[0, min(n, p), slot, 0]
    assert (plain[at] == drawn).all()
    revised = (
      n > 0 and p >= n and slot < 2 and drafts[0, n - 1, slot + 1] != drawn
    )
    # All of an image of 3 pixels is within 2 pixels of a border.
    assert tuple(marked[at]) == (MARK if revised else (drawn,) * 3)


def test_growth_of_many_tokens_leaves_steps_out():
  _, strip, changed = _drafts(9, 4)
  frames = visualize.growth_tiles(strip, changed, 9)
  assert frames.shape[1] == 64
  plain = visualize.growth_tiles(strip, changed & False, 9)
  assert (plain[0, -1] == strip[0, -1]).all()
  # No change is lost: what differs from the frame before is marked.
  before, after = plain[0, :-1], plain[0, 1:]
  differs = (before != after).any(-1) & (before != visualize._BLANK).any(-1)
  assert (frames[0, 1:][differs] != after[differs]).any(-1).all()


def test_heat_shows_the_last_look_that_changed_a_cell():
  changed = np.zeros((1, 3, 2, 2), bool)
  changed[0, 1, 0] = changed[0, 2, 0, 1] = True
  tiles = visualize.heat_tiles(changed, (4, 4))
  colors = [tuple(color) for color in visualize.heat_colors(3)]
  assert len(set(colors)) == 3
  found = [
    [colors.index(tuple(c)) for c in t[::2, ::2].reshape(-1, 3)]
    for t in tiles[0]
  ]
  assert found == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 2, 0, 0]]


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_shows_every_frame(tmp_path, channels):
  _, strip, changed = _drafts(3, 2)
  strips = {name: np.repeat(strip, channels, -1) for name in ("a", "b")}
  shown = {"a": changed, "b": changed}
  visualize.save_refinement_gif(tmp_path / "a.gif", strips, shown)
  with Image.open(tmp_path / "a.gif") as gif:
    assert (gif.n_frames, gif.info["loop"]) == (9, 0)
    frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(gif)]
  tiles = visualize.growth_tiles(strip, changed, 115)[0]
  for frame, tile in zip(frames, tiles):
    half = len(frame) // 2
    for row in (frame[:half], frame[half:]):  # its name above, a gap below
      shows = row[26 : 26 + len(tile), : tile.shape[1]].astype(int)
      np.testing.assert_allclose(shows, tile, atol=4)


def _trace(steps, **values):
  return [
    {"step": s, **{k: v / (1 + s) for k, v in values.items()}} for s in steps
  ]


@pytest.mark.parametrize(
  "names", [("classifier",), ("base",), ("base", "wrapped", "classifier")]
)
def test_curves(tmp_path, names):
  traces = {
    "base": _trace(range(97), **{"ce/0": 5.0, "loss": 5.0}),
    "wrapped": _trace([3], **{f"ce/{j}": 2.0 for j in range(11)}),
    "classifier": _trace(range(5), loss=1.0, accuracy=0.9),
  }
  traces = {name: traces[name] for name in names}
  plots.save_curves(tmp_path / "a.png", traces)
  height, width, _ = _decode(tmp_path / "a.png").shape
  assert width == 1400
  assert (
    height == {1: 220 if names == ("classifier",) else 340, 3: 560}[len(names)]
  )


def test_curves_survive_uneven_rows_and_nan(tmp_path):
  rows = _trace(range(7), **{"ce/0": 5.0})
  rows[2]["accuracy"], rows[5]["ce/0"] = 0.5, float("nan")
  plots.save_curves(tmp_path / "a.png", {"base": rows})
  assert _decode(tmp_path / "a.png").size


def test_bad_pictures_are_named():
  save, grid = visualize.save_sample_grids, _grid()
  bad = {
    r"float64 \(2, 3, 5, 5, 1\)": grid / 255,
    r"\(2, 3, 5, 5\)": grid[..., 0],
    r"\(0, 3, 5, 5, 1\)": grid[:0],
    r"\(2, 3, 5, 5, 2\)": np.concatenate([grid, grid], -1),
  }
  for match, value in bad.items():
    with pytest.raises(ValueError, match=f"'base' is .*{match}; expected"):
      save("never.png", {"base": value}, ["0", "1"])
    with pytest.raises(ValueError, match=f"{match}; expected"):
      visualize.save_refinement("never.png", {"base": value})
  with pytest.raises(ValueError, match="2 rows; expected 3"):
    save("never.png", {"base": grid}, ["0", "1", "2"])
  with pytest.raises(ValueError, match="expected a model"):
    save("never.png", {}, [])
  for value in (np.ones((2, 3, 4)), np.ones((2, 2, 5, 5), bool)):
    with pytest.raises(ValueError, match="expected bool"):
      visualize.save_refinement("never.png", {"base": grid}, {"base": value})
  save_gif = visualize.save_refinement_gif
  with pytest.raises(ValueError, match="expected a non-empty uint8"):
    save_gif("never.gif", {"base": grid[0]}, {"base": np.ones(4, bool)})
  with pytest.raises(ValueError, match="'base' is .*expected bool"):
    save_gif("never.gif", {"base": grid}, {"base": np.ones(4, bool)})
  with pytest.raises(ValueError, match="expected a model"):
    save_gif("never.gif", {}, {})
  for traces in ({}, {"base": []}, {"base": [{"loss": 1.0}]}):
    with pytest.raises(ValueError, match="expected"):
      plots.save_curves("never.png", traces)


def _diagnostics(window=3, value=0.5):
  kinds = ("training_noise", "own_drafts")
  of = lambda slots: {kind: [value] * slots for kind in kinds}
  return {
    "window": window,
    "entropy": value,
    "cross_entropy": of(window),
    "accuracy": of(window),
    "window_accuracy": of(window - 1),
    "copy_rate": [value] * (window - 1),
  }


def test_diagnostics_of_every_model_are_drawn(tmp_path):
  found = {"k = 2": _diagnostics(2), "k = 5": _diagnostics(5, 0.25)}
  plots.save_diagnostics(tmp_path / "a.png", found)
  assert _decode(tmp_path / "a.png").shape == (380, 1400, 3)
  with pytest.raises(ValueError, match="expected a model"):
    plots.save_diagnostics(tmp_path / "a.png", {})


def test_planes_take_pairs_and_single_models(tmp_path):
  rows = [{"recall": 0.5 + i, "precision": 0.25 * i} for i in range(3)]
  groups = {"digits": {"base": [rows], "pair": [rows[:1], rows[1:]]}}
  groups["shoes"] = {"base": [rows[:1]]}
  planes = (("recall", "precision"),)
  plots.save_planes(tmp_path / "a.png", groups, planes, "the base")
  assert _decode(tmp_path / "a.png").shape == (760, 780, 3)
  with pytest.raises(ValueError, match="expected a group"):
    plots.save_planes(tmp_path / "a.png", {}, planes, "")


def test_report_tells_of_refinement(tmp_path):
  metrics = _metrics() | {"diagnostics": {"wrapped": _diagnostics(2)}}
  head, *lines = report.refinement_lines(metrics)
  assert lines == [
    ["wrapped", "0", *["0.500 / 0.500"] * 2, "", ""],
    ["wrapped", "1", *["0.500 / 0.500"] * 3, "0.500"],
  ]
  assert len(head) == 6
  for given in (metrics, _metrics()):
    report.write_report(tmp_path / "r.html", "r", given, {}, "run")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    shown = "Behind its own drafts" in page
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
  (sentence,) = report.verdicts({"models": models})
  assert sentence.startswith("wrapped compared with continued: ")
  return sentence.removeprefix("wrapped compared with continued: ")


def test_verdicts_follow_the_numbers():
  theirs = _entry(1.5, 0.3)  # with 0.4: a combined spread of 0.5
  assert _verdict(_entry(1.1, 0.4), theirs).startswith("within the spread in")
  assert _verdict(_entry(1.9, 0.4), theirs).startswith("within the spread in")
  assert _verdict(_entry(0.9, 0.4), theirs).startswith("better in frechet")
  assert _verdict(_entry(2.1, 0.4), theirs).startswith("worse in frechet")
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
  (sentence,) = report.verdicts(_metrics())
  assert "within the spread in frechet" in sentence
  assert "; worse in accuracy (0.700 against 0.800)" in sentence
  metrics = _metrics()
  del metrics["models"]["continued"]
  assert report.verdicts(metrics) == []


def test_table():
  text = report.table(_metrics())
  lines = text.splitlines()
  assert re.split(r"  +", lines[0].strip()) == ["frechet ↓", "accuracy ↑"]
  rows = {re.split(r"  +", line)[0]: line for line in lines[2:6]}
  assert "1.100 ± 0.400 *" in rows["wrapped"]
  assert "0.900 ± 0.010 *" in rows["base"]
  assert "0.250" in rows["held-out"] and "*" not in rows["held-out"]
  assert text.count("*") == 2
  assert lines[-1] == report.verdicts(_metrics())[0]


def test_table_takes_what_there_is():
  assert report.table({}) == "\n"
  metrics = {
    "models": {"a": {"frechet": {"values": [1.0, 3.0]}}, "b": None, "c": {}},
    "reference": None,
  }
  assert "2.000 ± 1.000" in report.table(metrics)
  metrics["models"]["c"] = {"copy_rate": 0.5}  # no known direction, no best
  assert "copy rate" in report.table(metrics)
  assert "*" not in report.table(metrics)


def test_report_is_one_escaped_file(tmp_path):
  picture = tmp_path / "a.png"
  visualize.save_sample_grids(picture, {"base": _grid()}, ["0", "1"])
  metrics = _metrics()
  metrics["models"]["<b>bold</b>"] = {"frechet": 9.0}
  report.write_report(
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
  report.write_report(tmp_path / "r.html", "empty", {}, {}, "run")
  metrics = {"models": {"base": {}}, "seconds": {"a": 0.0, "b": None}}
  report.write_report(tmp_path / "r.html", "bare", metrics, {}, "run")
  assert "bare" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_scan_is_a_panel_per_metric(tmp_path):
  path = tmp_path / "scan.png"
  metrics = {
    "FID": ([4.0, 3.0, 5.0], [0.1, 0.1, 0.0], False),
    "IS": ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], True),
  }
  plots.save_scan(path, ["1", "2", "4:6"], metrics, "base")
  one = tmp_path / "one.png"
  plots.save_scan(one, ["1"], {"FID": ([4.0], [0.1], False)}, "base")
  with Image.open(path) as wide, Image.open(one) as narrow:
    assert wide.width == 2 * narrow.width
  with pytest.raises(ValueError, match="no scan"):
    plots.save_scan(path, [], {}, "base")


def test_progress_is_a_panel_per_metric(tmp_path):
  rows = {step: {"mean": 1.0 / step, "std": None} for step in (2, 4)}
  bars = {6: {"mean": 0.5, "std": 0.1}}
  panels = {"FID": {"base": rows, "tuned": bars}, "IS": {"base": rows}}
  plots.save_progress(tmp_path / "a.png", panels, "12 images")
  plots.save_progress(tmp_path / "b.png", {"FID": panels["FID"]}, "12 images")
  wide, narrow = (_decode(tmp_path / f"{name}.png") for name in "ab")
  assert wide.shape[1] == 2 * narrow.shape[1]
  with pytest.raises(ValueError, match="no metric"):
    plots.save_progress(tmp_path / "a.png", {}, "")


def _case(window, batch, rate, **more):
  row = {"kind": "decode", "guided": True, "program": "tensorar_jax"}
  speed = {"median": rate, "min": rate - 1, "max": rate + 1}
  row |= {"window": window, "depth": 1, "batch": batch, **more}
  return row | {"images_per_second": speed}


def test_throughput_joins_distances_and_the_newest_benchmark(tmp_path):
  names = {"base": 1, "wrapped": 4, "deep": 4, "other": 2}
  stages = {
    name: {"objective": "tensorar", "tensorar": {"window": k, "depth": 1}}
    for name, k in names.items()
  }
  stages["deep"]["tensorar"]["depth"] = 2
  stages["classifier"] = {"objective": "classifier"}
  measured = {"models": {name: {"frechet": _entry(2.0, 0.5)} for name in names}}
  find = lambda: report.throughput_points(stages, measured, tmp_path)
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
    "Frechet distance by images/s, 8 at once": {
      "base, k = 1": (speed, (2.0, 0.5)),
      "wrapped, k = 4": ((20.0, 19.0, 21.0), (2.0, 0.5)),
    },
    "FID, real by images/s, 8 at once": {"base, k = 1": (speed, (3.0, 0.25))},
  }
  plots.save_throughput(tmp_path / "a.png", find())
  assert _decode(tmp_path / "a.png").shape == (440, 1232, 3)
  with pytest.raises(ValueError, match="expected a group"):
    plots.save_throughput(tmp_path / "a.png", {})
