"""Metrics and run files against values worked out by hand or by enumeration."""

from itertools import permutations
from math import log2

import pytest

from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.trec import write_run
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


def test_run_file_is_trecs(tmp_path):
    path = tmp_path / "run.trec"
    write_run(path, [("q1", ["d2", "d1"], [0.75, 0.5]), ("q2", ["d1"], [1.0])], "umarvel")
    assert path.read_text().splitlines() == [
        "q1 Q0 d2 1 0.750000 umarvel",
        "q1 Q0 d1 2 0.500000 umarvel",
        "q2 Q0 d1 1 1.000000 umarvel",
    ]


def test_run_file_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(UserError, match="white space"):
        write_run(tmp_path / "run.trec", [("q 1", ["d"], [1.0])], "umarvel")
