"""What the pictures and the report must get right, by what can be decoded."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageSequence

from tensorar_jax.evaluation import metrics
from tensorar_jax.generation import pictures
from tensorar_jax.method import windows
from tensorar_jax.reports import plots

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
  code = "import sys, tensorar_jax.reports.plots; print(*sys.modules)"
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
  pictures.save_sample_grids(tmp_path / "a.png", grids, ["shoe", "bag"])
  picture = _decode(tmp_path / "a.png")
  for grid in grids.values():
    for image in grid.reshape(-1, *grid.shape[2:]):
      tile = image.repeat(14, 0).repeat(14, 1)  # 5 pixels -> 70
      assert _holds(picture, np.broadcast_to(tile, (70, 70, 3)))


def test_sample_grids_wrap(tmp_path):
  grids = {f"model {i}": _grid(columns=8, seed=i) for i in range(4)}
  pictures.save_sample_grids(tmp_path / "a.png", grids, ["0", "1"])
  height, width, _ = _decode(tmp_path / "a.png").shape
  assert width < 1800
  pictures.save_sample_grids(
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
  pictures.save_refinement(path, tiles, none)
  legend = _colored(_decode(path))
  pictures.save_refinement(path, tiles, {"model": changed})
  one = _colored(_decode(path)) - legend
  # A cell of 2 x 2 pixels is 58 x 58 on screen; its line is 2 pixels wide.
  assert one == 58**2 - 54**2
  changed[0, 1, 0, 1] = True  # the neighbour: one outline around both
  pictures.save_refinement(path, tiles, {"model": changed})
  assert _colored(_decode(path)) - legend == 58 * 116 - 54 * 112
  both["model"] = changed.copy()
  both["model"][:, 0] = True  # nothing comes before the first look
  pictures.save_refinement(path, tiles, both)
  assert _colored(_decode(path)) - legend == 58 * 116 - 54 * 112
  pictures.save_refinement(path, tiles)
  assert _colored(_decode(path)) == 0


def test_refinement_takes_windows_of_different_length(tmp_path):
  strips = {"base": _grid(3, 1), "k = 2": _grid(3, 2), "k = 5": _grid(3, 5)}
  changed = {"k = 5": np.ones((3, 5, 5, 5), bool)}  # not for every model
  pictures.save_refinement(tmp_path / "a.png", strips, changed)
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
  plain = pictures.growth_tiles(strip, changed & False, 3)
  marked = pictures.growth_tiles(strip, changed, 3)
  assert plain.shape == marked.shape == (1, 9, 3, 3, 3)
  for n, p in np.ndindex(9, 9):
    at = (0, n, p // 3, p % 3)
    slot = max(0, p - n)
    if slot > 2:
      assert tuple(plain[at]) == tuple(pictures._BLANK) == tuple(marked[at])
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
  frames = pictures.growth_tiles(strip, changed, 9)
  assert frames.shape[1] == 64
  plain = pictures.growth_tiles(strip, changed & False, 9)
  assert (plain[0, -1] == strip[0, -1]).all()
  # No change is lost: what differs from the frame before is marked.
  before, after = plain[0, :-1], plain[0, 1:]
  differs = (before != after).any(-1) & (before != pictures._BLANK).any(-1)
  assert (frames[0, 1:][differs] != after[differs]).any(-1).all()


def test_heat_shows_the_last_look_that_changed_a_cell():
  changed = np.zeros((1, 3, 2, 2), bool)
  changed[0, 1, 0] = changed[0, 2, 0, 1] = True
  tiles = pictures.heat_tiles(changed, (4, 4))
  colors = [tuple(color) for color in pictures.heat_colors(3)]
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
  pictures.save_refinement_gif(tmp_path / "a.gif", strips, shown)
  with Image.open(tmp_path / "a.gif") as gif:
    assert (gif.n_frames, gif.info["loop"]) == (9, 0)
    frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(gif)]
  tiles = pictures.growth_tiles(strip, changed, 115)[0]
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
  save, grid = pictures.save_sample_grids, _grid()
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
      pictures.save_refinement("never.png", {"base": value})
  with pytest.raises(ValueError, match="2 rows; expected 3"):
    save("never.png", {"base": grid}, ["0", "1", "2"])
  with pytest.raises(ValueError, match="expected a model"):
    save("never.png", {}, [])
  for value in (np.ones((2, 3, 4)), np.ones((2, 2, 5, 5), bool)):
    with pytest.raises(ValueError, match="expected bool"):
      pictures.save_refinement("never.png", {"base": grid}, {"base": value})
  save_gif = pictures.save_refinement_gif
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


def test_a_scan_is_a_panel_per_metric(tmp_path):
  path = tmp_path / "scan.png"
  curves = [
    plots.ScanCurve(metrics.find(name), values, halves)
    for name, values, halves in (
      ("fid", [4.0, 3.0, 5.0], [0.1, 0.1, 0.0]),
      ("inception_score", [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
    )
  ]
  plots.save_scan(path, ["1", "2", "4:6"], curves, "base")
  one = tmp_path / "one.png"
  single = plots.ScanCurve(metrics.find("fid"), [4.0], [0.1])
  plots.save_scan(one, ["1"], [single], "base")
  with Image.open(path) as wide, Image.open(one) as narrow:
    assert wide.width == 2 * narrow.width
  with pytest.raises(ValueError, match="no scan"):
    plots.save_scan(path, [], [], "base")


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
