"""Seeded samples of a query table and of the pools its queries are searched in."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from umarvel_ray.data.tables import Dataset


def sample_queries(queries: pa.Table, count: int | None, seed: int) -> pa.Table:
    """Sample `count` rows without replacement, in table order; all rows if `count` is None or at least their number."""
    if count is None or count >= queries.num_rows:
        return queries
    chosen = np.random.default_rng(seed).choice(queries.num_rows, count, replace=False)
    return queries.take(pa.array(np.sort(chosen)))


def with_sampled_pools(dataset: Dataset, split: str, count: int | None, seed: int) -> Dataset:
    """The dataset with each pool of `split` reduced to `count` sampled documents plus its queries' positives."""
    if count is None:
        return dataset
    queries = dataset.queries(split).select(["task", "positive_ids"]).to_pylist()
    rows = []
    for number, task in enumerate(dataset.tasks(split)):
        pool = dataset.pool(task, split)
        chosen = np.random.default_rng([seed, number]).permutation(len(pool))[:count]
        kept = {pool[i] for i in chosen}.union(*(row["positive_ids"] for row in queries if row["task"] == task))
        rows.append({"task": task, "split": split, "document_ids": [id_ for id_ in pool if id_ in kept]})
    others = dataset.pools.filter(pc.not_equal(dataset.pools["split"], split))
    return dataset.with_pools(pa.concat_tables([pa.Table.from_pylist(rows, others.schema), others]))
