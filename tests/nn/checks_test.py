"""What comes from outside is checked at the edge, with and without hooks."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from tensorar_jax.backbones import janus, llamagen, open_magvit2, rar
from tensorar_jax.data import pipeline, sources
from tensorar_jax.experiment import schema
from tensorar_jax.generation import requests
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.nn import checks, classifier
from tensorar_jax.tokenizers import lfq, maskgit_vq, pixels, vq
from tests import tiny
from tests.e2e.commands import ROOT

IMAGES, TOKENS = (
  "np.zeros((2, 6, 6, 3), np.float32)",
  "np.zeros((2, 9, 1), int)",
)
# A wrong call of the public API -> what it says.
CALLS = {
  f"vq.encode({IMAGES}.astype(np.uint8))": "uint8.*images / 127.5 - 1",
  f"vq.encode({IMAGES} + 200)": r"from 200 to 200: expected \[-1, 1\]",
  f"vq.encode({IMAGES} * np.nan)": r"nan.*expected \[-1, 1\]",
  f"vq.encode({IMAGES}.transpose(0, 3, 1, 2))": r"transpose\(0, 2, 3, 1\)",
  f"vq.encode({IMAGES}[..., :1])": "expected 3 channels .*convert",
  f"vq.encode({IMAGES}[0])": r"expected \[B, h, w, 3\].*images\[None\]",
  f"vq.encode({IMAGES}.tolist())": "a list: expected an array",
  f"pixels.encode({IMAGES}[:, :3, :3, :1].astype(np.uint8))": "uint8",
  f"pixels.encode({IMAGES}.transpose(0, 3, 1, 2)[:, :1])": "transpose",
  f"vq.decode({TOKENS}[..., 0])": r"\[B, T, F\] with F = 1.*\[..., None\]",
  f"vq.decode({TOKENS} * 1.0)": "float64: expected integers",
  f"vq.decode({TOKENS} + 11)": "token 11: expected 0 to 10",
  f"vq.decode({TOKENS} - 1)": "token -1: expected 0 to 10",
  f"pixels.decode({TOKENS} + 11)": "token 11: expected 0 to 10",
  f"llamagen.embed({TOKENS}[..., 0])": r"\(2, 9\).*tokens\[..., None\]",
  f"llamagen.embed({TOKENS} + 11)": "token 11: expected 0 to 10",
  f"rar.embed({TOKENS}[..., 0])": r"\(2, 9\).*tokens\[..., None\]",
  f"janus.embed({TOKENS}[..., 0])": r"\(2, 9\).*tokens\[..., None\]",
  f"open_magvit2.embed({TOKENS})": r"\(2, 9, 1\).*F = 2",
  f"wrapped(tiny.cond(), {TOKENS}[:, :8, None], np.ones((8, 1), bool))": (
    "expected k = 3 slots"
  ),
  "SamplingConfig(top_k=1.7)": "top_k=1.7: expected a whole number",
  "SamplingConfig(top_k=np.inf)": "top_k=inf: expected a whole number",
  "SamplingConfig(guidance_interval=(0.5, 3))": "expected whole numbers",
  f"jax.jit(vq.encode)({IMAGES}.astype(np.uint8))": "uint8",
}
# The models have no arrays: a wrong call does not get as far as to read them.
SCRIPT = """
import json, sys
import jax, numpy as np
from flax import nnx
from tensorar_jax.experiment import families
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.parallel import weights
from tests import tiny

def make(kind, name, **fields):
  module = families.family(kind, name)
  config = families.config_of(module, None, fields, name)
  return weights.abstract(lambda rngs: module.Model(config, rngs=rngs))

small = dict(grid=(3, 3), width=16, num_layers=1, num_heads=2)
names = {
  name: make("backbones", name, vocab_size=11, **small)
  for name in ("llamagen", "rar", "janus")
}
names["open_magvit2"] = make("backbones", "open_magvit2", **small)
names["vq"] = make("tokenizers", "vq", **tiny.VQ)
names["pixels"] = make("tokenizers", "pixels", image_size=(3, 3), levels=11)
names["wrapped"] = weights.abstract(
  lambda rngs: TensorAR(names["llamagen"], window=3, rngs=rngs)
)
said = {}
for call in json.loads(sys.argv[1]):
  try:
    eval(call, dict(names, **globals()))
  except ValueError as error:
    said[call] = str(error)
print(json.dumps(said))
"""


def test_the_public_api_checks_without_the_tests_hook():
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, json.dumps(list(CALLS))],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  said = json.loads(done.stdout)
  for call, want in CALLS.items():
    assert re.search(want, said.get(call, "")), (call, said.get(call), want)


def test_values_of_traced_arrays_are_not_asked_for():
  tokens = np.full((2, 9, 1), 11, np.int32)
  jax.jit(lambda t: checks.tokens(t, (11,)))(tokens)
  with pytest.raises(ValueError, match="token 11"):
    checks.tokens(tokens, (11,))


SOURCE = sources.ArraySource(
  np.zeros((4, 1, 1, 1), np.uint8), np.zeros(4, np.int32), 1
)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 2**64])
def test_a_seed_that_jax_would_cut_is_refused_everywhere(seed):
  for use in (
    lambda: requests.Request(seed=seed),
    lambda: schema.Stage(seed=seed),
    lambda: pipeline.train_iterator(SOURCE, batch_size=1, seed=seed),
  ):
    with pytest.raises(ValueError, match=re.escape(f"seed={seed}: expected")):
      use()


def test_seeds_that_differ_are_kept():
  for other in (0.5, True, "1", None):
    with pytest.raises(ValueError, match=f"seed={other!r}: expected"):
      checks.seed(other)
  for seed in (0, 1, 2**31, 2**32 - 1):
    assert requests.Request(seed=seed).seed == seed
    key = jax.random.key_data(jax.random.key(checks.seed(seed)))
    assert int(key[-1]) == seed


# A config that is right -> values that no model or run can be made of.
BAD = {
  schema.OptimConfig(): dict(
    clip_norm=(-1.0, np.nan, np.inf),
    eps=(-1e-8, 0.0, np.nan),
    beta1=(-0.1, 1.0, np.nan),
    beta2=(-0.1, 1.0, np.nan),
    warmup_steps=(-1,),
    final_weight_decay=(-1.0, np.nan),
    learning_rate=(-1.0, np.nan, np.inf),
    no_decay=("(",),
  ),
  schema.TensorARConfig(): dict(
    window=(0, -1), depth=(0,), mlp_ratio=(np.nan, np.inf, 0.0)
  ),
  schema.EvaluationConfig(models=("a",)): dict(
    num_images=(10**9, 9), guidance=((np.nan,),)
  ),
  SamplingConfig(): dict(top_k=(-1,), temperature=(np.inf, np.nan)),
  tiny.CONFIG: dict(
    num_layers=(0, -1),
    num_heads=(0,),
    num_kv_heads=(0,),
    num_classes=(0,),
    vocab_size=(0,),
    grid=((0, 0),),
    mlp_scale=(0.0, np.nan),
    rope_base=(0.0,),
    norm_eps=(-1.0,),
    token_dropout=(1.0, np.nan),
    drop_path=(-0.1,),
  ),
  rar.Config(): dict(num_layers=(0,), num_classes=(0,), norm_eps=(np.nan,)),
  janus.Config(): dict(num_layers=(0,), num_kv_heads=(0,), grid=((0, 3),)),
  open_magvit2.Config(): dict(num_inner_layers=(0,), vocab_sizes=((0, 3),)),
  vq.Config(): dict(
    num_res_blocks=(0,), codebook_size=(0,), channel_multipliers=((),)
  )
  | dict(norm_groups=(0,), entropy_weight=(np.nan,)),
  lfq.Config(): dict(channels=(0,), commitment_weight=(-1.0,)),
  maskgit_vq.Config(): dict(code_dim=(0,), codebook_weight=(np.inf,)),
  pixels.Config(): dict(image_size=((0, 8),), image_channels=(0,)),
  classifier.Config(): dict(width=(0,), halvings=(-1,), num_classes=(0,)),
}


@pytest.mark.parametrize("good", BAD, ids=lambda c: type(c).__module__)
def test_values_that_nothing_can_be_made_of_are_refused(good):
  for field, values in BAD[good].items():
    for value in values:
      with pytest.raises(ValueError, match=f"{field}="):
        dataclasses.replace(good, **{field: value})


def test_a_request_is_bounded_before_anything_is_allocated():
  with pytest.raises(ValueError, match="num_images=1000000000: .*10,000,000"):
    requests.Request(num_images=10**9)
  with pytest.raises(ValueError, match="of each of 2 prompts"):
    requests.Request(num_images=6_000_000, prompts=("a", "b"))
  with pytest.raises(ValueError, match="resize=100000: expected 1 to 4096"):
    requests.Request(resize=100_000)


def test_sizes_that_papers_use_pass():
  requests.Request(num_images=50_000, resize=256)
  for module in (llamagen, rar, janus, open_magvit2, vq, lfq, maskgit_vq):
    assert module.VARIANTS  # made, and so checked, where they are imported
