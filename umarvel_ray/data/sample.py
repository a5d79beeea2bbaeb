"""Seeded samples of a query table and of the pools its queries are searched in."""

from __future__ import annotations

import numpy as np

from umarvel_ray.data.dataset import Dataset, Queries


def sample_queries(queries: Queries, count: int | None, seed: int) -> Queries:
    """Sample `count` rows without replacement, in table order; all rows if `count` is None or at least their number."""
    if count is None or count >= queries.n:
        return queries
    return queries.take(np.sort(np.random.default_rng(seed).choice(queries.n, count, replace=False)))


def with_sampled_pools(dataset: Dataset, split: str, count: int | None, seed: int) -> Dataset:
    """The dataset with each pool of `split` reduced to `count` sampled documents plus its queries' positives."""
    if count is None:
        return dataset
    queries = dataset.queries(split)
    pools = dict(dataset.pools)
    for number, task in enumerate(dataset.tasks(split)):
        pool = dataset.pool(task, split)
        chosen = np.random.default_rng([seed, number]).permutation(len(pool))[:count]
        kept = np.isin(pool, queries.positives.take(queries.of_task(task)).values)
        kept[chosen] = True
        pools[task, split] = pool[kept]
    return dataset.with_pools(pools)
