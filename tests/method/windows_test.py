import jax.numpy as jnp
import numpy as np
import pytest

from tensorar_jax.method import windows
from tests import tiny


@pytest.mark.parametrize("window", [1, 3, 9])
def test_slot_j_of_window_t_is_token_t_plus_j(window):
  tokens = tiny.tokens()
  got, valid = windows.unfold(tokens, window)
  assert got.shape == (2, 9, window, 1)
  for t in range(9):
    for j in range(window):
      assert valid[t, j] == (t + j < 9)
      if t + j < 9:
        np.testing.assert_array_equal(got[:, t, j], tokens[:, t + j])
      else:
        assert (got[:, t, j] == 0).all()


def test_after_looks_reads_each_position_from_its_slot():
  n, j = np.meshgrid(np.arange(7), np.arange(3), indexing="ij")
  drafts = jnp.asarray(n + j)[None, ..., None]
  for looks in (1, 2, 3):
    got = windows.after_looks(drafts, looks)
    np.testing.assert_array_equal(got[0, :, 0], np.arange(7))


def test_after_looks_takes_the_draft_with_that_many_looks():
  # drafts[n, j] = 10 n + j says which draft was taken.
  n, j = np.meshgrid(np.arange(7), np.arange(3), indexing="ij")
  drafts = jnp.asarray(10 * n + j)[None, ..., None]
  got = windows.after_looks(drafts, 1)[0, :, 0]
  assert got.tolist() == [0, 1, 2, 12, 22, 32, 42]
  got = windows.after_looks(drafts, 3)[0, :, 0]
  assert got.tolist() == [0, 10, 20, 30, 40, 50, 60]
  with pytest.raises(ValueError, match="looks=4"):
    windows.after_looks(drafts, 4)


@pytest.mark.parametrize("window", [0, -1, 10])
def test_a_window_outside_one_to_t_is_refused(window):
  with pytest.raises(ValueError, match=f"window={window}"):
    tiny.fresh(window)
