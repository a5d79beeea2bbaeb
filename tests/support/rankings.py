"""Queries and rankings without files, and what is true of them, computed one query and one document at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence, Set
from math import comb, log2

import numpy as np
import pyarrow as pa

from umarvel_ray.data.dataset import Queries
from umarvel_ray.ragged import Ragged
from umarvel_ray.recipe import Evaluate

RANKING = pa.schema(
    [
        ("query", pa.int64()),
        ("task", pa.string()),
        ("documents", pa.large_list(pa.int64())),
        ("scores", pa.large_list(pa.float32())),
        ("pool_size", pa.int64()),
    ]
)


def make_queries(positives: Sequence[Sequence[int]], tasks: Sequence[str], rows: Sequence[int]) -> Queries:
    """Queries at these ascending rows of a table that does not exist."""
    names = tuple(dict.fromkeys(tasks))
    codes = np.array([names.index(task) for task in tasks], np.int64)
    return Queries(None, np.array(rows, np.int64), Ragged.of(positives), names, codes)


def make_ranking(rows: Sequence[tuple[int, str, Sequence[tuple[int, float]], int]]) -> pa.Table:
    """From (query, task, documents with scores, size of the pool)."""
    return pa.Table.from_pylist(
        [
            {"query": query, "task": task, "documents": [d for d, _ in found], "scores": [s for _, s in found],
             "pool_size": size}
            for query, task, found, size in rows
        ],
        RANKING,
    )  # fmt: skip


def random_queries(rng: np.random.Generator, count: int = 40, documents: int = 30) -> Queries:
    """Three tasks; positives may repeat, and only every other row of the table or so is used."""
    positives = [rng.integers(0, documents, rng.integers(1, 15)).tolist() for _ in range(count)]
    rows = np.sort(rng.choice(2 * count, count, replace=False))
    return make_queries(positives, [f"t{number}" for number in rng.integers(0, 3, count)], rows.tolist())


def random_ranking(rng: np.random.Generator, queries: Queries, documents: int = 30, lost: float = 0.2) -> pa.Table:
    """Rankings of 0 to 20 documents, many with equal scores; queries in random order, some left out; two chunks."""
    rows = []
    for number in rng.permutation(queries.n):
        if rng.random() < lost:
            continue
        length = int(rng.integers(0, 21))
        scores = np.sort(rng.integers(-4, 5, length) / np.float32(10))[::-1]
        found = list(zip(rng.choice(documents, length, replace=False).tolist(), scores.tolist(), strict=True))
        task = queries.tasks[queries.task[number]]
        rows.append((int(queries.rows[number]), task, found, documents - int(rng.integers(0, 3))))
    table = make_ranking([(-1, "t0", [(7, 0.0)], 1), *rows])
    cut = int(rng.integers(1, table.num_rows + 1))
    return pa.concat_tables([table.slice(1, cut - 1), table.slice(cut)])


def hit_at_k(ranked: Sequence[int], relevant: Set[int], k: int) -> float:
    return float(any(document in relevant for document in ranked[:k]))


def ndcg_at_k(ranked: Sequence[int], relevant: Set[int], k: int = 10) -> float:
    gain = sum(1.0 / log2(rank + 2) for rank, document in enumerate(ranked[:k]) if document in relevant)
    return gain / sum(1.0 / log2(rank + 2) for rank in range(min(k, len(relevant))))


def mrr_at_k(ranked: Sequence[int], relevant: Set[int], k: int = 10) -> float:
    return next((1.0 / (rank + 1) for rank, document in enumerate(ranked[:k]) if document in relevant), 0.0)


def chance_at_k(size: int, relevant: int, k: int) -> float:
    return 1.0 - comb(size - relevant, min(k, size)) / comb(size, min(k, size))


def scores_one_by_one(ranking: pa.Table, queries: Queries, settings: Evaluate) -> dict[str, dict[str, float]]:
    """What `score_ranking` returns."""
    ranked = {row["query"]: row for row in ranking.to_pylist()}
    numbers = defaultdict(list)
    for row, positives, code in zip(queries.rows.tolist(), queries.positives.lists(), queries.task, strict=True):
        task, relevant = queries.tasks[code], set(positives.tolist())
        k, found = settings.k_of.get(task, settings.k), ranked.get(row)
        numbers[task].append(
            (
                hit_at_k(found["documents"], relevant, k),
                ndcg_at_k(found["documents"], relevant),
                mrr_at_k(found["documents"], relevant),
                chance_at_k(found["pool_size"], min(len(relevant), found["pool_size"]), k),
            )
            if found
            else (0.0,) * 4
        )
    return {
        task: dict(zip(("recall", "ndcg@10", "mrr@10", "chance"), np.mean(rows, axis=0).tolist(), strict=True))
        | {"k": settings.k_of.get(task, settings.k), "queries": len(rows)}
        for task, rows in numbers.items()
    }
