"""Conditions: how they are made, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tensorar_jax.conditioning import conditions

CLASSES = conditions.ClassConditioning(7)
TEXTS = conditions.TextConditioning(width=3, length=5)


def test_class_ids_put_null_behind_the_classes():
  cond = CLASSES.encode([0, 6, 3])
  cond["is_null"][1] = True
  np.testing.assert_array_equal(conditions.class_ids(cond, 7), [0, 7, 3])


def test_labels_are_checked_against_the_backbones_classes():
  cond = CLASSES.encode([0, 6])
  conditions.check_labels(cond, 7)
  conditions.check_labels(CLASSES.encode(np.zeros(0, int)), 7)
  with pytest.raises(ValueError, match="ids 0 to 6: .* 5 classes, 0 to 4"):
    conditions.check_labels(cond, 5)
  jax.eval_shape(lambda cond: conditions.check_labels(cond, 5), cond)


def test_null_needs_a_null_class():
  cond = CLASSES.encode([0, 6])
  conditions.check_labels(cond, 7, null_class=False)
  with pytest.raises(ValueError, match="no null class.*Set guidance=1"):
    conditions.check_labels(CLASSES.null(cond), 7, null_class=False)


def test_an_order_is_refused():
  cond = CLASSES.encode([0, 6])
  conditions.refuse_order(cond)
  with pytest.raises(ValueError, match="raster order. Set loss.random_order"):
    conditions.refuse_order({**cond, "order": np.zeros((2, 9), int)})


def texts(batch=2):
  """(features, mask) with the rows of each text in odd places."""
  features = np.random.RandomState(0).standard_normal((batch, 5, 3))
  return features.astype(np.float32), np.tile([1, 0, 1, 1, 0], (batch, 1))


def test_text_ends_where_the_image_begins():
  features, mask = texts()
  features[:, 1] = np.nan  # nothing of the padding gets through
  cond = TEXTS.encode((features, mask))
  np.testing.assert_array_equal(cond["text"][:, 2:], features[:, [0, 2, 3]])
  np.testing.assert_array_equal(cond["text"][:, :2], 0)
  np.testing.assert_array_equal(cond["is_padding"], [[1, 1, 0, 0, 0]] * 2)
  again = TEXTS.encode((cond["text"], ~cond["is_padding"]))
  np.testing.assert_array_equal(again["text"], cond["text"])
  half = TEXTS.encode((jnp.asarray(features, jnp.bfloat16), mask))
  assert half["text"].dtype == jnp.bfloat16


def test_null_and_dropped_texts_keep_their_padding():
  cond = TEXTS.encode(texts(1000))
  for other in (TEXTS.null(cond), TEXTS.drop(jax.random.key(0), cond, 0.1)):
    np.testing.assert_array_equal(other["is_padding"], cond["is_padding"])
  assert TEXTS.null(cond)["is_null"].all()
  assert 70 < other["is_null"].sum() < 130


def test_a_batch_says_which_images_are_valid():
  features, mask = texts()
  batch = {"text": features, "text_mask": mask}
  assert "is_valid" not in TEXTS.from_batch(batch)
  # What stands in for an unreadable one has no text; all of it is visible.
  batch = {**batch, "text_mask": mask * [[1], [0]], "valid": np.array([1, 0])}
  cond = TEXTS.from_batch(batch)
  np.testing.assert_array_equal(cond["is_valid"], [True, False])
  assert not cond["is_padding"][1].any()
  with pytest.raises(ValueError, match=r"lacks \['text', 'text_mask'\]"):
    TEXTS.from_batch({"tokens": mask, "label": mask})


def test_bad_texts_are_refused():
  features, mask = texts()
  with pytest.raises(ValueError, match=r"shape \(2, 5, 2\): .* \[B, 5, 3\]"):
    TEXTS.encode((features[..., :2], mask))
  with pytest.raises(ValueError, match=r"shape \(2, 4, 3\): expected"):
    TEXTS.encode((features[:, :4], mask[:, :4]))
  with pytest.raises(ValueError, match=r"mask of shape \(2, 4\)"):
    TEXTS.encode((features, mask[:, :4]))
  with pytest.raises(ValueError, match="text 1 has no rows"):
    TEXTS.encode((features, mask * [[1], [0]]))
  with pytest.raises(ValueError, match="width=0, length=5"):
    conditions.TextConditioning(width=0, length=5)


PROMPTS = conditions.PromptConditioning(length=5, vocab_size=13)


def test_prompts_stand_beside_their_null_prompts():
  ids = [[1, 7, 8, 2], np.array([1, 2])]
  cond = PROMPTS.encode(conditions.prompt_rows(ids, pad=3, length=5))
  np.testing.assert_array_equal(
    cond["text"],
    [
      [[0, 0], [1, 1], [7, 3], [8, 3], [2, 2]],
      [[0, 0], [0, 0], [0, 0], [1, 1], [2, 2]],
    ],
  )
  np.testing.assert_array_equal(
    cond["is_padding"], [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]
  )
  assert cond["text"].dtype == np.int32 and not cond["is_null"].any()
  batch = {"text": cond["text"], "text_mask": ~cond["is_padding"]}
  np.testing.assert_array_equal(PROMPTS.from_batch(batch)["text"], cond["text"])
  assert PROMPTS.example()["text"].max() == 12
  jax.eval_shape(lambda c: conditions.check_prompts(c, 5), cond)


def test_bad_prompts_are_refused():
  ids, mask = np.zeros((2, 5, 2), int), np.ones((2, 5), bool)
  with pytest.raises(ValueError, match="dtype float32: expected integers"):
    PROMPTS.encode((ids.astype(np.float32), mask))
  for wrong in (-1, 13):
    with pytest.raises(ValueError, match=f"token id {wrong}: expected 0 to 12"):
      PROMPTS.encode((ids + wrong, mask))
  with pytest.raises(ValueError, match=r"shape \(2, 5\): expected \[B, 5, 2\]"):
    PROMPTS.encode((ids[..., 0], mask))
  for few in ([1], [1] * 6):
    with pytest.raises(ValueError, match=f"prompt 1 has {len(few)} ids: exp"):
      conditions.prompt_rows([[1, 2], few], pad=3, length=5)
