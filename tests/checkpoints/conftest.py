"""A state dict as PyTorch would hold it."""

import pytest
import torch

from tests import tiny


@pytest.fixture
def state():
  """A random state dict of the tiny model, as PyTorch would hold it."""
  c = tiny.CONFIG
  width, mlp = c.width, c.block.mlp_width
  qkv = width + 2 * c.block.num_kv_heads * c.block.head_dim
  shapes = {
    "cls_embedding.embedding_table.weight": (c.num_classes + 1, width),
    "tok_embeddings.weight": (c.vocab_size, width),
    "norm.weight": (width,),
    "output.weight": (c.vocab_size, width),
  }
  for i in range(c.num_layers):
    shapes |= {
      f"layers.{i}.attention.wqkv.weight": (qkv, width),
      f"layers.{i}.attention.wo.weight": (width, width),
      f"layers.{i}.feed_forward.w1.weight": (mlp, width),
      f"layers.{i}.feed_forward.w3.weight": (mlp, width),
      f"layers.{i}.feed_forward.w2.weight": (width, mlp),
      f"layers.{i}.attention_norm.weight": (width,),
      f"layers.{i}.ffn_norm.weight": (width,),
    }
  rng = torch.Generator().manual_seed(0)
  return {n: torch.randn(s, generator=rng) for n, s in shapes.items()}
