"""Samples: the requested size, no duplicates, no positive lost, reproducible."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.support.synthetic import make_queries
from umarvel_ray.data.dataset import Dataset
from umarvel_ray.data.sample import sample_queries, with_sampled_pools


@given(st.integers(0, 30), st.none() | st.integers(0, 40), st.integers(0, 3))
def test_a_query_sample(count_of_rows, count, seed):
    queries = make_queries([[i, i + 1] for i in range(count_of_rows)], [f"t{i % 3}" for i in range(count_of_rows)])
    sample = sample_queries(queries, count, seed)
    rows = sample.rows.tolist()
    assert sample.n == len(rows) == min(count_of_rows, count_of_rows if count is None else count)
    assert rows == sorted(set(rows) & set(queries.rows.tolist()))
    for row, own, task in zip(rows, sample.positives.lists(), sample.task, strict=True):
        position = (row - 1000) // 2
        assert own.tolist() == [position, position + 1]
        assert sample.tasks[task] == f"t{position % 3}"
    assert sample_queries(queries, count, seed).rows.tolist() == rows


@given(st.integers(1, 12), st.sets(st.integers(0, 19)), st.integers(0, 3))
def test_a_sampled_pool_keeps_positives_and_leaves_other_splits_alone(count, positives, seed):
    everything = np.random.default_rng(0).permutation(20)
    order = {row: place for place, row in enumerate(everything.tolist())}
    pools = {("a", "train"): everything, ("b", "train"): everything, ("a", "test"): everything}
    gold = sorted(positives) or [0]
    queries = make_queries([gold, [7]], ["a", "b"])
    dataset = Dataset(Path(), SimpleNamespace(num_rows=20), pools, lambda _: queries)
    smaller = with_sampled_pools(dataset, "train", count, seed)
    for task, kept in (("a", gold), ("b", [7])):
        pool = smaller.pool(task, "train").tolist()
        assert set(kept) <= set(pool)
        assert count <= len(pool) <= count + len(kept)
        assert pool == sorted(set(pool), key=order.get), "in the order of the pool"
    assert smaller.pool("a", "test").tolist() == everything.tolist()
    assert smaller.tasks("train") == ["a", "b"]
    assert smaller.global_pool("train").tolist() == sorted(
        {*smaller.pool("a", "train").tolist(), *smaller.pool("b", "train").tolist()}
    )
    again = with_sampled_pools(dataset, "train", count, seed)
    assert again.digest_of_pools("train") == smaller.digest_of_pools("train")
    assert again.digest_of_pools("train") != dataset.digest_of_pools("train") or count + len(gold) >= 20
    assert with_sampled_pools(dataset, "train", None, seed) is dataset
