"""Metrics against values worked out by hand or by enumeration."""

from itertools import permutations
from math import log2

import pytest

from umarvel_ray.retrieve.metrics import chance_at_k, hit_at_k, mean, mrr_at_k, ndcg_at_k


def test_hit_is_any_relevant_in_the_first_k():
    assert hit_at_k(["a", "b", "c"], {"c", "x"}, 3) == 1.0
    assert hit_at_k(["a", "b", "c"], {"c", "x"}, 2) == 0.0


def test_ndcg_by_hand():
    got = ndcg_at_k(["x", "a", "y", "b"], {"a", "b", "c"})
    assert got == pytest.approx((1 / log2(3) + 1 / log2(5)) / (1 + 1 / log2(3) + 1 / log2(4)))
    assert ndcg_at_k(["a", "b"], {"a", "b"}) == 1.0
    assert ndcg_at_k(["a"] + ["x"] * 9 + ["b"], {"b"}) == 0.0


def test_mrr_by_hand():
    assert mrr_at_k(["x", "y", "a", "b"], {"a", "b"}) == pytest.approx(1 / 3)
    assert mrr_at_k(["x"] * 10 + ["a"], {"a"}) == 0.0


@pytest.mark.parametrize(("size", "relevant", "k"), [(5, 1, 2), (5, 2, 2), (6, 3, 4), (4, 4, 1), (3, 1, 5)])
def test_chance_is_the_mean_over_every_ranking(size, relevant, k):
    pool = [str(i) for i in range(size)]
    truth = mean([hit_at_k(order, set(pool[:relevant]), k) for order in permutations(pool)])
    assert chance_at_k(size, relevant, k) == pytest.approx(truth)
