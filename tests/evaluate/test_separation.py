"""AUC against its definition, pair by pair."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.synthetic import make_queries
from umarvel_ray.evaluate.separation import FEWEST, auc, separation
from umarvel_ray.inference.score import SCORED
from umarvel_ray.ragged import Ragged

LISTS = st.lists(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.7]), st.booleans()), max_size=6), max_size=6)


def by_pairs(scores: list[float], relevant: list[bool]) -> float:
    right = [(a > b) + 0.5 * (a == b)
             for a, yes in zip(scores, relevant, strict=True) if yes
             for b, other in zip(scores, relevant, strict=True) if not other]  # fmt: skip
    return sum(right) / len(right) if right else math.nan


@given(LISTS)
def test_auc_counts_the_pairs_in_the_right_order(lists):
    values = [pair for own in lists for pair in own]
    found = auc(
        Ragged.of([range(len(own)) for own in lists]),
        np.array([score for score, _ in values], float),
        np.array([yes for _, yes in values], bool),
    )
    expected = [by_pairs([score for score, _ in own], [yes for _, yes in own]) for own in lists]
    np.testing.assert_allclose(found, expected)


def scored(rows: list[tuple[list[int], list[float], list[float]]]) -> pa.Table:
    columns = [[1000 + 2 * i for i in range(len(rows))], *map(list, zip(*rows, strict=True))]
    return pa.table(dict(zip(SCORED.names, columns, strict=True)), schema=SCORED)


def test_the_three_scores_of_the_queries_that_count():
    queries = make_queries([[1], [2], [9]] * FEWEST)
    table = scored(
        [
            ([1, 5, 6], [0.5, 0.6, 0.4], [0.9, 0.1, 0.2]),  # embedder 1/2, reranker 1, fused 1
            ([5, 2], [0.3, 0.2], [0.8, 0.1]),  # all wrong
            ([5, 6], [0.3, 0.2], [0.8, 0.1]),  # its positive is not among them
        ]
        * FEWEST
    )
    found = separation(table, queries, alpha=0.5)
    assert (found.embedder, found.reranker, found.fused, found.queries) == (0.25, 0.5, 0.5, 2 * FEWEST)
    assert separation(table, queries, alpha=1.0).fused == 0.25


@pytest.mark.parametrize(("right", "at_chance"), [(100, False), (52, True), (0, True)])
def test_a_reranker_that_may_be_guessing(right, at_chance):
    rows = [([1, 2], [0.5, 0.4], [0.9, 0.1] if i < right else [0.1, 0.9]) for i in range(100)]
    found = separation(scored(rows), make_queries([[1]] * 100), alpha=0.5)
    assert found.reranker == right / 100
    assert found.at_chance == at_chance


def test_few_queries_allow_no_judgment():
    rows = [([1, 2], [0.5, 0.4], [0.1, 0.9])] * FEWEST
    found = separation(scored(rows), make_queries([[1]] * (FEWEST - 1) + [[7]]), alpha=0.5)
    assert (found.queries, found.reranker) == (FEWEST - 1, None)
    assert not found.at_chance
    assert "too few" in str(found)
