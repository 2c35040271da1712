import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tensorar_jax.method import drawing, sampling, windows
from tensorar_jax.method.drawing import TokenConfig
from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.method.tensorar import TensorAR
from tensorar_jax.nn import attention, layers
from tensorar_jax.parallel import sharding
from tests import programs, tiny


def generate(model, batch=2, seed=0, index=None, **options):
  cond = tiny.cond(batch)
  config = SamplingConfig(**options)
  null = tiny.CLASSES.null(cond) if config.guidance != 1 else None
  rng = jax.random.key(seed)
  return sampling.generate(model, cond, null, rng, config, index)


@pytest.mark.parametrize("window", [1, 3, 9])
def test_cached_logits_equal_teacher_forced_ones_on_the_same_windows(window):
  """Properties 3 and 5."""
  model = tiny.wrapped(window)
  out = generate(model, return_logits=True)
  assert out.drafts.shape == (2, 9, window, 1)
  np.testing.assert_array_equal(out.tokens, out.drafts[:, :, 0])
  valid = windows.valid_slots(jnp.arange(9), window, 9)
  inputs = tiny.cond(), out.drafts[:, :-1], valid[:-1]
  hidden = programs.forward(model, *inputs)
  want = programs.logits(model, hidden, out.drafts)[0]
  np.testing.assert_allclose(out.logits[0], want, atol=2e-4)


def test_both_cache_layouts_compute_the_same():
  """Single layers, transposed on a CPU, and layers under scan (TPU)."""
  model, cond = tiny.wrapped(2), tiny.cond()
  x = jax.random.normal(jax.random.key(0), (2, 8, 16))
  want = programs.forward(model.backbone, cond, x)
  for platform in ("cpu", "gpu", "tpu"):
    layout = layers.for_decoding(model, platform)
    got = programs.cached(layout.backbone, cond, x)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_model_is_prepared_once_and_samples_the_same():
  model = tiny.wrapped(2)
  prepared = sampling.prepare(model, sharding.local_mesh())
  assert sampling.prepare(prepared, sharding.local_mesh()) is prepared
  names = {p[-1] for p, _ in nnx.to_flat_state(nnx.state(prepared))}
  assert "transposed" in names and "kernel" not in names
  want, got = (generate(m, return_logits=True) for m in (model, prepared))
  np.testing.assert_array_equal(got.drafts, want.drafts)
  np.testing.assert_allclose(got.logits[0], want.logits[0], atol=2e-5)


@pytest.mark.parametrize(
  "platform, is_single, is_transposed",
  [("cpu", True, True), ("gpu", True, False), ("tpu", False, False)],
)
def test_a_model_is_prepared_for_its_platform(
  platform, is_single, is_transposed, monkeypatch
):
  """Whatever the form, it draws the same."""
  model = tiny.wrapped(2)
  monkeypatch.setattr(sharding, "platform_of", lambda device: platform)
  prepared = sampling.prepare(model, sharding.local_mesh())
  assert layers.is_for_decoding(prepared) == is_single
  assert not layers.is_for_decoding(model)
  names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(prepared))}
  assert ("transposed" in names, "kernel" in names) == (
    is_transposed,
    not is_transposed,
  )
  monkeypatch.undo()
  want, got = (generate(m, return_logits=True) for m in (model, prepared))
  np.testing.assert_array_equal(got.drafts, want.drafts)
  np.testing.assert_allclose(got.logits[0], want.logits[0], atol=2e-5)


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize(
  "platform, loops", [("cpu", 1), ("gpu", 1), ("tpu", 3)]
)
def test_only_tpus_loop_over_layers(platform, loops, is_prepared, monkeypatch):
  """One loop is over the tokens; the others are of prefill and of a step."""
  model = tiny.wrapped(2)
  monkeypatch.setattr(sharding, "platform_of", lambda device: platform)
  if is_prepared:
    model = sampling.prepare(model, sharding.local_mesh())
  monkeypatch.setattr(
    sampling, "_platform_and_mesh", lambda cond: (platform, None)
  )
  sampling._generate.clear_cache()
  traced = sampling.trace(
    model, tiny.cond(), None, jax.random.key(0), SamplingConfig()
  )
  sampling._generate.clear_cache()
  assert str(traced.jaxpr).count(" scan[") == loops


def test_weights_are_read_in_the_dtype_of_the_computation():
  config = dataclasses.replace(tiny.backbone().config, dtype="bfloat16")
  base = type(tiny.backbone())(config, rngs=nnx.Rngs(0))
  model = TensorAR(base, window=2, rngs=nnx.Rngs(1))
  narrow = sampling.in_compute_dtype(model)
  for path, weight in nnx.to_flat_state(nnx.state(narrow)):
    if path[-1] in ("kernel", "embedding") and path[0] == "backbone":
      assert weight.dtype == jnp.bfloat16, path
  want, got = (generate(m, return_logits=True) for m in (model, narrow))
  np.testing.assert_array_equal(got.logits[0], want.logits[0])


def test_window_one_samples_what_the_base_model_samples():
  """Property 1: against a loop written without any of the wrapping."""
  base = tiny.backbone()
  cond, rng = tiny.cond(), jax.random.key(0)
  got = sampling.generate(TensorAR(base), cond, None, rng)

  tokens = jnp.zeros((2, 0, 1), jnp.int32)
  for n in range(9):
    hidden = base(cond, base.embed(tokens))[:, -1]
    logits = base.logits(hidden, jnp.zeros((2, 1), jnp.int32))[0]
    cdf = np.cumsum(np.asarray(jax.nn.softmax(logits)), axis=-1)
    new = []
    for i in range(2):
      key = rng
      for part in (i, n, 0):
        key = jax.random.fold_in(key, part)
      uniform = float(jax.random.uniform(key, (1,))[0])
      new.append(int(np.argmax(cdf[i] > uniform * cdf[i, -1])))
    new = jnp.asarray(new, jnp.int32)[:, None, None]
    tokens = jnp.concatenate([tokens, new], axis=1)
  np.testing.assert_array_equal(got.tokens, tokens)


def test_freshly_wrapped_samples_what_the_base_model_samples():
  model = tiny.fresh(3)
  base = TensorAR(model.backbone)
  for options in ({}, {"guidance": 2.0, "top_k": 5}, {"temperature": 0.0}):
    a, b = generate(model, **options), generate(base, **options)
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_an_image_does_not_depend_on_its_batch():
  """Property 7: the noise stream is (seed, index of the image) alone."""
  model = tiny.wrapped(3)
  labels = np.asarray([1, 4, 0, 2, 3, 1, 0, 4])
  rng = jax.random.key(7)

  def draw(index):
    cond = tiny.CLASSES.encode(labels[index])
    null = tiny.CLASSES.null(cond)
    config = SamplingConfig(guidance=1.5)
    out = sampling.generate(model, cond, null, rng, config, jnp.asarray(index))
    return np.asarray(out.drafts)

  whole = draw(np.arange(8))
  for index in ([0, 1, 2], [5], [7, 3, 6]):
    np.testing.assert_array_equal(draw(np.asarray(index)), whole[index])
  assert (whole[0] != whole[1]).any()


def test_guidance_combines_and_the_interval_switches_it_off():
  model = tiny.wrapped(2)
  options = {"temperature": 0.0, "return_logits": True}
  cond, uncond = tiny.cond(), tiny.CLASSES.null(tiny.cond())
  out = generate(model, guidance=3.0, guidance_interval=(0, 4), **options)
  valid = windows.valid_slots(jnp.arange(9), 2, 9)
  rows = []
  for c in (cond, uncond):
    hidden = programs.forward(model, c, out.drafts[:, :-1], valid[:-1])
    rows.append(programs.logits(model, hidden, out.drafts)[0])
  want = rows[1] + 3.0 * (rows[0] - rows[1])
  want = want.at[:, 4:].set(rows[0][:, 4:])
  np.testing.assert_allclose(out.logits[0], want, atol=1e-3)
  np.testing.assert_array_equal(
    SamplingConfig(guidance=3.0, guidance_interval=(2, 4)).guidance_scales(6)[
      :, 0
    ],
    [1, 1, 3, 3, 1, 1],
  )


def test_power_cosine_guidance_is_the_published_schedule(parity):
  io = np.load(parity / "rar" / "schedules" / "io.npz")
  for i, (scale, power, steps) in enumerate(io["cfg_params"]):
    config = SamplingConfig(guidance=scale, guidance_power=power)
    got = config.guidance_scales(int(steps))[:, 0]
    np.testing.assert_allclose(got, io[f"cfg_{i:02d}"], rtol=1e-6)


def test_settings_may_differ_between_sub_tokens():
  config = SamplingConfig(
    temperature=(1.0, 0.0), guidance=(1.9, 2.0), top_k=(0, 3)
  )
  first, second = config.sub_token(0), config.sub_token(1)
  assert (first.temperature, second.temperature) == (1.0, 0.0)
  assert (first.top_k, second.top_k) == (0, 3)
  assert first.top_p == second.top_p == 1.0
  assert config.guided and hash(config) == hash(config)
  np.testing.assert_allclose(config.guidance_scales(3, 2), [[1.9, 2.0]] * 3)
  config.check(2)
  with pytest.raises(ValueError, match="this model has 1 sub-tokens"):
    generate(tiny.wrapped(2), top_p=(0.9, 1.0))
  with pytest.raises(ValueError, match=r"top_p=\(1.0, 0.0\)"):
    SamplingConfig(top_p=(1.0, 0.0))


def test_small_scales_mean_no_guidance_where_the_config_says_so():
  zero = SamplingConfig(guidance=0.0)
  assert zero.guided and (zero.guidance_scales(3) == 0).all()
  for unguided, scales, want in (
    (0.0, 0.0, [1.0]),
    (0.0, 0.5, [0.5]),
    (1.0, 0.5, [1.0]),
    (1.0, (1.9, 0.5), [1.9, 1.0]),
  ):
    config = SamplingConfig(guidance=scales, unguided_scale=unguided)
    got = config.guidance_scales(3, len(want))
    np.testing.assert_allclose(got, [want] * 3)
    assert config.guided == (want != [1.0])
  with pytest.raises(ValueError, match="unguided_scale=nan: expected a finite"):
    SamplingConfig(unguided_scale=np.nan)


def test_guidance_one_is_unguided_sampling():
  model, cond = tiny.wrapped(2), tiny.cond()
  rng = jax.random.key(0)
  a = sampling.generate(model, cond, tiny.CLASSES.null(cond), rng)
  b = sampling.generate(model, cond, None, rng)
  np.testing.assert_array_equal(a.drafts, b.drafts)


def test_drafts_have_their_own_temperature():
  model = tiny.wrapped(3)
  greedy = generate(model, draft_temperature=0.0, return_logits=True)
  best = jnp.argmax(greedy.logits[0], axis=-1)
  np.testing.assert_array_equal(greedy.drafts[:, :, 1:, 0], best[:, :, 1:])
  assert (greedy.tokens[..., 0] != best[:, :, 0]).any()


def test_draws_follow_the_filtered_distribution():
  logits = jnp.log(jnp.asarray([0.4, 0.3, 0.15, 0.1, 0.05]))
  uniform = (jnp.arange(4000) + 0.5) / 4000
  batch = jnp.broadcast_to(logits, (4000, 5))

  def frequencies(config, temperature=1.0):
    draws = drawing.invert_cdf(uniform, batch, temperature, config)
    return np.bincount(draws, minlength=5) / 4000

  np.testing.assert_allclose(
    frequencies(TokenConfig()), [0.4, 0.3, 0.15, 0.1, 0.05], atol=1e-3
  )
  np.testing.assert_allclose(
    frequencies(TokenConfig(top_k=2)), [4 / 7, 3 / 7, 0, 0, 0], atol=1e-3
  )
  np.testing.assert_allclose(
    frequencies(TokenConfig(top_p=0.5)), [4 / 7, 3 / 7, 0, 0, 0], atol=1e-3
  )
  sharp = np.asarray([0.4, 0.3, 0.15, 0.1, 0.05]) ** 2
  np.testing.assert_allclose(
    frequencies(TokenConfig(), 0.5), sharp / sharp.sum(), atol=1e-3
  )


def test_ties_survive_top_k_and_the_first_of_them_top_p():
  logits = jnp.asarray([[1.0, -0.0, 0.0, -1.0], [2.0, 2.0, 2.0, -jnp.inf]])

  def kept(**options):
    out = drawing.filter_logits(logits, TokenConfig(**options))
    return np.isfinite(out).astype(int).tolist()

  assert kept(top_k=2) == [[1, 1, 1, 0], [1, 1, 1, 0]]
  # 0.51, 0.19, 0.19, 0.07 and three times 1/3.
  assert kept(top_p=0.6) == [[1, 1, 0, 0], [1, 1, 0, 0]]
  assert kept(top_k=2, top_p=0.5) == [[1, 0, 0, 0], [1, 1, 0, 0]]
  assert kept(top_p=0.01) == [[1, 0, 0, 0], [1, 0, 0, 0]]


def test_nothing_is_compiled_twice():
  model = tiny.wrapped(2)
  generate(model, seed=0)
  before = sampling._generate._cache_size()
  generate(model, seed=1, index=jnp.asarray([4, 9]))
  generate(tiny.wrapped(2, seed=3), seed=2)
  for scale in (1.5, 2.5):
    generate(model, guidance=scale)
  generate(model, guidance=3.0, guidance_interval=(1, 4))
  before += 1  # the guided program, once for every scale
  assert sampling._generate._cache_size() == before


@pytest.mark.parametrize(
  "options",
  [
    {"temperature": -1.0},
    {"top_k": -2},
    {"top_p": 0.0},
    {"guidance": float("nan")},
    {"guidance_interval": (3, 1)},
  ],
)
def test_bad_settings_are_refused_by_name(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    SamplingConfig(**options)


def test_bad_calls_say_what_to_do():
  model, cond = tiny.fresh(2), tiny.cond()
  with pytest.raises(ValueError, match="null=conditioning.null"):
    sampling.generate(
      model, cond, None, jax.random.key(0), SamplingConfig(guidance=2.0)
    )
  with pytest.raises(ValueError, match="image_index"):
    sampling.generate(
      model, cond, None, jax.random.key(0), image_index=jnp.arange(3)
    )
  with pytest.raises(ValueError, match="jax.random.key"):
    sampling.generate(model, cond, None, jax.random.PRNGKey(0))
  with pytest.raises(ValueError, match="class id 5"):
    tiny.CLASSES.encode([1, 5])
  with pytest.raises(ValueError, match="class id -1"):
    tiny.CLASSES.encode([-1])


@pytest.mark.parametrize("name, rows", [("cpu", 2), ("cuda", 1), ("tpu", 1)])
def test_one_device_is_traced_for_what_it_is(name, rows, monkeypatch):
  """Also if it is not there, as a single target of --mode=compile is not.

  A CPU multiplies a row of bfloat16 as two.
  """
  config = dataclasses.replace(tiny.backbone().config, dtype="bfloat16")
  model = TensorAR(type(tiny.backbone())(config, rngs=nnx.Rngs(0)))
  cond = tiny.cond()
  seen = set()
  plain = attention.plain

  def spy(q, *args):
    seen.add((sharding.platform(), q.shape[2]))
    return plain(q, *args)

  monkeypatch.setattr(attention, "plain", spy)
  device = types.SimpleNamespace(platform=name)
  place = types.SimpleNamespace(device_set=[device], num_devices=1)
  cond = jax.tree.map(
    lambda a: types.SimpleNamespace(shape=a.shape, sharding=place), cond
  )
  platform, mesh = sampling._platform_and_mesh(cond)
  assert mesh is None
  monkeypatch.setattr(
    sampling, "_platform_and_mesh", lambda cond: (platform, None)
  )
  sampling._generate.clear_cache()
  rng = jax.random.key(0)
  sampling.trace(model, tiny.cond(), None, rng, SamplingConfig())
  sampling._generate.clear_cache()
  platform = "gpu" if name == "cuda" else name
  assert (platform, rows) in seen and {p for p, _ in seen} == {platform}


def test_no_removed_token_is_ever_drawn():
  """Float32 sums of thousands of terms are not monotone."""
  logits = jax.random.normal(jax.random.key(0), (4, 16384)) * 2
  config = TokenConfig(top_k=2000)
  even = np.linspace(0, 1 - 2**-24, 4000, dtype=np.float32)
  draw = lambda u, row: drawing.invert_cdf(u, row, 1.0, config)
  for row in logits:
    probs = drawing.token_probs(row, 1.0, config)
    cdf = np.asarray(jnp.cumsum(probs))
    # Where the sum rises although a removed token adds nothing.
    rises = (probs[1:] == 0) & (cdf[1:] > cdf[:-1])
    assert rises.any()
    uniform = np.concatenate([even, cdf[:-1][rises] / cdf.max()])
    # The row is filtered and summed once for all its draws.
    draws = jax.vmap(draw, in_axes=(0, None))(uniform, row)
    assert (probs[draws] > 0).all()


def test_classes_that_the_model_does_not_know_are_refused():
  model = tiny.fresh(2)
  from tensorar_jax.conditioning.conditions import ClassConditioning

  with pytest.raises(ValueError, match="knows 5 classes"):
    sampling.generate(
      model, ClassConditioning(10).encode([1, 7]), None, jax.random.key(0)
    )
  bare = TensorAR(tiny.backbone(null_class=False))
  cond = tiny.cond()
  sampling.generate(bare, cond, None, jax.random.key(0))
  with pytest.raises(ValueError, match="no null class"):
    sampling.generate(
      bare,
      cond,
      tiny.CLASSES.null(cond),
      jax.random.key(0),
      SamplingConfig(guidance=2.0),
    )
  with pytest.raises((ValueError, TypeError), match="TensorAR"):
    sampling.generate(tiny.backbone(), cond, None, jax.random.key(0))
