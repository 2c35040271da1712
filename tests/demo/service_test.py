"""Requests of the demo page: what they give, and what is refused in words."""

import dataclasses
import re

import numpy as np
import pytest
from flax import nnx

from tensorar_jax.demo import page, service
from tensorar_jax.generation import batches
from tensorar_jax.method import sampling
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import sharding
from tensorar_jax.tokenizers import pixels
from tests import tiny, tiny_configs


def stage(window, **conditioning):
  return tiny_configs.stage(
    tensorar=dict(window=window),
    tokenizer=dict(image_size=(3, 3), levels=11),
    conditioning=conditioning,
  )


CLASSES = dict(name="class", num_classes=5)
STAGES = {
  "classifier": tiny_configs.stage(objective="classifier"),
  "base": stage(1, **CLASSES),
  "wrapped": stage(3, **CLASSES),
  "texts": stage(3, name="text", width=7, length=5),
  "untrained": stage(3, **CLASSES),
}


def load(name, checkpoint=None):
  """A random model in place of a checkpoint's."""
  mesh = sharding.local_mesh()
  config = pixels.Config(image_size=(3, 3), levels=11)
  tokenizer = pixels.Model(config, rngs=nnx.Rngs(0))
  model = tiny.wrapped(STAGES[name].tensorar.window)
  return service.Loaded(
    model, tokenizer, tiny.CLASSES, None, sampling.SamplingConfig(), mesh
  )


class Lengths:
  """A text encoder: features that the length of a caption decides."""

  width, length = 7, 5

  def __call__(self, captions):
    seeds = map(len, captions)
    drawn = [np.random.default_rng(s).normal(size=(5, 7)) for s in seeds]
    features = np.stack(drawn).astype(np.float32)
    return features, np.ones(features.shape[:2], bool)


def load_texts(name, checkpoint):
  """As `load`, of a model that reads texts."""
  backbone = tiny.backbone(text_width=7, text_length=5)
  model = TensorAR(backbone, window=3, rngs=nnx.Rngs(0))
  return dataclasses.replace(
    load("wrapped"), model=model, encode=Lengths(), conditions=tiny.TEXTS
  )


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("demo")
  for name in STAGES.keys() - {"untrained"}:
    (workdir / name / "checkpoints" / "1200").mkdir(parents=True)
  studio = service.Studio(STAGES, workdir, "wrapped", num_images=3)
  studio.load = load
  return studio


def test_trained_stages_can_be_chosen(studio):
  assert studio.names == ["base", "wrapped", "texts"]
  assert studio.first == "wrapped"
  assert studio.window("base") == 1 and studio.window("wrapped") == 3


def test_images_are_those_of_any_other_batch(studio):
  drawn = studio.draw(service.DemoRequest("wrapped", 4, "", 7, "1.5", 2))
  loaded = load("wrapped")
  config = sampling.SamplingConfig(guidance=1.5)
  (out,) = batches.generate(
    loaded.model, tiny.CLASSES, np.array([4, 4]), 7, config, 2
  )
  expected = batches.decode(loaded.tokenizer, out.tokens)
  assert drawn.strip.shape == (2, 3, 3, 3, 1)
  assert drawn.title == "wrapped (k = 3, step 1,200)"
  np.testing.assert_array_equal(drawn.strip[:, -1], expected)
  assert not drawn.changed[:, 0].any()


def test_a_prompt_is_what_images_are_made_from(studio, monkeypatch):
  monkeypatch.setattr(studio, "load", load_texts)
  cat, same, other = [
    studio.draw(service.DemoRequest("texts", None, prompt, 0, "1", 2)).strip
    for prompt in ("a cat", "a dog", "something much longer")
  ]
  np.testing.assert_array_equal(cat, same)  # of one length
  assert (cat != other).any()


def test_no_request_compiles_anew(studio):
  studio.draw(service.DemoRequest("wrapped", 0, "", 0, "2", 3))
  programs = (sampling._generate, batches._decode)
  before = [program._cache_size() for program in programs]
  for asked in (
    service.DemoRequest("wrapped", 1, "", 0, "2", 3),
    service.DemoRequest("wrapped", 1, "", 9, "2", 1),
    service.DemoRequest("wrapped", 1, "", 9, "7.5", 2),
  ):
    studio.draw(asked)
  assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(stage="wraped"), "'wraped' is unknown. Did you mean 'wrapped'"),
    (dict(stage="untrained"), "'untrained' is unknown"),
    (dict(label=5), "the class is 5: expected a whole number from 0 to 4"),
    (dict(label=-1), "the class is -1"),
    (dict(label=1.5), "the class is 1.5"),
    (dict(label=None), "the class is None"),
    (dict(label="cat"), "the class is 'cat'"),
    (dict(seed=2**32), "the seed is 4294967296"),
    (dict(seed=float("nan")), "the seed is nan"),
    (dict(num_images=4), "the number of images is 4: .* from 1 to 3"),
    (dict(num_images=0), "the number of images is 0"),
    (dict(guidance="much"), "guidance 'much': expected a scale"),
    (dict(guidance=""), "guidance '': expected a scale"),
    (dict(guidance="51"), "guidance is 51: expected 0 to 50"),
    (dict(guidance="-1"), "guidance is -1"),
    (dict(guidance="nan"), "guidance is nan"),
    (dict(guidance="2:3"), "this model has 1 sub-tokens"),
    (dict(stage="texts", prompt="a" * 501), "501 letters: expected at most"),
    (dict(stage="texts", prompt=" "), "prompt 1 is empty"),
    (dict(stage="texts", prompt="a\0"), "control character"),
  ],
)
def test_a_bad_request_is_refused_in_words(studio, change, message):
  fields = dict(stage="wrapped", label=0, prompt="", seed=0, guidance="1")
  with pytest.raises(ValueError, match=message):
    studio.draw(service.DemoRequest(**{**fields, **change}))


def test_a_checkpoint_that_is_gone_is_named(tmp_path):
  folder = tmp_path / "base" / "checkpoints" / "1200"
  folder.mkdir(parents=True)
  studio = service.Studio(STAGES, tmp_path)
  folder.rmdir()
  with pytest.raises(ValueError, match="base: found no checkpoint"):
    studio.draw(service.DemoRequest("base"))


def test_a_demo_without_anything_to_show_does_not_start(tmp_path):
  with pytest.raises(ValueError, match="no trained stage.*--mode=train"):
    service.Studio(STAGES, tmp_path)
  (tmp_path / "base" / "checkpoints" / "1").mkdir(parents=True)
  with pytest.raises(ValueError, match="'texts' is unknown. Known: .'base'"):
    service.Studio(STAGES, tmp_path, "texts")
  with pytest.raises(ValueError, match="num_images=17: expected 1 to 16"):
    service.Studio(STAGES, tmp_path, num_images=17)


def test_every_look_is_on_the_page(studio):
  drawn = studio.draw(service.DemoRequest("wrapped", num_images=2))
  html = page.looks_html(drawn)
  assert re.findall("class=look data-look=([0-9])( hidden)?>", html) == [
    ("1", " hidden"),
    ("2", " hidden"),
    ("3", ""),
  ]
  share = drawn.changed[:, 2].mean()
  assert 0 < share < 1 and f"Look 3 changed {share:.0%} of the tokens" in html
  assert html.count("data:image/png;base64,") == 6
  base = studio.draw(service.DemoRequest("base"))
  assert "k = 1: this model draws every token once" in page.looks_html(base)
  assert "data:image/gif;base64," in page.growth_html(base)
  # Only what the html was given: nothing that a browser would fetch.
  assert not re.search("(src|href)='(?!data:)", html)


def test_requests_are_bounded(studio):
  app = page.page(studio, "t")
  assert app._queue.max_size == page.MAX_WAITING
  assert app._queue.default_concurrency_limit == 1
  words = [c["props"].get("label") for c in app.get_config_file()["components"]]
  assert "Class, 0 to 4" in words and "Prompt" in words
