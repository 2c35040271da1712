"""What a backbone refuses: labels, orders and nulls that it does not know."""

import jax
import numpy as np
import pytest

from tensorar_jax import conditioning

CLASSES = conditioning.ClassConditioning(7)


def test_class_ids_put_null_behind_the_classes():
  cond = CLASSES.encode([0, 6, 3])
  cond["is_null"][1] = True
  np.testing.assert_array_equal(conditioning.class_ids(cond, 7), [0, 7, 3])


def test_labels_are_checked_against_the_backbones_classes():
  cond = CLASSES.encode([0, 6])
  conditioning.check_labels(cond, 7)
  conditioning.check_labels(CLASSES.encode(np.zeros(0, int)), 7)
  with pytest.raises(ValueError, match="ids 0 to 6: .* 5 classes, 0 to 4"):
    conditioning.check_labels(cond, 5)
  jax.eval_shape(lambda cond: conditioning.check_labels(cond, 5), cond)


def test_null_needs_a_null_class():
  cond = CLASSES.encode([0, 6])
  conditioning.check_labels(cond, 7, null_class=False)
  with pytest.raises(ValueError, match="no null class.*Set guidance=1"):
    conditioning.check_labels(CLASSES.null(cond), 7, null_class=False)


def test_an_order_is_refused():
  cond = CLASSES.encode([0, 6])
  conditioning.refuse_order(cond)
  with pytest.raises(ValueError, match="raster order. Set loss.random_order"):
    conditioning.refuse_order({**cond, "order": np.zeros((2, 9), int)})
