"""The benchmark's peer: what a PyTorch user would run instead.

The peer is Hugging Face's `LlamaForCausalLM` at the backbone's sizes, with
random weights. It runs unchanged (`eager`), with `torch.compile` (`compile`),
and on GPUs with CUDA graphs as well (`graphs`, the mode "reduce-overhead"). It
decodes one token a step with a static KV cache, guided with [cond | null] rows
in one batch, and samples with the same settings; sampling is compiled too. It
trains with AdamW on the cross-entropy. Weights and cache have the config's
dtype, and products of float32 follow --precision. Training in bfloat16 uses
autocast over float32 weights, as here.

The peer has a process of its own, started with
`python -m tensorar_jax.performance.peer_torch`, which reads requests and writes
answers, each as one line of JSON. So the threads, allocator and crashes of one
framework do not affect the other.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tensorar_jax.method.sampling_config import SamplingConfig
from tensorar_jax.nn import layers
from tensorar_jax.parallel import chips
from tensorar_jax.performance import machine, workloads
from tensorar_jax.performance.workloads import Case, Work

MODES = ("eager", "compile", "graphs")
PACKAGES = ("torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of a LLaMA over image tokens, after `prefix` condition rows."""

  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  mlp_width: int
  vocab_size: int
  num_tokens: int
  prefix: int
  dtype: str


def sizes_of(backbone: Any, cond: Mapping) -> Sizes:
  """Returns a backbone's sizes; ValueError if it is no one-token LLaMA."""
  block = getattr(backbone.config, "block", None)
  if not isinstance(block, layers.BlockConfig) or len(backbone.vocab_sizes) > 1:
    raise ValueError(
      f"--peer=torch: the blocks of {type(backbone).__module__} with"
      f" vocabularies {backbone.vocab_sizes} are not those of a LLaMA with one"
      " token a step, so there is no peer for it. Leave --peer out."
    )
  _, cache = jax.eval_shape(backbone.prefill, cond)
  return Sizes(
    width=block.width,
    num_layers=backbone.config.num_layers,
    num_heads=block.num_heads,
    num_kv_heads=block.num_kv_heads,
    mlp_width=block.mlp_width,
    vocab_size=backbone.vocab_sizes[0],
    num_tokens=backbone.num_tokens,
    prefix=layers.cache_rows(cache) - backbone.num_tokens,
    dtype=block.dtype,
  )


def check_installed() -> None:
  """Raises ValueError unless the peer's packages are installed."""
  missing = [p for p in PACKAGES if importlib.util.find_spec(p) is None]
  if missing:
    raise ValueError(
      f"--peer=torch needs {missing}: pip install 'tensorar_jax[peer]'."
    )


# --- the benchmark's side ----------------------------------------------------


class Peer:
  """The process of the peer; call `close` when done."""

  def __init__(self, sizes: Sizes, config: SamplingConfig):
    check_installed()
    options = dataclasses.asdict(config.sub_token(0))
    guidance = config.guidance if config.guided else workloads.GUIDANCE
    options["guidance"] = float(np.ravel(guidance)[0])
    self._process = subprocess.Popen(
      [sys.executable, "-m", __spec__.name],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert self._process.stdin and self._process.stdout  # pipes
    self._requests, self._answers = self._process.stdin, self._process.stdout
    try:
      self.about = self._ask(
        sizes=dataclasses.asdict(sizes),
        sampling=options,
        threads=machine.cores(),
        products=chips.products_of(sizes.dtype, jax.default_backend()),
        device="cpu" if jax.default_backend() == "cpu" else "cuda",
      )
    except RuntimeError as error:
      self.close()
      raise ValueError(f"--peer=torch: {error}") from error

  def _ask(self, **request) -> dict[str, Any]:
    try:
      self._requests.write(json.dumps(request) + "\n")
      self._requests.flush()
      line = self._answers.readline()
    except BrokenPipeError:
      line = ""
    if not line:
      raise RuntimeError(f"the peer has ended with code {self._process.wait()}")
    answer = json.loads(line)
    if "error" in answer:
      raise RuntimeError(answer["error"])
    return answer

  def case(self, work: Work, mode: str) -> Case:
    """Returns `work` as a case in one of MODES.

    Running the case raises RuntimeError if the peer cannot do the work.
    """
    size = dict(kind=work.kind, batch=work.batch, mode=mode)
    return Case(
      work,
      f"torch {mode}",
      warm_up=lambda: self._ask(prepare=size),
      time=lambda count: self._ask(run=size, count=count),
    )

  def close(self) -> None:
    """Ends the peer's process."""
    self._requests.close()
    try:
      self._process.wait(timeout=30)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()


# --- the peer's side ---------------------------------------------------------


class Llama:
  """The models that the peer's process runs."""

  def __init__(self, sizes: Sizes, options: Mapping, device: str):
    import torch
    import transformers

    self.sizes, self.options, self.device = sizes, options, device
    self.dtype = getattr(torch, sizes.dtype)
    config = transformers.LlamaConfig(
      vocab_size=sizes.vocab_size,
      hidden_size=sizes.width,
      intermediate_size=sizes.mlp_width,
      num_hidden_layers=sizes.num_layers,
      num_attention_heads=sizes.num_heads,
      num_key_value_heads=sizes.num_kv_heads,
      max_position_embeddings=sizes.prefix + sizes.num_tokens,
      tie_word_embeddings=False,
      use_cache=False,
    )
    torch.zeros((), device=device)  # raises if there is no such device
    torch.manual_seed(0)
    # A decorator in transformers hides the arguments of `to`.
    self.make = lambda: transformers.LlamaForCausalLM(config).to(device)  # pyright: ignore[reportArgumentType]
    self._decoder = None

  def decoder(self, batch: int, mode: str):
    """Returns a function that generates `batch` guided images."""
    import torch
    import transformers

    if self._decoder is None:
      self._decoder = self.make().to(self.dtype).eval()
    model, sizes, options = self._decoder, self.sizes, self.options
    rows = 2 * batch  # [cond | null]
    length = sizes.prefix + sizes.num_tokens
    prefix = torch.randn(
      (rows, sizes.prefix, sizes.width), dtype=self.dtype, device=self.device
    )
    # All runs share one cache: a CUDA graph knows its arrays by address.
    cache = transformers.StaticCache(model.config, max_cache_len=length)
    state = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step(tokens):
      out = model(input_ids=torch.cat([tokens, tokens]), **state)
      return draw(out.logits[:, -1], options)

    advance = compiled(step, mode)
    graphs = mode == "graphs"
    without_gradients = torch.no_grad if graphs else torch.inference_mode

    @without_gradients()
    def generate():
      cache.reset()
      out = model(inputs_embeds=prefix, **state)
      tokens = [draw(out.logits[:, -1], options)]
      for _ in range(sizes.num_tokens - 1):
        if graphs:
          torch.compiler.cudagraph_mark_step_begin()
        new = advance(tokens[-1])
        # The next replay of a graph overwrites this result.
        tokens.append(new.clone() if graphs else new)
      return torch.cat(tokens, dim=1).cpu()

    return generate

  def trainer(self, batch: int, mode: str):
    """Returns a function that makes one training step and waits for it."""
    import torch

    sizes, model = self.sizes, self.make().train()
    forward = compiled(model, mode)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (batch, sizes.num_tokens)
    tokens = torch.randint(sizes.vocab_size, shape, device=self.device)
    prefix = torch.randn((batch, sizes.prefix, sizes.width), device=self.device)
    autocast = torch.autocast(
      self.device, self.dtype, enabled=self.dtype != torch.float32
    )

    def step():
      with autocast:
        x = model.get_input_embeddings()(tokens[:, :-1])
        out = forward(
          inputs_embeds=torch.cat([prefix, x], dim=1),
          logits_to_keep=sizes.num_tokens,
        )
      logits = out.logits.float().flatten(0, 1)
      loss = torch.nn.functional.cross_entropy(logits, tokens.flatten())
      loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      optimiser.step()
      optimiser.zero_grad()
      return loss.item()

    return step


def compiled(function, mode: str):
  """Returns `function`, compiled as one of MODES says."""
  import torch

  if mode == "eager":
    return function
  kind = "reduce-overhead" if mode == "graphs" else "default"
  return torch.compile(function, dynamic=False, mode=kind)


def draw(logits, options: Mapping):
  """Draws tokens [B, 1] from [cond | null] logits [2B, V]."""
  import torch

  cond, null = logits.float().chunk(2)
  logits = null + options["guidance"] * (cond - null)
  if options["temperature"] == 0:
    return logits.argmax(dim=-1, keepdim=True)
  logits = logits / options["temperature"]
  if 0 < options["top_k"] < logits.shape[-1]:
    least = torch.topk(logits, options["top_k"]).values[:, -1:]
    logits = logits.masked_fill(logits < least, -torch.inf)
  if options["top_p"] < 1:
    ranked, order = torch.sort(logits, descending=True)
    before = ranked.softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = 0
    ranked = ranked.masked_fill(before > options["top_p"], -torch.inf)
    logits = torch.empty_like(logits).scatter(-1, order, ranked)
  # As `torch.multinomial` draws, but without a wait for the result on the host.
  weights = logits.softmax(dim=-1)
  race = torch.empty_like(weights).exponential_()
  return (weights / race).argmax(dim=-1, keepdim=True)


def serve(requests, answers) -> None:
  """Answers each line of `requests` until the input ends."""
  import torch
  import transformers

  llama: Llama | None = None
  runs: dict[str, Any] = {}

  def answer(request):
    nonlocal llama
    if "sizes" in request:
      torch.set_num_threads(request["threads"])
      exact = request["products"] == "float32"
      torch.set_float32_matmul_precision("highest" if exact else "high")
      sizes = Sizes(**request["sizes"])
      llama = Llama(sizes, request["sampling"], request["device"])
      return {m.__name__: m.__version__ for m in (torch, transformers)}
    if "run" in request:
      run = runs[json.dumps(request["run"])]
      return machine.watched(run, request["count"])
    if llama is None:
      raise ValueError("the first request must have `sizes`")
    size = request["prepare"]
    make = llama.decoder if size["kind"] == "decode" else llama.trainer
    run = make(size["batch"], size["mode"])
    runs[json.dumps(size)] = run
    first_run = {"seconds": machine.seconds(run)}
    if llama.device == "cuda":
      first_run["device_bytes"] = torch.cuda.max_memory_allocated()
      torch.cuda.reset_peak_memory_stats()
    return first_run

  for line in requests:
    try:
      result = answer(json.loads(line))
    # Any failure, a compiler's included, becomes a line of the table.
    except Exception as error:
      result = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(result), file=answers, flush=True)


def main() -> None:
  # Libraries and compilers print to standard output. Keep it for the answers
  # and send all other output to standard error.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  serve(sys.stdin, answers)


if __name__ == "__main__":
  main()
