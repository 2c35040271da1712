"""The marginals of a stage: written, read, and named if they cannot be."""

import numpy as np
import pytest

from tensorar_jax.generation import guesses
from tensorar_jax.method.sampling_config import SamplingConfig

CONFIG = SamplingConfig(decoder="parallel", first_guess="marginals")
TOKENS = np.array([[[0, 1], [2, 0]], [[0, 1], [1, 0]]])  # of 2 images


def test_what_is_written_is_read(tmp_path):
  guesses.save(tmp_path, TOKENS, (3, 2), np.array([0, 1]), num_classes=2)
  table = guesses.load(tmp_path, CONFIG)
  assert [a.shape for a in table.logits] == [(2, 2, 3), (2, 2, 2)]
  np.testing.assert_allclose(np.exp(table.logits[0]).sum(-1), 1, rtol=1e-6)
  np.testing.assert_array_equal(table.logits[0].argmax(-1), [[0, 2], [0, 1]])
  assert guesses.load(tmp_path, SamplingConfig()) is None


def test_large_tables_are_of_all_images_together(tmp_path, monkeypatch):
  monkeypatch.setattr(guesses, "MAX_ENTRIES", 19)
  table = guesses.save(tmp_path, TOKENS, (3, 2), np.array([0, 1]), 2)
  assert table.logits[0].shape == (1, 2, 3)


def test_a_missing_or_damaged_file_says_what_to_do(tmp_path):
  with pytest.raises(ValueError, match="which evaluation writes"):
    guesses.load(tmp_path, CONFIG)
  (tmp_path / guesses.NAME).write_bytes(b"PK cut")
  with pytest.raises(ValueError, match="marginals.npz.*evaluate the stage"):
    guesses.load(tmp_path, CONFIG)
