"""What the demo's server lets through: the page, and requests by its queue.

Gradio has many more doors than the page uses: direct calls of functions,
uploads, files, proxies. They are closed by a list of what is open. Bodies are
bounded. A page that is for this machine alone refuses names that other sites
have given to this machine, and requests that pages of other sites send.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

MAX_BODY = 2**20  # bytes of a request
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_API = "/gradio_api"
READ = re.compile(  # what the page fetches
  r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt"
  r"|/(assets|static|svelte)/.+"
  rf"|{_API}/(info/?|app_id/?|startup-events|queue/data|heartbeat/[\w-]+)"
)
SENT = re.compile(rf"{_API}/(queue/join|cancel|reset)/?")  # what it sends


class Guard:
  """An ASGI application that passes on what is allowed, and answers the rest.

  Args:
    app: the application.
    host: the address that is served; checks of names are for LOOPBACK alone.
  """

  def __init__(self, app: Any, host: str):
    self.app, self.is_local = app, host in LOOPBACK

  async def __call__(self, scope, receive, send) -> None:
    """Serves a connection, as ASGI has it."""
    if scope["type"] == "lifespan":
      return await self.app(scope, receive, send)
    if scope["type"] != "http":
      return await send({"type": "websocket.close", "code": 1008})
    if refusal := self.refusal(scope):
      return await _answer(send, *refusal)
    if scope["method"] == "POST":
      messages = await _whole_body(receive)
      if messages is None:
        return await _answer(send, *_too_large())
      receive = _replayed(messages, receive)
    await self.app(scope, receive, send)

  def refusal(self, scope) -> tuple[int, str] | None:
    """Returns the (status, words) of a request that is refused."""
    names = [value.decode("latin-1") for value in _headers(scope, b"host")]
    origins = [value.decode("latin-1") for value in _headers(scope, b"origin")]
    if self.is_local:
      if len(names) != 1 or _name(f"//{names[0]}") not in LOOPBACK:
        return 403, (
          f"Host {names}: this page is for {LOOPBACK} alone; --host opens it."
        )
      if any(_machine(one) != names[0].lower() for one in origins):
        return 403, f"Origin {origins}: requests of other sites are refused."
    method, path = scope["method"], scope["path"]
    is_open = SENT if method == "POST" else READ
    if method not in ("GET", "HEAD", "POST") or not is_open.fullmatch(path):
      return 404, f"{method} {path[:80]}: not here. Requests go by the queue."
    for length in _headers(scope, b"content-length"):
      if not length.isdigit() or len(length) > 9 or int(length) > MAX_BODY:
        return _too_large()
    return None


def _headers(scope, name: bytes) -> list[bytes]:
  return [value for key, value in scope["headers"] if key.lower() == name]


def _name(url: str) -> str | None:
  """Returns the name of a URL's machine in small letters; None without one."""
  try:
    return urlsplit(url).hostname
  except ValueError:
    return None


def _machine(url: str) -> str | None:
  """Returns the machine and port of a URL in small letters, as in `Host`."""
  try:
    return urlsplit(url).netloc.lower()
  except ValueError:
    return None


def _too_large() -> tuple[int, str]:
  return 413, f"The request is too large: expected at most {MAX_BODY:,} bytes."


async def _whole_body(receive) -> list[dict] | None:
  """Returns the messages of a body; None if it is too large."""
  messages, size = [], 0
  while True:
    messages.append(message := await receive())
    size += len(message.get("body", b""))
    if size > MAX_BODY:
      return None
    if message["type"] != "http.request" or not message.get("more_body"):
      return messages


def _replayed(messages: list[dict], receive):
  """Gives the messages once more, then what `receive` gives."""
  waiting = iter(messages)

  async def replay():
    message = next(waiting, None)
    return await receive() if message is None else message

  return replay


async def _answer(send, status: int, words: str) -> None:
  headers = [
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"connection", b"close"),  # whatever of the body is still to come
  ]
  start = {"type": "http.response.start", "status": status, "headers": headers}
  await send(start)
  body = f"{words}\n".encode("utf-8", "replace")
  await send({"type": "http.response.body", "body": body})
