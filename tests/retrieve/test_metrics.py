"""Metrics against values worked out by hand, by enumeration, and one query at a time."""

from itertools import permutations
from math import log2

import numpy as np
import pytest

from tests.support import rankings as truth
from tests.support.rankings import make_queries, make_ranking, random_queries, random_ranking, scores_one_by_one
from umarvel_ray.recipe import Evaluate
from umarvel_ray.retrieve import metrics
from umarvel_ray.retrieve.metrics import by_task, chance_at_k, count_distinct, mean, score_ranking

ROW = 7  # of the only query


def score(found: list[int], positives: list[int], k: int = 3) -> dict[str, float]:
    """The metrics of one query."""
    ranking = make_ranking([(ROW, "t", [(document, 0.5) for document in found], 20)])
    return score_ranking(ranking, make_queries([positives], ["t"], [ROW]), Evaluate(k=k))["t"]


def test_a_hit_is_any_positive_in_the_first_k():
    assert score([1, 2, 3], [3, 9], 3)["recall"] == 1.0
    assert score([1, 2, 3], [3, 9], 2)["recall"] == 0.0
    assert score([], [3], 2)["recall"] == 0.0


def test_ndcg_by_hand():
    got = score([8, 1, 9, 2], [1, 2, 3, 3])["ndcg@10"]
    assert got == pytest.approx((1 / log2(3) + 1 / log2(5)) / (1 + 1 / log2(3) + 1 / log2(4)))
    assert score([1, 2], [1, 2])["ndcg@10"] == 1.0
    assert score([1, *range(10, 19), 2], [2])["ndcg@10"] == 0.0


def test_mrr_by_hand():
    assert score([8, 9, 1, 2], [1, 2])["mrr@10"] == pytest.approx(1 / 3)
    assert score([*range(10, 20), 1], [1])["mrr@10"] == 0.0


@pytest.mark.parametrize(("size", "relevant", "k"), [(5, 1, 2), (5, 2, 2), (6, 3, 4), (4, 4, 1), (3, 1, 5)])
def test_chance_is_the_mean_over_every_ranking(size, relevant, k):
    of_all = mean([truth.hit_at_k(order, set(range(relevant)), k) for order in permutations(range(size))])
    cases = np.array([[size, relevant, k], [0, 1, k], [size, relevant, k]])
    assert chance_at_k(*cases.T) == pytest.approx([of_all, 0.0, of_all])


def test_chance_is_exact_in_the_largest_pool():
    """5.6 million documents: C(N, 50) has 270 digits."""
    expected = 1 - (1 - 50 / 5_600_000)
    assert chance_at_k(np.array([5_600_000]), np.array([1]), np.array([50])) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_a_ranking_is_scored_as_one_query_at_a_time(seed, monkeypatch):
    """Ragged rankings, repeated positives, positives that were not found, and queries without a ranking."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(metrics, "BLOCK", int(rng.integers(1, 50)))
    queries, settings = random_queries(rng), Evaluate(k=int(rng.integers(1, 12)), k_of={"t1": 4})
    ranking = random_ranking(rng, queries)
    found, expected = score_ranking(ranking, queries, settings), scores_one_by_one(ranking, queries, settings)
    assert list(found) == [task for task in queries.tasks if task in expected]
    for task, numbers in expected.items():
        assert found[task] == pytest.approx(numbers, rel=1e-12, abs=1e-12)


def test_without_any_ranking_everything_is_zero():
    queries = make_queries([[1], [2]], ["a", "b"], [3, 4])
    nothing = {"recall": 0.0, "ndcg@10": 0.0, "mrr@10": 0.0, "chance": 0.0, "k": 5, "queries": 1}
    assert score_ranking(make_ranking([]), queries, Evaluate()) == {"a": nothing, "b": nothing}


def test_values_by_task_leave_out_tasks_without_queries():
    queries = make_queries([[1], [2], [3]], ["a", "b", "a"], [0, 1, 2])
    found = by_task(np.array([5.0, 6.0, 7.0]), queries)
    assert {task: values.tolist() for task, values in found.items()} == {"a": [5.0, 7.0], "b": [6.0]}
    assert list(by_task(np.array([6.0]), queries.take(np.array([1])))) == ["b"]
    assert count_distinct(make_queries([[4, 4], [0], [1, 2, 1]], "aaa", [0, 1, 2]).positives).tolist() == [1, 1, 2]
