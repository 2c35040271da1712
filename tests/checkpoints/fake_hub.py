"""A hub on this machine: the requests that one download makes, as the real one.

HEAD says which commit and digest a file has, GET sends it. A repository is a
dict from file names to bytes.
"""

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator

COMMIT = "c0ffee" + "0" * 34
LARGE = 1000  # bytes from which a file is stored apart, by its sha256


class Hub(http.server.ThreadingHTTPServer):
  """`requests` lists what was asked, `refused` maps repositories to errors."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.files: dict[str, dict[str, bytes]] = {}
    self.refused: dict[str, tuple[int, str]] = {}  # status, error code
    self.damaged: set[str] = set()  # files that arrive with another byte
    self.requests: list[str] = []
    self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
  def do_HEAD(self):
    owner, repository, _, revision, *rest = self.path.strip("/").split("/")
    name, file = f"{owner}/{repository}", "/".join(rest)
    self.server.requests.append(f"{self.command} {name}/{file}@{revision}")
    files = self.server.files.get(name)
    error = self.server.refused.get(name)
    if files is None:
      error = error or (401, "RepoNotFound")
    elif revision not in ("main", COMMIT):
      error = error or (404, "RevisionNotFound")
    elif file not in files:
      error = error or (404, "EntryNotFound")
    if error:
      self._answer(error[0], {"X-Error-Code": error[1]})
      return
    content = files[file]
    digest = hashlib.sha1(b"blob %d\0" % len(content) + content)
    if len(content) >= LARGE:
      digest = hashlib.sha256(content)
    if file in self.server.damaged:
      content = content[:-1] + bytes([content[-1] ^ 1])
    headers = {"ETag": f'"{digest.hexdigest()}"', "X-Repo-Commit": COMMIT}
    self._answer(200, headers, content)

  do_GET = do_HEAD

  def _answer(self, status, headers, content=b""):
    self.send_response(status)
    for key, value in {**headers, "Content-Length": len(content)}.items():
      self.send_header(key, str(value))
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(content)

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
  """A hub that runs inside the `with`."""
  hub = Hub()
  thread = threading.Thread(target=hub.serve_forever, args=(0.02,))
  thread.start()
  try:
    yield hub
  finally:
    hub.shutdown()
    thread.join()
    hub.server_close()
