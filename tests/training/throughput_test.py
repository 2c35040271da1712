"""On a clock of the tests' own: what is measured is exact."""

from concurrent import futures

import jax
import pytest

from tensorar_jax.parallel import chips
from tensorar_jax.training import throughput


class Clock:
  """Time that passes when someone sleeps."""

  now = 0.0

  def monotonic(self):
    return self.now

  def sleep(self, seconds):
    self.now += seconds


class Result:
  """What a step makes, once its time has come."""

  def __init__(self, clock, ready: float):
    self.clock, self.ready = clock, ready

  def block_until_ready(self):
    self.clock.now = max(self.clock.now, self.ready)
    return self


class Device:
  """Runs one step after the other, while the caller goes on."""

  def __init__(self, clock, seconds: float, compilation: float = 0.0):
    self.clock, self.seconds, self.compilation = clock, seconds, compilation
    self.free = 0.0

  def step(self, state, context, batch):
    self.clock.sleep(self.compilation)
    self.compilation = 0
    self.free = max(self.clock.now, self.free) + self.seconds
    return state + 1, {"loss": Result(self.clock, self.free)}


class Watcher:
  """In place of the thread: knows at once when a step will have ended."""

  def __init__(self, *args):
    pass

  def submit(self, _, loss):
    future = futures.Future()
    future.set_result(loss.ready)
    return future

  def shutdown(self, **options):
    pass


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(throughput, "time", clock)
  monkeypatch.setattr(throughput.futures, "ThreadPoolExecutor", Watcher)
  return clock


@pytest.fixture
def log(monkeypatch):
  """The lines that were logged."""
  lines = []
  for level in ("info", "warning"):
    write = lambda text, *args: lines.append(text % args)
    monkeypatch.setattr(throughput.logging, level, write)
  monkeypatch.setattr(throughput, "JUDGED_SECONDS", 0.1)
  return lines


def measure(folder, device, fetch=0.0, sync=False, steps=10, dtype="float32"):
  """The speeds of some steps of 4 images with 9 tokens each."""
  count = lambda *arrays: 10**9
  meter = throughput.Meter(folder, device.step, count, dtype=dtype)
  state = 0
  for _ in range(steps):
    meter.fetch(lambda: device.clock.sleep(fetch))
    state, scalars = meter.step(state, None, None)
    if sync:
      scalars["loss"].block_until_ready()
  scalars["loss"].block_until_ready()
  assert state == steps
  speeds = meter.read(4, 36)
  meter.close()
  return speeds


@pytest.mark.parametrize(
  "step, fetch, sync, waited",
  [
    (0.02, 0.0, False, 0.0),  # the host runs ahead
    (0.04, 0.02, False, 0.0),  # the next batch is there in time
    (0.02, 0.04, False, 9 * 0.02 / (9 * 0.04 + 0.02)),  # idles half of the time
    (0.02, 0.02, True, 9 * 0.02 / (19 * 0.02)),  # who waits hides nothing
  ],
)
def test_waiting_is_what_no_step_covers(
  tmp_path, log, clock, step, fetch, sync, waited
):
  speeds = measure(tmp_path, Device(clock, step), fetch, sync)
  assert speeds["data_wait"] == pytest.approx(waited)
  assert ("too slow" in "".join(log)) == (waited > 0)


@pytest.mark.parametrize(
  "dtype, peak", [("float32", 494.5e12), ("bfloat16", 989e12)]
)
def test_speeds_leave_the_compilation_out(
  tmp_path, log, clock, monkeypatch, dtype, peak
):
  """And utilisation is of the peak of what is multiplied."""
  monkeypatch.setattr(chips, "of", lambda device: chips.CHIPS["h100"])
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  device = Device(clock, 0.02, compilation=0.5)
  speeds = measure(tmp_path, device, dtype=dtype)
  seconds = speeds["step_seconds"]
  assert seconds == pytest.approx(0.02)
  assert speeds["images_per_second"] == pytest.approx(4 / seconds)
  assert speeds["tokens_per_second"] == pytest.approx(36 / seconds)
  assert speeds["tflops_per_second"] == pytest.approx(1e-3 / seconds)
  peak *= jax.device_count()
  assert speeds["mfu"] == pytest.approx(1e9 / seconds / peak)
  assert "compiled in 0.5 s; 0.001 model TFLOP a step" in log[0]


def test_what_is_not_known_is_left_out(tmp_path, log, clock):
  """This chip's peak; FLOPs of a loop without end. Training goes on."""
  assert "mfu" not in measure(tmp_path, Device(clock, 0.01))

  def count(state, context, batch):
    raise ValueError("no end")

  meter = throughput.Meter(tmp_path, Device(clock, 0.001).step, count)
  meter.step(0, None, None)
  clock.sleep(1)
  assert "tflops_per_second" not in meter.read(4, 36)
  assert "cannot be counted (no end)" in log[-1]
  meter.close()


def test_the_warning_comes_back_when_it_has_doubled(tmp_path, log, clock):
  meter = throughput.Meter(tmp_path, Device(clock, 0.0).step, max)
  for share in (0.04, 0.06, 0.11, 0.13, 0.07, 0.3):
    meter._warn(share, 10)
  meter.close()
  assert [line.split(" %")[0][-2:] for line in log] == [" 6", "13", "30"]


def test_a_trace_that_never_began_is_reported(tmp_path, log, clock):
  meter = throughput.Meter(
    tmp_path, Device(clock, 0.0).step, max, profile=(2, 3)
  )
  meter.fetch(lambda: None)
  meter.close()
  assert log == ["nothing traced: no step 2 in this start"]
  assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("text", ["5", "0:3", "5:4", "a:b", "-1:2"])
def test_bad_steps_to_trace_are_refused(text):
  with pytest.raises(ValueError, match=f"--profile={text}: expected FIRST"):
    throughput.parse_profile(text)
  assert throughput.parse_profile("3:5") == (3, 5)
  assert throughput.parse_profile(None) is None
