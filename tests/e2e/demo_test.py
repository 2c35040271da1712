"""--mode=demo in a real browser, from a trained checkpoint to the picture."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess

import pytest
from PIL import Image

from tensorar_jax.experiment import parse
from tensorar_jax.training import loop
from tests.e2e import commands, tiny_digits

SECONDS = 60  # that a page may take, on a busy machine


@pytest.fixture(scope="module")
def browser():
  """Debian's chromium without a window; CI fails where there is none."""
  if not (shutil.which("chromium") and shutil.which("chromedriver")):
    message = "no chromium: apt-get install chromium chromium-driver"
    if os.environ.get("CI"):
      pytest.fail(message)
    pytest.skip(message)
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  for flag in ("headless=new", "no-sandbox", "disable-gpu"):
    options.add_argument(f"--{flag}")
  options.add_argument("--disable-dev-shm-usage")
  options.add_argument("--window-size=1280,1200")
  options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
  service = webdriver.ChromeService(shutil.which("chromedriver"))
  driver = webdriver.Chrome(options=options, service=service)
  yield driver
  driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
  """Where the demo of a base model and TensorAR is served."""
  workdir = tmp_path_factory.mktemp("demo") / "tiny"
  stages = parse.parse(tiny_digits.get_config()).stages
  for name in ("base", "tensorar"):
    loop.fit(stages[name], workdir / name)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  serving = subprocess.Popen(
    commands.words(
      "--mode=demo",
      "--config=tests/e2e/tiny_digits.py",
      f"--workdir={workdir}",
      "--num_images=3",
      f"--port={port}",
    ),
    cwd=commands.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  lines = []
  for line in serving.stdout:  # ends when the process does
    lines.append(line)
    if line.startswith("demo: "):
      break
  assert lines[-1] == f"demo: http://127.0.0.1:{port}/\n", "".join(lines)
  yield lines[-1].split()[1]
  serving.terminate()
  serving.wait()


def wait(browser, what):
  from selenium.webdriver.support.ui import WebDriverWait

  return WebDriverWait(browser, SECONDS).until(what)


def find(browser, css, text=""):
  """The elements of a selector that show a text."""
  found = browser.find_elements("css selector", css)
  return [one for one in found if text in one.text]


def draw(browser, stage):
  """Chooses a checkpoint, presses the button, and waits for its picture."""
  box = browser.find_element("css selector", "input[aria-label=Checkpoint]")
  box.click()
  wait(browser, lambda b: find(b, "[role=option]", stage))[0].click()
  browser.find_element("id", "draw").click()
  wait(browser, lambda b: find(b, "#status", f"{stage} (k"))


def picture(browser, css):
  """An image of the page, decoded; the browser has decoded it too."""
  element = browser.find_element("css selector", css)
  assert browser.execute_script(
    "return arguments[0].decode().then(() => arguments[0].naturalWidth)",
    element,
  )
  data = element.get_attribute("src").split("base64,")[1]
  return Image.open(io.BytesIO(base64.b64decode(data)))


def shown_looks(browser):
  looks = find(browser, ".look")
  return [one.get_attribute("data-look") for one in looks if one.is_displayed()]


def test_a_generation_runs_and_its_picture_shows(browser, address):
  browser.get(address)
  wait(browser, lambda b: find(b, "h1", "tiny"))
  draw(browser, "tensorar")
  growth = picture(browser, "#growth img")
  assert growth.n_frames > 10
  assert growth.size == (3 * 208 + 2 * 4, 208)
  # The looks, the last one first; the slider changes nothing but the page.
  assert shown_looks(browser) == ["4"]
  assert find(browser, ".look", "Look 4 changed")
  assert picture(browser, ".look[data-look='4'] img").size == growth.size
  slider = browser.find_element("css selector", "input[type=range][max='4']")
  slider.send_keys("\ue011")  # Home
  wait(browser, lambda b: shown_looks(b) == ["1"])
  assert find(browser, ".look", "The first draft of every token.")
  draw(browser, "base")
  assert find(browser, "#looks", "k = 1") and not shown_looks(browser)
  # Nothing was asked of any other machine, as it works without a network.
  log = [
    json.loads(entry["message"]) for entry in browser.get_log("performance")
  ]
  log = [entry["message"] for entry in log]
  urls = {
    entry["params"]["request"]["url"]
    for entry in log
    if entry["method"] == "Network.requestWillBeSent"
  }
  assert urls
  assert not [u for u in urls if not u.startswith((address, "data:", "blob:"))]


def test_errors_are_said_in_words(browser, address):
  browser.get(address)
  label = wait(browser, lambda b: find(b, "label", "Class, 0 to 9"))[0]
  box = label.find_element("css selector", "input")
  box.clear()
  box.send_keys("11")
  browser.find_element("id", "draw").click()
  words = "the class is 11: expected a whole number from 0 to 9."
  wait(browser, lambda b: find(b, ".toast-body, [role=alert]", words))
  box.clear()
  box.send_keys("3")
  draw(browser, "base")  # and goes on


def test_it_is_for_this_machine_alone(address):
  port = int(re.search(r":(\d+)/", address)[1])
  hosts = {
    info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)
  }
  for host in hosts - {"127.0.0.1", "127.0.1.1", "::1"}:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
      assert s.connect_ex((host, port)) != 0, host
