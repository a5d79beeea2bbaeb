"""Samples: the requested size, no duplicates, no positive lost, reproducible."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from umarvel_ray.data.sample import sample_queries, with_sampled_pools
from umarvel_ray.data.tables import Dataset


@given(st.integers(0, 30), st.none() | st.integers(0, 40), st.integers(0, 3))
def test_a_query_sample(rows, count, seed):
    table = pa.table({"id": [f"q{i}" for i in range(rows)]})
    ids = sample_queries(table, count, seed)["id"].to_pylist()
    assert len(ids) == min(rows, rows if count is None else count)
    assert ids == sorted(set(ids), key=lambda id_: int(id_[1:]))
    assert sample_queries(table, count, seed)["id"].to_pylist() == ids


@given(st.integers(1, 12), st.sets(st.integers(0, 19)), st.integers(0, 3))
def test_a_sampled_pool_keeps_positives_and_leaves_other_splits_alone(count, positives, seed):
    everything = [f"d{i}" for i in range(20)]
    pools = pa.table({"task": ["a", "b", "a"], "split": ["train", "train", "test"], "document_ids": [everything] * 3})
    gold = [f"d{i}" for i in sorted(positives)] or ["d0"]
    queries = pa.table({"id": ["q0", "q1"], "task": ["a", "b"], "positive_ids": [gold, ["d7"]]})
    dataset = Dataset(Path(), pa.table({"id": everything}), pools, lambda _: queries)
    smaller = with_sampled_pools(dataset, "train", count, seed)
    for task, kept in (("a", gold), ("b", ["d7"])):
        pool = smaller.pool(task, "train")
        assert set(kept) <= set(pool)
        assert count <= len(pool) <= count + len(kept)
        assert pool == sorted(set(pool), key=lambda id_: int(id_[1:]))
    assert smaller.pool("a", "test") == everything
    assert smaller.tasks("train") == ["a", "b"]
    assert with_sampled_pools(dataset, "train", count, seed).pools == smaller.pools
    assert with_sampled_pools(dataset, "train", None, seed) is dataset
