"""Ranking metrics with binary relevance, what a random ranking would score, and both by task for a table of rankings.

Recall@k is M-BEIR's: 1 if any relevant document is among the first k, else 0.
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
    """DCG of the first k with gains 0 and 1, over that of a ranking with every relevant document first."""
    gain = sum(1.0 / log2(place + 2) for place, id_ in enumerate(ranked[:k]) if id_ in relevant)
    ideal = sum(1.0 / log2(place + 2) for place in range(min(k, len(relevant))))
    return gain / ideal if ideal else 0.0


def mrr_at_k(ranked: Sequence[str], relevant: Set[str], k: int = 10) -> float:
    """1 / the place of the first relevant document among the first k, else 0."""
    return next((1.0 / (place + 1) for place, id_ in enumerate(ranked[:k]) if id_ in relevant), 0.0)


def chance_at_k(pool_size: int, relevant: int, k: int) -> float:
    """Expected hit_at_k of a uniformly random ranking: 1 − C(N − R, k) / C(N, k)."""
    k = min(k, pool_size)
    return 1.0 - comb(pool_size - relevant, k) / comb(pool_size, k)


def mean(values: Sequence[float]) -> float:
    """Unweighted mean, as M-BEIR averages its tasks."""
    return sum(values) / len(values)


def positives_of(dataset: Dataset, split: str) -> dict[str, set[str]]:
    """Relevant document ids of each query."""
    table = dataset.queries(split).select(["id", "positive_ids"])
    return {row["id"]: set(row["positive_ids"]) for row in table.to_pylist()}


def not_ranked(queries: pa.Table, ranking: pa.Table) -> dict[str, list[str]]:
    """By task, the queries that have no ranking because they could not be embedded."""
    ranked = set(ranking["query_id"].to_pylist())
    lost = defaultdict(list)
    for id_, task in zip(queries["id"].to_pylist(), queries["task"].to_pylist(), strict=True):
        if id_ not in ranked:
            lost[task].append(id_)
    return lost


def score_ranking(
    ranking: pa.Table, positives: Mapping[str, Set[str]], settings: Evaluate, lost: Mapping[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Metrics by task.

    Args:
        ranking: columns of retrieve.rank.RANKING.
        lost: by task, queries that could not be embedded: they count, with recall 0.
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
