"""The page of `--mode=demo`.

It shows how images grew token by token, and behind a slider the picture after
each look with a map of what the looks changed. That is replayed from a finished
generation and is data inside the page: the slider asks no one, nothing is
fetched and no file is written.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import os
from collections.abc import Callable

import numpy as np

from tensorar_jax.demo.service import Asked, Drawn, Studio
from tensorar_jax.generation import pictures

MAX_WAITING = 16  # requests; one more is told to come back
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
# Shows one of the looks that the page has already.
_SHOW_LOOK = """look => { document.querySelectorAll(".look").forEach(
  one => { one.hidden = Number(one.dataset.look) !== look }) }"""


def growth_html(drawn: Drawn) -> str:
  """The images as they were drawn, as an endless animation."""
  tiles = pictures.growth_tiles(drawn.strip, drawn.changed, _SIDE)
  frames = [pictures.in_a_row(tiles[:, s]) for s in range(tiles.shape[1])]
  save = functools.partial(pictures.save_gif, frames=np.stack(frames))
  note = "Token by token. Grey: not drawn yet."
  if drawn.changed.shape[1] > 1:
    note += " Orange: tokens of the window that a step has revised."
  image = _image(save, "gif", "the images, token by token")
  return _figure(image, note)


def looks_html(drawn: Drawn) -> str:
  """The pictures and the maps after each look; the last one is shown."""
  window = drawn.changed.shape[1]
  if window == 1:
    return (
      "<p class=note>k = 1: this model draws every token once and never looks"
      " at it again. Choose a checkpoint with k &gt; 1.</p>"
    )
  drawings = pictures.look_tiles(drawn.strip, drawn.changed, _SIDE)
  maps = pictures.heat_tiles(drawn.changed, drawings.shape[2:4])
  shares = drawn.changed.mean(axis=(0, 2, 3))
  shown = []
  for look in range(1, window + 1):
    hidden = " hidden" * (look < window)
    words = "The first draft of every token."
    if look > 1:
      words = f"Look {look} changed {shares[look - 1]:.0%} of the tokens."
    parts = []
    for tiles, what in ((drawings, "picture"), (maps, "map of changes")):
      row = pictures.in_a_row(tiles[:, look - 1])
      save = functools.partial(pictures.save_image, image=row)
      parts.append(_image(save, "png", f"{what} after look {look}"))
    body = f"{_figure(parts[0], words)}{_figure(parts[1])}"
    shown.append(f"<div class=look data-look={look}{hidden}>{body}</div>")
  names = ["none, first draft kept", *range(2, window + 1)]
  keys = [
    f"<i style='background: rgb{tuple(color)}'></i>{name}"
    for color, name in zip(pictures.heat_colors(window).tolist(), names)
  ]
  words = "The last look that has changed a token:"
  legend = f"<p class=legend>{words}{''.join(keys)}</p>"
  return "".join([*shown, legend])


def _image(save: Callable[[io.BytesIO], None], kind: str, words: str) -> str:
  file = io.BytesIO()
  save(file)
  data = base64.b64encode(file.getvalue()).decode()
  return f"<img alt='{words}' src='data:image/{kind};base64,{data}'>"


def _figure(image: str, words: str = "") -> str:
  caption = f"<figcaption>{words}</figcaption>" if words else ""
  return f"<figure>{image}{caption}</figure>"


def _gradio():
  # Read when it is imported: the page phones no one.
  os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
  try:
    import gradio
  except ImportError as error:
    raise ValueError(
      "--mode=demo needs gradio: pip install 'tensorar_jax[demo]'."
    ) from error
  return gradio


def _fields(gr, studio: Studio, name: str) -> list:
  """What the form has for a stage: class, prompt, guidance."""
  conditions = studio.conditioning(name)
  is_text = conditions.is_text
  words = "Class" if is_text else f"Class, 0 to {conditions.num_classes - 1}"
  own = studio.guidance(name)
  hint = "1 is none."
  if len(studio.vocab_sizes(name)) > 1:
    hint += " As 4:6, one for each sub-token."
  return [
    gr.Number(label=words, value=0, precision=0, visible=not is_text),
    gr.Textbox(label="Prompt", value="", lines=2, visible=is_text),
    gr.Textbox(label="Guidance", value=own, info=hint),
  ]


def _answer(gr, studio: Studio, asked: Asked) -> list:
  """What a request changes on the page, or an error in words."""
  try:
    drawn = studio.draw(asked)
  except (ValueError, OSError) as error:
    words = html.escape(str(error))
    raise gr.Error(words, duration=None, print_exception=False) from error
  window = drawn.changed.shape[1]
  many = window > 1
  slider = gr.Slider(maximum=max(2, window), value=window, visible=many)
  said = f"**{drawn.title}**, drawn in {drawn.seconds:.1f} s"
  return [said, growth_html(drawn), slider, looks_html(drawn)]


def page(studio: Studio, title: str):
  """The gradio app of a studio, not started."""
  gr = _gradio()
  with gr.Blocks(title=title, analytics_enabled=False) as app:
    gr.Markdown(f"# {title}")
    with gr.Row():
      with gr.Column(scale=1, min_width=280):
        titles = [(studio.title(name), name) for name in studio.names]
        stage = gr.Dropdown(titles, value=studio.first, label="Checkpoint")
        own = _fields(gr, studio, studio.first)
        seed = gr.Number(label="Seed", value=0, precision=0)
        most = studio.num_images
        count = gr.Slider(1, most, value=most, step=1, label="Images")
        button = gr.Button("Draw", variant="primary", elem_id="draw")
      with gr.Column(scale=3, min_width=420):
        said = gr.Markdown("Choose, and press Draw.", elem_id="said")
        growth = gr.HTML(elem_classes="pictures", elem_id="growth")
        look = gr.Slider(1, 2, step=1, label="Look", visible=False)
        looks = gr.HTML(elem_classes="pictures", elem_id="looks")
    stage.change(
      lambda name: _fields(gr, studio, name),
      *(stage, own),
      api_visibility="private",
    )
    button.click(
      lambda *values: _answer(gr, studio, Asked(*values)),
      [stage, *own[:2], seed, own[2], count],
      [said, growth, look, looks],
      api_visibility="private",
    )
    look.change(None, look, None, js=_SHOW_LOOK)
  return app.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def serve(
  studio: Studio, title: str, host: str, port: int | None, block: bool = True
) -> str:
  """Serves the page and returns its address, if it does not block.

  `port` None is the first free one from 7860.
  """
  app, gr = page(studio, title), _gradio()
  _, url, _ = app.launch(
    server_name=host,
    server_port=port,
    share=False,
    show_error=True,
    max_file_size="1mb",  # nothing is uploaded
    state_session_capacity=100,
    prevent_thread_lock=True,
    quiet=True,
    footer_links=[],
    ssr_mode=False,
    pwa=False,
    mcp_server=False,
    enable_monitoring=False,
    # Fonts of the reader's system: the default ones are from the network.
    theme=gr.themes.Default(
      font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ),
    css=_CSS,
  )
  print(f"demo: {url}", flush=True)
  if block:
    app.block_thread()
  return url
