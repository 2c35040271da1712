"""The study's laws, and the table of the documentation that quotes them."""

import itertools
import pathlib
import re

import numpy as np
import pytest

from studies import exact_sampler

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "method.md"


@pytest.mark.parametrize("sampler", exact_sampler.SAMPLERS)
def test_laws_are_those_of_every_path_added_up(sampler):
  """T = 3, V = 2: the sampler's own story, one draw after the other."""
  beta, data = 0.6, exact_sampler.random_law(3, 0.5, 3, 2)
  want = np.zeros_like(data)
  noise = lambda x, d: (1 - beta) * (x == d) + beta / 2
  for x, (d, e) in itertools.product(
    itertools.product(range(2), repeat=3),
    itertools.product(range(2), repeat=2),
  ):
    first = data.sum(2)  # over x_2: slot 0 and slot 1 of the first step
    second = data[x[0]] * np.array([noise(0, d), noise(1, d)])[:, None]
    second /= second.sum()
    third = data[x[0], x[1]] * np.array([noise(0, e), noise(1, e)])
    third /= third.sum()
    path = first.sum(1)[x[0]] * second.sum(1)[x[1]] * third[x[2]]
    for joint, token, draft in ((first, x[0], d), (second, x[1], e)):
      law = joint.sum(0)
      if sampler == "chained":
        law = joint[token] / joint[token].sum()
      if sampler != "published":
        law = (1 - beta) * law + beta / 2
      path *= law[draft]
    want[x] += path
  got = exact_sampler.sampled_law(data, beta, sampler)
  np.testing.assert_allclose(got, want, rtol=1e-12)
  assert got.sum() == pytest.approx(1)


def test_only_the_chained_sampler_has_the_law_of_the_data():
  for beta in (0.25, 0.5, 0.8):
    assert exact_sampler.compare("chained", beta, 0.3)[0] < 1e-14
    assert exact_sampler.compare("published", beta, 0.3)[0] > 0.03
    assert exact_sampler.compare("renoised", beta, 0.3)[0] > 0.005
  with pytest.raises(ValueError, match="sampler='drawn': expected one of"):
    exact_sampler.sampled_law(np.ones((2, 2)) / 4, 0.5, "drawn")


def test_the_documented_table_is_what_the_study_computes():
  text = PAGE.read_text().split("| beta | Sampler |")[1].split("\n\n")[0]
  rows = [
    [cell.strip().split(" / ") for cell in line.strip("| ").split(" | ")]
    for line in text.splitlines()[2:]
  ]
  names = {"as published": "published", "noised again": "renoised"}
  compared = 0
  for beta, samplers, distances, changes in rows:
    for sampler, *values in zip(samplers, distances, changes):
      name = names.get(sampler.replace("drafts ", ""), "chained")
      got = exact_sampler.compare(name, float(beta[0]), 0.3)
      np.testing.assert_allclose(got, [float(v) for v in values], atol=5.1e-4)
      compared += 1
  assert compared == 9
  assert re.search(r"T = 5, V = 3, k = 2", PAGE.read_text())
