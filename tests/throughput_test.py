import time

import jax
import pytest

from tensorar_jax import hardware, throughput


class Result:
  """What a step makes, once its time has come."""

  def __init__(self, ready: float):
    self.ready = ready

  def block_until_ready(self):
    time.sleep(max(self.ready - time.monotonic(), 0))
    return self


class Device:
  """Runs one step after the other, behind the back of who asks for them."""

  def __init__(self, seconds: float, compilation: float = 0.0):
    self.seconds, self.compilation, self.free = seconds, compilation, 0.0

  def step(self, state, context, batch):
    time.sleep(self.compilation)
    self.compilation = 0
    self.free = max(time.monotonic(), self.free) + self.seconds
    return state + 1, {"loss": Result(self.free)}


@pytest.fixture
def log(monkeypatch):
  """The lines that were logged."""
  lines = []
  for level in ("info", "warning"):
    write = lambda text, *args: lines.append(text % args)
    monkeypatch.setattr(throughput.logging, level, write)
  monkeypatch.setattr(throughput, "JUDGED_SECONDS", 0.1)
  return lines


def measure(folder, device, fetch=0.0, sync=False, steps=10):
  """The speeds of some steps of 4 images with 9 tokens each."""
  meter = throughput.Meter(folder, device.step, lambda *arrays: 10**9)
  state = 0
  for _ in range(steps):
    meter.fetch(lambda: time.sleep(fetch))
    state, scalars = meter.step(state, None, None)
    if sync:
      scalars["loss"].block_until_ready()
  scalars["loss"].block_until_ready()
  assert state == steps
  speeds = meter.read(4, 36)
  meter.close()
  return speeds


@pytest.mark.parametrize(
  "step, fetch, sync, low, high",
  [
    (0.02, 0.0, False, 0.0, 0.04),  # the host runs ahead
    (0.04, 0.02, False, 0.0, 0.04),  # the next batch is there in time
    (0.02, 0.04, False, 0.4, 0.55),  # the device idles half of the time
    (0.02, 0.02, True, 0.4, 0.55),  # whoever waits for a step hides nothing
  ],
)
def test_waiting_is_what_no_step_covers(
  tmp_path, log, step, fetch, sync, low, high
):
  speeds = measure(tmp_path, Device(step), fetch, sync)
  assert low <= speeds["data_wait"] <= high
  assert ("too slow" in "".join(log)) == (low > 0)


def test_speeds_leave_the_compilation_out(tmp_path, log, monkeypatch):
  chip = hardware.CHIPS["h100"]
  monkeypatch.setattr(hardware, "of", lambda device: chip)
  speeds = measure(tmp_path, Device(0.02, compilation=0.5))
  seconds = speeds["step_seconds"]
  assert seconds == pytest.approx(0.02, rel=0.3)
  assert speeds["images_per_second"] == pytest.approx(4 / seconds)
  assert speeds["tokens_per_second"] == pytest.approx(36 / seconds)
  assert speeds["tflops_per_second"] == pytest.approx(1e-3 / seconds)
  peak = chip.peak_flops * jax.device_count()
  assert speeds["mfu"] == pytest.approx(1e9 / seconds / peak)
  assert "compiled in 0.5 s; 0.001 model TFLOP a step" in log[0]


def test_what_is_not_known_is_left_out(tmp_path, log):
  """This chip's peak; FLOPs of a loop without end. Training goes on."""
  assert "mfu" not in measure(tmp_path, Device(0.0))

  def count(state, context, batch):
    raise ValueError("no end")

  meter = throughput.Meter(tmp_path, Device(0.001).step, count)
  meter.step(0, None, None)
  assert "tflops_per_second" not in meter.read(4, 36)
  assert "cannot be counted (no end)" in log[-1]
  meter.close()


def test_the_warning_comes_back_when_it_has_doubled(tmp_path, log):
  meter = throughput.Meter(tmp_path, Device(0.0).step, max)
  for share in (0.04, 0.06, 0.11, 0.13, 0.07, 0.3):
    meter._warn(share, 10)
  meter.close()
  assert [line.split(" %")[0][-2:] for line in log] == [" 6", "13", "30"]


def test_a_trace_that_never_began_is_reported(tmp_path, log):
  meter = throughput.Meter(tmp_path, Device(0.0).step, max, profile=(2, 3))
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
