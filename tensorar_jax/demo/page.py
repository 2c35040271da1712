"""The page of `--mode=demo`.

It shows how images grew token by token and, with a slider, the pictures after
each look with a map of the changes. Both replay a finished generation from data
inside the page: moving the slider sends no request, nothing is fetched, and no
file is written. `guard` stands before the server.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import io
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tensorar_jax.conditioning.conditions import TextConditioning
from tensorar_jax.demo import guard
from tensorar_jax.demo.service import DemoRequest, Drawn, Studio
from tensorar_jax.generation import pictures

MAX_WAITING = 16  # requests in the queue; further ones are refused
MAX_CONNECTIONS = 128  # a page has a few; further ones are refused
PORTS = range(7860, 7960)  # where a free one is looked for
_SIDE = 208  # pixels of a small image on the page

_CSS = """
.pictures img { display: block; width: 100%; border-radius: 6px;
  image-rendering: pixelated } .pictures figcaption, .legend, .note {
  opacity: .75; font-size: .9em; margin: .35em 0 .9em }
.pictures figure { margin: 0 0 .7em } .look[hidden] { display: none }
.legend i { display: inline-block; width: 1em; height: 1em; margin: 0 .35em 0
  1em; border-radius: 3px; vertical-align: -.12em }
footer { display: none !important }
"""
# Shows one of the looks; all of them are already in the page.
_SHOW_LOOK = """look => { document.querySelectorAll(".look").forEach(
  one => { one.hidden = Number(one.dataset.look) !== look }) }"""


def growth_html(drawn: Drawn) -> str:
  """An endless animation of the images as they were drawn."""
  tiles = pictures.growth_tiles(drawn.strip, drawn.changed, _SIDE)
  frames = [pictures.in_a_row(tiles[:, s]) for s in range(tiles.shape[1])]
  save = functools.partial(pictures.save_gif, frames=np.stack(frames))
  note = "Token by token. Grey: not drawn yet."
  if drawn.changed.shape[1] > 1:
    note += " Orange: tokens that this step has revised."
  image = _image(save, "gif", "the images, token by token")
  return _figure(image, note)


def looks_html(drawn: Drawn) -> str:
  """The pictures and maps after each look; at first the last look is shown."""
  window = drawn.changed.shape[1]
  if window == 1:
    return (
      "<p class=note>k = 1: this model draws every token once and never revises"
      " it. To see revisions, choose a checkpoint with k &gt; 1.</p>"
    )
  strips = pictures.look_tiles(drawn.strip, drawn.changed, _SIDE)
  maps = pictures.heat_tiles(drawn.changed, strips.shape[2:4])
  shares = drawn.changed.mean(axis=(0, 2, 3))
  looks = []
  for look in range(1, window + 1):
    hidden = " hidden" * (look < window)
    caption = "The first draft of every token."
    if look > 1:
      caption = f"Look {look} changed {shares[look - 1]:.0%} of the tokens."
    images = []
    for tiles, title in ((strips, "picture"), (maps, "map of changes")):
      row = pictures.in_a_row(tiles[:, look - 1])
      save = functools.partial(pictures.save_image, image=row)
      images.append(_image(save, "png", f"{title} after look {look}"))
    body = f"{_figure(images[0], caption)}{_figure(images[1])}"
    looks.append(f"<div class=look data-look={look}{hidden}>{body}</div>")
  names = ["none: the first draft was kept", *range(2, window + 1)]
  keys = [
    f"<i style='background: rgb{tuple(color)}'></i>{name}"
    for color, name in zip(pictures.heat_colors(window).tolist(), names)
  ]
  title = "The last look that changed a token:"
  legend = f"<p class=legend>{title}{''.join(keys)}</p>"
  return "".join([*looks, legend])


def _image(save: Callable[[io.BytesIO], None], kind: str, text: str) -> str:
  file = io.BytesIO()
  save(file)
  data = base64.b64encode(file.getvalue()).decode()
  return f"<img alt='{text}' src='data:image/{kind};base64,{data}'>"


def _figure(image: str, caption: str = "") -> str:
  if caption:
    caption = f"<figcaption>{caption}</figcaption>"
  return f"<figure>{image}{caption}</figure>"


def _gradio():
  # Read at import. Without analytics, the page makes no requests of its own.
  os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
  try:
    import gradio
  except ImportError as error:
    raise ValueError(
      "--mode=demo needs gradio: pip install 'tensorar_jax[demo]'."
    ) from error
  return gradio


@contextlib.contextmanager
def _in_words(gr):
  """Shows the reader of the page what is wrong with a request."""
  try:
    yield
  except (ValueError, OSError) as error:
    message = html.escape(str(error))
    raise gr.Error(message, duration=None, print_exception=False) from error


def _fields(gr, studio: Studio, name: Any) -> list:
  """The form's fields for a stage: class, prompt, guidance."""
  with _in_words(gr):
    name = studio.check_name(name)
  conditions = studio.conditioning(name)
  is_text = isinstance(conditions, TextConditioning)
  label = "Class" if is_text else f"Class, 0 to {conditions.num_classes - 1}"
  scale = studio.guidance(name)
  hint = "1 means no guidance."
  if len(studio.vocab_sizes(name)) > 1:
    hint += " 4:6 is a scale for each sub-token."
  return [
    gr.Number(label=label, value=0, precision=0, visible=not is_text),
    gr.Textbox(label="Prompt", value="", lines=2, visible=is_text),
    gr.Textbox(label="Guidance", value=scale, info=hint),
  ]


def _answer(gr, studio: Studio, request: DemoRequest) -> list:
  """New contents of the page's outputs, or an error message for the reader."""
  with _in_words(gr):
    drawn = studio.draw(request)
  window = drawn.changed.shape[1]
  slider = gr.Slider(maximum=max(2, window), value=window, visible=window > 1)
  status = f"**{drawn.title}**, drawn in {drawn.seconds:.1f} s"
  return [status, growth_html(drawn), slider, looks_html(drawn)]


def page(studio: Studio, title: str):
  """The gradio app of a studio, not started."""
  gr = _gradio()
  with gr.Blocks(title=title, analytics_enabled=False) as app:
    gr.Markdown(f"# {title}")
    with gr.Row():
      with gr.Column(scale=1, min_width=280):
        titles = [(studio.title(name), name) for name in studio.names]
        stage = gr.Dropdown(titles, value=studio.first, label="Checkpoint")
        fields = _fields(gr, studio, studio.first)
        label, prompt, guidance = fields
        seed = gr.Number(label="Seed", value=0, precision=0)
        most = studio.num_images
        count = gr.Slider(1, most, value=most, step=1, label="Images")
        button = gr.Button("Draw", variant="primary", elem_id="draw")
      with gr.Column(scale=3, min_width=420):
        status = gr.Markdown(
          "Choose a class or prompt, then Draw.", elem_id="status"
        )
        growth = gr.HTML(elem_classes="pictures", elem_id="growth")
        look = gr.Slider(1, 2, step=1, label="Look", visible=False)
        looks = gr.HTML(elem_classes="pictures", elem_id="looks")
    # Values come as they were sent: `studio` checks them, and says it in words.
    stage.change(
      lambda name: _fields(gr, studio, name),
      inputs=stage,
      outputs=fields,
      preprocess=False,
      api_visibility="private",
    )
    button.click(
      lambda *values: _answer(gr, studio, DemoRequest(*values)),
      inputs=[stage, label, prompt, seed, guidance, count],
      outputs=[status, growth, look, looks],
      preprocess=False,
      api_visibility="private",
    )
    look.change(None, inputs=look, outputs=None, js=_SHOW_LOOK)
  return app.queue(
    api_open=False, max_size=MAX_WAITING, default_concurrency_limit=1
  )


def serve(
  studio: Studio, title: str, host: str, port: int | None, block: bool = True
) -> str:
  """Serves the page; without `block`, returns its address.

  `port` None is the first free one of PORTS.
  """
  app, gr, host = page(studio, title), _gradio(), host.strip("[]")
  # Beside gradio, which needs both.
  import fastapi
  import uvicorn

  app.state_session_capacity = 100
  inner = gr.mount_gradio_app(
    fastapi.FastAPI(openapi_url=None),
    app,
    path="/",
    show_error=True,
    max_file_size="1b",  # nothing is uploaded
    footer_links=[],
    run_history=False,
    ssr_mode=False,
    pwa=False,
    mcp_server=False,
    enable_monitoring=False,
    # System fonts: the default ones are fetched from the network.
    theme=gr.themes.Default(
      font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ),
    css=_CSS,
  )
  config = uvicorn.Config(
    guard.Guard(inner, host),
    http="h11",
    ws="none",
    lifespan="on",
    log_level="warning",
    limit_concurrency=MAX_CONNECTIONS,
    proxy_headers=False,
    server_header=False,
  )
  server, listener = uvicorn.Server(config), _listen(host, port)
  serving = threading.Thread(
    target=server.run, kwargs={"sockets": [listener]}, daemon=True
  )
  serving.start()
  while not server.started:
    if not serving.is_alive():
      raise RuntimeError("the server of the demo did not start")
    time.sleep(0.05)
  name = "localhost" if host in ("0.0.0.0", "::") else host
  name = f"[{name}]" if ":" in name else name
  url = f"http://{name}:{listener.getsockname()[1]}/"
  print(f"demo: {url}", flush=True)
  if block:
    with contextlib.suppress(KeyboardInterrupt):
      serving.join()
  return url


def _listen(host: str, port: int | None) -> socket.socket:
  """Takes the port, or the first free one; ValueError if there is none."""
  problem: Exception | None = None
  for number in PORTS if port is None else [port]:
    try:
      family, *_, place = socket.getaddrinfo(
        host, None, type=socket.SOCK_STREAM
      )[0]
      return socket.create_server((place[0], number), family=family)
    except (OSError, OverflowError) as error:
      problem = error
  shown = "any" if port is None else port
  raise ValueError(
    f"--host={host} --port={shown}: {problem}. Expected an address of this"
    " machine, and a free port up to 65535."
  )
