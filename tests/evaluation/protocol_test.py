"""Tests of sample files against reference batches, on the narrow network."""

import dataclasses
import hashlib
import json
import os
import zipfile

import numpy as np
import pytest

from tensorar_jax.checkpoints import resumable
from tensorar_jax.cli import evaluation
from tensorar_jax.evaluation import protocol
from tensorar_jax.experiment.schema import Stage
from tensorar_jax.generation import npz, sample_files
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.reports import guidance_report


@pytest.fixture(scope="module")
def folder(parity):
  return parity / "evaluation"


@pytest.fixture(scope="module")
def network(folder):
  return dict(np.load(folder / "inception_mini_weights.npz"))


@pytest.fixture(scope="module")
def expected(folder):
  return json.loads((folder / "expected.json").read_text())


@pytest.fixture
def files(folder, tmp_path):
  """(reference, samples): copies, as features are kept beside them."""
  found = []
  for name in ("ref", "sample"):
    found.append(tmp_path / f"{name}.npz")
    source = folder / f"protocol_{name}_batch.npz"
    found[-1].write_bytes(source.read_bytes())
  return found


def few(path, count, **more):
  """A shorter copy of a sample file, for what does not need 300 images."""
  with np.load(path) as arrays:
    images = arrays["arr_0"][:count]
  short = path.with_name(f"{path.stem}{count}.npz")
  np.savez(short, images, **more)
  return short


@pytest.fixture
def quick(monkeypatch):
  """Without the spatial features, whose covariance takes seconds each."""
  monkeypatch.setattr(protocol, "KINDS", ("pool", "logits"))


def judge(reference, network, **options):
  return protocol.Judge(reference, network, **{"bootstrap": 0, **options})


def values(record):
  return {name: entry["value"] for name, entry in record["metrics"].items()}


def test_every_metric_end_to_end(files, network, expected, tmp_path):
  reference, samples = files
  used = judge(reference, network, bootstrap=2)
  record = used.measure(samples, tmp_path / "out")
  want = expected["protocol_end_to_end"]
  close = lambda name: pytest.approx(want[name], rel=2e-5)
  assert values(record) == {
    "fid": close("fid_exact"),
    "sfid": close("sfid_exact"),
    "inception_score": close("is"),
    "precision": want["precision_fp32"],
    "recall": want["recall_fp32"],
  }
  for entry in record["metrics"].values():
    low, high = entry["interval"]
    assert low < entry["value"] < high and entry["std"] > 0
  # What there is afterwards: one record, a table, and no features of samples.
  names = {path.name for path in (tmp_path / "out").iterdir()}
  assert names == {"settings.json", "metrics.json", "metrics.md"}
  text = (tmp_path / "out" / "metrics.json").read_text()
  assert json.loads(text) == json.loads(json.dumps(record))
  line = (tmp_path / "out" / "metrics.md").read_text().splitlines()[2]
  assert line.startswith("| sample.npz | 300 | 0.90 [")
  # Measured once; another network's numbers do not replace it.
  assert used.measure(samples, tmp_path / "out") == json.loads(text)
  other = {**network, "fc.bias": network["fc.bias"] + 1}
  with pytest.raises(ValueError, match="bootstrap: was 2, is 0"):
    judge(reference, other).measure(samples, tmp_path / "out")


def test_statistics_in_a_file_count(folder, network, expected, tmp_path):
  for name in ("reference", "sample"):
    file = tmp_path / f"{name}.npz"
    file.write_bytes((folder / f"layout_{name}_stats.npz").read_bytes())
  used = judge(tmp_path / "reference.npz", network)
  found = values(used.measure(tmp_path / "sample.npz", tmp_path / "out"))
  want = expected["layout_stats"]
  for name in ("fid", "sfid"):
    assert found[name] == pytest.approx(want[name], rel=1e-6)
  assert found.keys() == {metric.name for metric in protocol.columns()}


def test_numbers_depend_on_nothing_but_the_images(
  quick, files, network, tmp_path, monkeypatch
):
  """Not on batches, nor on how processes share the work."""
  monkeypatch.setattr(protocol, "SHARD_SIZE", 32)
  reference, samples = (few(file, 70) for file in files)
  whole = judge(reference, network, batch_size=50)
  want = values(whole.measure(samples, tmp_path / "whole"))
  two = [
    judge(reference, network, batch_size=17, worker=resumable.Worker(i, 2))
    for i in (1, 0)
  ]
  for folder in reference.parent.glob("*.features-*"):
    folder.rename(folder.with_suffix(".gone"))
  assert two[0].measure(samples, tmp_path / "two") is None
  got = values(two[1].measure(samples, tmp_path / "two"))
  assert got == pytest.approx(want, rel=1e-6)


def test_samples_are_those_of_their_manifest(files, network, tmp_path):
  reference, samples = files
  path = tmp_path / "samples.npz"
  path.write_bytes(samples.read_bytes())
  manifest = {"npz": path.name, "sha256": hashlib.sha256(path.read_bytes())}
  manifest["sha256"] = manifest["sha256"].hexdigest()
  place = tmp_path / "manifest.json"
  place.write_text(json.dumps(manifest))
  assert protocol._manifest(path, manifest["sha256"]) == manifest
  content = bytearray(path.read_bytes())
  content[5000] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match="samples.npz is damaged: its sha256 is"):
    judge(reference, network).measure(path, tmp_path / "out")
  assert not (tmp_path / "out").exists()
  place.write_text(json.dumps(manifest)[:30])
  with pytest.raises(ValueError, match="manifest.json: cannot be read as JSON"):
    judge(reference, network).measure(path, tmp_path / "out")
  # Other programs call their files so, too.
  place.write_text(json.dumps([{"name": "a"}]))
  assert protocol._manifest(path, "0") is None


def test_a_second_measurement_in_a_folder_is_refused(files, network, tmp_path):
  reference, samples = files
  with (
    resumable.holding(tmp_path),
    pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"),
  ):
    judge(reference, network).measure(samples, tmp_path)


def test_a_killed_measurement_continues(
  quick, files, network, tmp_path, monkeypatch
):
  monkeypatch.setattr(protocol, "SHARD_SIZE", 10)
  reference, samples = (few(file, 30) for file in files)
  used = judge(reference, network)
  of, calls = used.extractor.of, []

  def dying(images):
    calls.append(len(images))
    if len(calls) == 3:
      raise KeyboardInterrupt
    return of(images)

  monkeypatch.setattr(used.extractor, "of", dying)
  with pytest.raises(KeyboardInterrupt):
    used.measure(samples, tmp_path / "out")
  assert len(list((tmp_path / "out").glob("features-*.npz"))) == 2
  got = used.measure(samples, tmp_path / "out")
  assert calls == [10] * 3 + [10] * (1 + 3)  # what was missing, the reference
  assert got["metrics"] == used.measure(samples, tmp_path / "again")["metrics"]


def test_a_read_only_reference_is_no_obstacle(quick, files, network, tmp_path):
  reference, samples = (few(file, 10) for file in files)
  used = judge(reference, network)
  used.file.path = tmp_path / "nowhere" / "ref.npz"
  used.file.read = npz.SampleFile(reference).read
  assert used.measure(samples, tmp_path / "out")
  assert list((tmp_path / "out" / "reference").glob("features-*.npz"))


# --- bad input ---------------------------------------------------------------


@dataclasses.dataclass
class Bad:
  arrays: dict
  says: str


IMAGES = np.zeros((9, 24, 24, 3), np.uint8)
PART = {"mu": np.zeros(4), "sigma": np.eye(4)}
WHOLE = {**PART, "mu_s": np.zeros(5), "sigma_s": np.eye(5)}
BAD = {
  "float": Bad({"arr_0": IMAGES / 255}, "float64; expected uint8"),
  "one image": Bad({"arr_0": IMAGES[:1]}, "holds 1 image; expected at least 2"),
  "empty": Bad({"arr_0": IMAGES[:0]}, "holds no image"),
  "flat": Bad({"arr_0": IMAGES[0]}, r"expected \[n, h, w, 3\]"),
  "grey": Bad({"arr_0": IMAGES[..., :1]}, "1 channels; expected 3"),
  "channels first": Bad(
    {"arr_0": IMAGES.transpose(0, 3, 1, 2)}, "24 channels; expected 3"
  ),
  "no images": Bad({"images": IMAGES}, r"holds \['images'\]; expected arr_0"),
  "another size": Bad({"arr_0": IMAGES[:, :20]}, "expected one size"),
  "half the statistics": Bad(
    {"arr_0": IMAGES, **PART}, r"mu without \['mu_s', 'sigma_s'\]"
  ),
  "another network": Bad(
    {"arr_0": IMAGES, **WHOLE}, "4 pool features; this network makes 256"
  ),
  "statistics of two widths": Bad(
    {"arr_0": IMAGES, **WHOLE, "sigma": np.eye(3)}, r"expected \[D\] and"
  ),
  "NaN": Bad(
    {"arr_0": IMAGES, **WHOLE, "mu": np.full(4, np.nan)}, "NaN or infinity"
  ),
  "objects": Bad({"arr_0": np.array([None, 1])}, "object; expected uint8"),
}


def test_three_images_are_refused_before_any_network_is_read(field, tmp_path):
  np.savez(tmp_path / "four.npz", IMAGES[:4])
  three, four = field / "three.npz", tmp_path / "four.npz"
  nowhere = str(tmp_path / "nowhere.pth")
  for reference, samples in ((four, three), (three, four)):
    options = evaluation.Evaluate(
      samples=str(samples), reference=str(reference), inception=nowhere
    )
    with pytest.raises(
      ValueError, match="three.npz holds 3 images: .* least 4"
    ):
      evaluation.measure_file(options, samples)
  with pytest.raises(ValueError, match="asked for 3 images: expected at least"):
    protocol.check_count("asked for", 3)


@pytest.fixture(scope="module")
def good(network, tmp_path_factory):
  path = tmp_path_factory.mktemp("good") / "good.npz"
  np.savez(path, np.random.default_rng(0).integers(0, 256, IMAGES.shape, "u1"))
  return judge(path, network)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_file_is_refused_before_anything_is_written(
  name, good, tmp_path
):
  path = tmp_path / "bad.npz"
  np.savez(path, **BAD[name].arrays)
  with pytest.raises(ValueError, match=BAD[name].says):
    good.measure(path, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_file_that_is_cut_off_is_refused(good, tmp_path):
  path = tmp_path / "cut.npz"
  path.write_bytes(good.file.path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"cut.npz is not .* or is damaged"):
    good.measure(path, tmp_path / "out")
  with zipfile.ZipFile(good.file.path) as source:
    images = source.read("arr_0.npy")
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("arr_0.npy", images[:-100])
  with pytest.raises(ValueError, match="is damaged: it ends before image 9"):
    good.measure(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["float", "one image", "half the statistics"])
def test_a_bad_reference_is_refused(name, network, tmp_path):
  np.savez(tmp_path / "bad.npz", **BAD[name].arrays)
  with pytest.raises(ValueError, match=BAD[name].says):
    judge(tmp_path / "bad.npz", network)


def test_bad_options(good):
  with pytest.raises(ValueError, match="bootstrap=1: expected at least 2"):
    judge(good.file.path, {}, bootstrap=1)
  with pytest.raises(ValueError, match="not the Inception of FID"):
    judge(good.file.path, {})
  with pytest.raises(ValueError, match=r"none\.npz: no such file"):
    judge("none.npz", {})


# --- a scan of guidance scales -----------------------------------------------


def test_a_scan_measures_every_scale(quick, good, tmp_path, monkeypatch):
  drawn = []

  def sample(stages, workdir, request, *, stage, batch_size):
    scale = stages[stage].sampling.guidance
    place = workdir / stage / "samples" / f"{len(drawn):03d}"
    place.mkdir(parents=True)
    drawn.append((scale, stages[stage].sampling.top_k, request))
    images = np.random.default_rng(len(drawn)).integers(
      0, 256, (12, 24, 24, 3), "u1"
    )
    np.savez(place / "samples.npz", images)
    digest = protocol._identity(place / "samples.npz")["sha256"]
    manifest = {"sha256": digest, "seed": request.seed, "npz": "samples.npz"}
    (place / sample_files.MANIFEST).write_text(json.dumps(manifest))
    return sample_files.Target(place, place / "samples.npz")

  monkeypatch.setattr(sample_files, "sample", sample)
  stages = {"base": Stage(sampling=SamplingConfig(top_k=7))}
  request = sample_files.Request(12, seed=5)
  records = protocol.sweep(
    good, stages, tmp_path, request, stage="base", scales=[1.5, (4.0, 6.0)]
  )
  assert [d[:2] for d in drawn] == [(1.5, 7), ((4.0, 6.0), 7)]
  assert list(records) == ["guidance 1.5", "guidance 4:6"]
  assert records["guidance 4:6"]["manifest"]["seed"] == 5
  for place in ("000", "001"):
    beside = tmp_path / "base" / "samples" / place / "against-good"
    assert (beside / "metrics.json").exists()
  overview = tmp_path / "base" / "against-good.json"
  assert json.loads(overview.read_text()).keys() == records.keys()
  picture = guidance_report.draw(overview)
  assert picture == overview.with_suffix(".png")
  assert picture.stat().st_size > 1000
  assert "| guidance 4:6 | 12 |" in overview.with_suffix(".md").read_text()
