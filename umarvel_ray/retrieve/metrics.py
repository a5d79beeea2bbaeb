"""Ranking metrics with binary relevance, and the expected recall of a random ranking (docs/method.md#evaluation).

Recall@k is M-BEIR's: 1 if any relevant document is among the first k, otherwise 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from math import comb, log2

import pyarrow as pa

from umarvel_ray.data.tables import Dataset
from umarvel_ray.recipe import Evaluate


def hit_at_k(ranked: Sequence[str], relevant: Set[str], k: int) -> float:
    """M-BEIR's Recall@k: 1.0 if any of the first k documents is relevant."""
    return float(any(id_ in relevant for id_ in ranked[:k]))


def ndcg_at_k(ranked: Sequence[str], relevant: Set[str], k: int = 10) -> float:
    """DCG of the first k with binary gains, divided by the DCG of an ideal ranking."""
    gain = sum(1.0 / log2(rank + 2) for rank, id_ in enumerate(ranked[:k]) if id_ in relevant)
    ideal = sum(1.0 / log2(rank + 2) for rank in range(min(k, len(relevant))))
    return gain / ideal if ideal else 0.0


def mrr_at_k(ranked: Sequence[str], relevant: Set[str], k: int = 10) -> float:
    """The reciprocal rank of the first relevant document if it is among the first k, otherwise 0."""
    return next((1.0 / (rank + 1) for rank, id_ in enumerate(ranked[:k]) if id_ in relevant), 0.0)


def chance_at_k(pool_size: int, relevant: int, k: int) -> float:
    """The expected `hit_at_k` of a uniformly random ranking of N documents with R relevant: 1 − C(N−R, k) / C(N, k)."""
    k = min(k, pool_size)
    return 1.0 - comb(pool_size - relevant, k) / comb(pool_size, k)


def mean(values: Sequence[float]) -> float:
    """Unweighted mean, as M-BEIR averages over tasks."""
    return sum(values) / len(values)


def positives_of(dataset: Dataset, split: str) -> dict[str, set[str]]:
    """The ids of each query's positives."""
    table = dataset.queries(split).select(["id", "positive_ids"])
    return {row["id"]: set(row["positive_ids"]) for row in table.to_pylist()}


def not_ranked(queries: pa.Table, ranking: pa.Table) -> dict[str, list[str]]:
    """By task, the ids of queries without a ranking because they could not be embedded."""
    ranked = set(ranking["query_id"].to_pylist())
    lost = defaultdict(list)
    for id_, task in zip(queries["id"].to_pylist(), queries["task"].to_pylist(), strict=True):
        if id_ not in ranked:
            lost[task].append(id_)
    return lost


def score_ranking(
    ranking: pa.Table, positives: Mapping[str, Set[str]], settings: Evaluate, lost: Mapping[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Metrics by task: {"recall", "ndcg@10", "mrr@10", "chance", "k", "queries"}.

    Args:
        ranking: columns of `retrieve.rank.RANKING`.
        lost: by task, queries that could not be embedded; they count with a recall of 0.
    """
    numbers: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in ranking.to_pylist():
        ids, relevant = row["document_ids"], positives[row["query_id"]]
        k = settings.k_of.get(row["task"], settings.k)
        numbers[row["task"]].append(
            {
                "recall": hit_at_k(ids, relevant, k),
                "ndcg@10": ndcg_at_k(ids, relevant),
                "mrr@10": mrr_at_k(ids, relevant),
                "chance": chance_at_k(row["pool_size"], min(len(relevant), row["pool_size"]), k),
            }
        )
    for task, ids in lost.items():
        numbers[task] += [dict.fromkeys(("recall", "ndcg@10", "mrr@10", "chance"), 0.0)] * len(ids)
    return {
        task: {name: mean([row[name] for row in rows]) for name in rows[0]}
        | {"k": settings.k_of.get(task, settings.k), "queries": len(rows)}
        for task, rows in numbers.items()
    }
