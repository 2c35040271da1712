"""The demo's server over HTTP: its one way in, and the doors that are shut."""

import contextlib
import http.client
import json
import re
import socket
import urllib.parse

import pytest

from tensorar_jax.demo import guard, page, service
from tests import tiny_configs

FIELDS = dict(
  stage="base", label=0, prompt="", seed=0, guidance="1", num_images=1
)
ASKED = "the model was asked"


@pytest.fixture(scope="module")
def port(tmp_path_factory):
  """Where a page is served whose model says that it was asked to draw."""
  stage = tiny_configs.stage(
    tensorar=dict(window=1),
    tokenizer=dict(image_size=(3, 3), levels=11),
    conditioning=dict(name="class", num_classes=5),
  )
  workdir = tmp_path_factory.mktemp("demo")
  (workdir / "base" / "checkpoints" / "7").mkdir(parents=True)
  studio = service.Studio({"base": stage}, workdir)

  def load(name, checkpoint):
    raise ValueError(ASKED)

  studio.load = load
  url = page.serve(studio, "t", "127.0.0.1", 0, block=False)
  return urllib.parse.urlsplit(url).port


def ask(port, method, path, body=None, **headers):
  """(status, text) of the answer to a request."""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
  if isinstance(body, dict | list):
    body, headers = (
      json.dumps(body),
      {"Content-Type": "application/json"} | headers,
    )
  connection.request(method, path, body, headers)
  with contextlib.closing(connection):
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


@pytest.fixture(scope="module")
def functions(port):
  """The numbers of the page's functions by the event that calls them."""
  status, text = ask(port, "GET", "/config")
  assert status == 200
  return {
    event: one["id"]
    for one in json.loads(text)["dependencies"]
    for _, event in one["targets"]
    if one["backend_fn"]
  }


def through_the_queue(port, function, data, session="s"):
  """What the page would show: the output of a function, or its error."""
  body = dict(fn_index=function, data=data, session_hash=session)
  status, text = ask(port, "POST", "/gradio_api/queue/join", body)
  assert status == 200, text
  _, text = ask(port, "GET", f"/gradio_api/queue/data?session_hash={session}")
  done = [line for line in text.splitlines() if "process_completed" in line]
  return json.loads(done[0].removeprefix("data: "))["output"]


def test_the_page_and_its_queue_are_open(port, functions):
  for path in ("/", "/config", "/theme.css", "/gradio_api/startup-events"):
    assert ask(port, "GET", path)[0] == 200, path
  _, text = ask(port, "GET", "/")
  files = re.findall(
    r'(?:src|href)="\.?(/(?:assets|static|svelte)[^"]*)"', text
  )
  assert files
  assert all(ask(port, "GET", file)[0] == 200 for file in files[:3])
  output = through_the_queue(port, functions["click"], [*FIELDS.values()])
  assert output["error"] == ASKED
  fields = through_the_queue(port, functions["change"], ["base"])
  assert len(fields["data"]) == 3


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(seed=10**400), "the seed is 1000"),
    (dict(seed="9" * 5000), "the seed is '999"),
    (dict(seed=float("nan")), "the seed is nan: expected a whole number"),
    (dict(seed=float("inf")), "the seed is inf: expected a whole number"),
    (dict(seed=None), "the seed is None: expected a whole number from 0"),
    (dict(seed=[1]), "the seed is [1]"),
    (dict(label={"a": 1}), "the class is {'a': 1}: expected a whole number"),
    (dict(num_images=10**400), "the number of images is 1000"),
    (dict(num_images="many"), "the number of images is 'many'"),
    (dict(guidance=None), "guidance is None: expected a scale, such as 1.5"),
    (dict(guidance=float("nan")), "guidance is nan: expected 0 to 50"),
    (dict(guidance=10**400), "guidance is 1000"),
    (dict(guidance="1" * 5000), "guidance is '111"),
    (dict(guidance=[2]), "guidance is [2]: expected a scale"),
    (dict(guidance=True), "guidance is True: expected a scale"),
    (dict(stage=None), "checkpoint 'None' is unknown"),
    (dict(stage="x" * 5000), "checkpoint 'xxx"),
    (dict(stage=["base"]), "is unknown"),
  ],
)
def test_absurd_values_are_refused_in_words(port, functions, change, words):
  values = {**FIELDS, **change}
  output = through_the_queue(port, functions["click"], [*values.values()])
  error = output["error"].replace("&#x27;", "'")
  assert words in error and len(error) < 250
  if "stage" in change:
    output = through_the_queue(port, functions["change"], [change["stage"]])
    assert "is unknown" in output["error"]


CLOSED = [
  *(("POST", f"/gradio_api/{way}/predict") for way in ("run", "api", "call")),
  ("POST", "/gradio_api/call/v2/predict"),
  ("POST", "/run/predict"),
  ("POST", "/gradio_api/upload"),
  ("POST", "/gradio_api/component_server"),
  ("POST", "/login"),
  ("POST", "/"),
  ("GET", "/gradio_api/file=/etc/hostname"),
  ("GET", "/gradio_api/file/etc/hostname"),
  ("GET", "/gradio_api/proxy=https://example.com"),
  ("GET", "/gradio_api/openapi.json"),
  ("GET", "/gradio_api/call/predict/1"),
  ("GET", "/gradio_api/runs"),
  ("GET", "/docs"),
  ("GET", "/openapi.json"),
  ("GET", "/monitoring"),
  ("OPTIONS", "/"),
  ("PUT", "/gradio_api/queue/join"),
  ("DELETE", "/gradio_api/queue/join"),
]


@pytest.mark.parametrize("method, path", CLOSED)
def test_every_other_way_is_closed(port, method, path):
  data = dict(fn_index=1, data=[*FIELDS.values()], session_hash="c")
  status, text = ask(port, method, path, data)
  assert status == 404 and "Requests go by the queue." in text


def test_functions_cannot_be_called_directly_within(port, tmp_path):
  """Gradio itself refuses too, without the guard."""
  stage = tiny_configs.stage(conditioning=dict(name="class", num_classes=5))
  (tmp_path / "base" / "checkpoints" / "7").mkdir(parents=True)
  app = page.page(service.Studio({"base": stage}, tmp_path), "t")
  assert app.api_open is False
  functions = [f for f in app.fns.values() if f.fn]
  assert len(functions) == 2 and all(f.queue for f in functions)
  assert {f.api_visibility for f in functions} == {"private"}


@pytest.mark.parametrize("length", [guard.MAX_BODY + 1, 300_000_000, 10**30])
def test_large_bodies_are_refused_before_they_are_sent(port, length):
  status, text = ask(
    port, "POST", "/gradio_api/queue/join", **{"Content-Length": str(length)}
  )
  assert status in ((413,) if length < 10**20 else (400, 413)), text
  if status == 413:
    assert "expected at most 1,048,576 bytes" in text


def test_bodies_of_unknown_length_are_cut_off(port):
  with socket.create_connection(("127.0.0.1", port), timeout=30) as sender:
    sender.sendall(
      f"POST /gradio_api/queue/join HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
      "Transfer-Encoding: chunked\r\n\r\n".encode()
    )
    chunk = b"10000\r\n" + b"a" * 2**16 + b"\r\n"
    sent = 0
    try:
      while sent < 64 * 2**20:
        sender.sendall(chunk)
        sent += 2**16
    except OSError:  # closed at the other end
      pass
    assert sent < 32 * 2**20  # what the system holds on its way


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", ""])
def test_foreign_names_are_refused(port, host):
  for method, path in (("GET", "/"), ("POST", "/gradio_api/queue/join")):
    status, text = ask(port, method, path, Host=host)
    assert status in (400, 403) and "<html" not in text
  assert ask(port, "GET", "/", Host=f"localhost:{port}")[0] == 200
  assert ask(port, "GET", "/", Host="localhost:9")[0] == 200  # a tunnel


@pytest.mark.parametrize(
  "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://["]
)
def test_requests_of_other_sites_are_refused(port, origin):
  for method, path in (("GET", "/config"), ("POST", "/gradio_api/queue/join")):
    status, text = ask(port, method, path, Origin=origin)
    assert status == 403 and "other sites are refused" in text
  own = f"http://127.0.0.1:{port}"
  assert ask(port, "GET", "/config", Origin=own)[0] == 200


def test_a_page_that_is_for_others_goes_by_any_name():
  scope = dict(method="GET", path="/", headers=[(b"host", b"lab.example")])
  assert guard.Guard(None, "0.0.0.0").refusal(scope) is None
  assert guard.Guard(None, "127.0.0.1").refusal(scope)[0] == 403


def test_a_port_that_is_taken_is_said():
  with socket.create_server(("127.0.0.1", 0)) as other:
    port = other.getsockname()[1]
    with pytest.raises(ValueError, match=f"--port={port}: .*a free port"):
      page._listen("127.0.0.1", port)
  for host, port in (("127.0.0.1", 70000), ("192.0.2.1", 1)):
    with pytest.raises(ValueError, match="Expected an address of this machine"):
      page._listen(host, port)
