"""Ranking metrics with binary relevance, and the expected recall of a random ranking (docs/method.md#evaluation).

Recall@k is M-BEIR's: 1 if any relevant document is among the first k, otherwise 0.

Rankings (`retrieve.rank.RANKING`) are read block by block. What remains of one are its hits: few, and all that the
metrics depend on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from umarvel_ray.data.dataset import Queries
from umarvel_ray.ragged import Ragged
from umarvel_ray.recipe import Evaluate

CUT = 10  # of nDCG and MRR
GAINS = 1.0 / np.log2(np.arange(CUT) + 2)
BLOCK = 16_384  # queries of a ranking that are in numpy arrays at once


class Hits(NamedTuple):
    """The relevant documents in a ranking.

    Attributes:
        queries: int64 (h,), the position of the query that each was found for.
        ranks: int64 (h,), from 0.
    """

    queries: np.ndarray
    ranks: np.ndarray


def find_hits(ranking: pa.Table, queries: Queries) -> Hits:
    """The hits of a ranking of these queries; a query without a ranking has none."""
    parts = [_hits_of(part, queries) for part in blocks(ranking)]
    none = np.empty(0, np.int64)
    return Hits(*(np.concatenate([none, *arrays]) for arrays in zip(*parts, (none, none), strict=True)))


def recall_at_k(hits: Hits, k: np.ndarray) -> np.ndarray:
    """M-BEIR's Recall@k: float64 (n,), 1.0 if any of a query's first k documents is relevant.

    Args:
        k: int64 (n,), of each query.
    """
    found = np.zeros(len(k))
    found[hits.queries[hits.ranks < k[hits.queries]]] = 1.0
    return found


def ndcg_at_10(hits: Hits, relevant: np.ndarray) -> np.ndarray:
    """DCG of the first 10 with binary gains, divided by the DCG of an ideal ranking: float64 (n,).

    Args:
        relevant: int64 (n,), how many documents are relevant to each query; at least 1.
    """
    inside = hits.ranks < CUT
    gain = np.bincount(hits.queries[inside], GAINS[hits.ranks[inside]], len(relevant))
    scores: np.ndarray = gain / np.cumsum(GAINS)[np.minimum(relevant, CUT) - 1]
    return scores


def mrr_at_10(hits: Hits, n: int) -> np.ndarray:
    """The reciprocal rank of each query's first hit if it is among the first 10, otherwise 0: float64 (n,)."""
    first = np.full(n, CUT)
    np.minimum.at(first, hits.queries, hits.ranks)
    return np.where(first < CUT, 1.0 / (first + 1), 0.0)


def average_precision_at_k(hits: Hits, relevant: np.ndarray, k: int) -> np.ndarray:
    """CIRCO's AP@k: the precision at each hit among the first k, summed and divided by min(k, relevant): float64 (n,).

    Args:
        relevant: int64 (n,), how many documents are relevant to each query; at least 1.
    """
    inside = hits.ranks < k
    queries, ranks = hits.queries[inside], hits.ranks[inside]
    order = np.lexsort((ranks, queries))
    queries, ranks = queries[order], ranks[order]
    found = np.arange(len(queries)) - np.searchsorted(queries, queries) + 1  # hits of the query so far
    summed = np.bincount(queries, found / (ranks + 1), len(relevant))
    values: np.ndarray = summed / np.minimum(relevant, k)
    return values


def measures(ranking: pa.Table, queries: Queries, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metrics by task, and "queries", how many it has.

    Args:
        ranking: columns of `retrieve.rank.RANKING`. A query without a ranking counts with 0 in every mean.
        names: "R@k", "mAP@k", "accuracy" (which is R@1), "nDCG@10" or "MRR@10".
    """
    hits, relevant = find_hits(ranking, queries), count_distinct(queries.positives)
    columns = {name: by_task(_measure(name, hits, relevant), queries) for name in names}
    return {
        task: {name: float(columns[name][task].mean()) for name in names} | {"queries": len(own)}
        for task, own in by_task(relevant, queries).items()
    }


def _measure(name: str, hits: Hits, relevant: np.ndarray) -> np.ndarray:
    kind, _, depth = name.partition("@")
    if kind in ("R", "accuracy"):
        return recall_at_k(hits, np.full(len(relevant), int(depth or 1)))
    if kind == "mAP":
        return average_precision_at_k(hits, relevant, int(depth))
    return {"nDCG@10": ndcg_at_10(hits, relevant), "MRR@10": mrr_at_10(hits, len(relevant))}[name]


def depth_of(names: Sequence[str]) -> int:
    """How many documents per query the metrics look at."""
    return max(int(name.partition("@")[2] or 1) for name in names)


def chance_at_k(pool_sizes: np.ndarray, relevant: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The expected recall of uniformly random rankings of N documents with R relevant: 1 − C(N−R, k) / C(N, k).

    Args:
        pool_sizes, relevant, k: int64 (n,) each: N, R and k of each query. 0 where N is 0.

    Returns:
        float64 (n,).
    """
    cases = np.stack([pool_sizes, np.minimum(relevant, pool_sizes), np.minimum(k, pool_sizes)], axis=1)
    distinct, case = np.unique(cases, axis=0, return_inverse=True)
    values = [1.0 - comb(size - found, depth) / comb(size, depth) for size, found, depth in distinct.tolist()]
    return np.array(values, np.float64)[case]


def score_ranking(ranking: pa.Table, queries: Queries, settings: Evaluate) -> dict[str, dict[str, float]]:
    """Metrics by task: {"recall", "ndcg@10", "mrr@10", "chance", "k", "queries"}.

    Args:
        ranking: columns of `retrieve.rank.RANKING`. A query without a ranking, because it could not be embedded, counts
            with 0 in every mean.
    """
    hits, k, relevant = find_hits(ranking, queries), k_of(queries, settings), count_distinct(queries.positives)
    pool_sizes = np.zeros(queries.n, np.int64)
    pool_sizes[np.searchsorted(queries.rows, ranking["query"].to_numpy())] = ranking["pool_size"].to_numpy()
    values = {
        "recall": recall_at_k(hits, k),
        "ndcg@10": ndcg_at_10(hits, relevant),
        "mrr@10": mrr_at_10(hits, queries.n),
        "chance": chance_at_k(pool_sizes, relevant, k),
    }
    columns = {name: by_task(of_query, queries) for name, of_query in values.items()}
    return {
        task: {name: float(column[task].mean()) for name, column in columns.items()}
        | {"k": settings.k_of.get(task, settings.k), "queries": len(own)}
        for task, own in columns["recall"].items()
    }


def k_of(queries: Queries, settings: Evaluate) -> np.ndarray:
    """int64 (n,): the k of each query's task."""
    ks: np.ndarray = np.array([settings.k_of.get(task, settings.k) for task in queries.tasks], np.int64)[queries.task]
    return ks


def by_task(values: np.ndarray, queries: Queries) -> dict[str, np.ndarray]:
    """The values (n,) of the queries of each task that has any, in the order of the query table."""
    own = {task: queries.of_task(task) for task in queries.tasks}
    return {task: values[at] for task, at in own.items() if len(at)}


def count_distinct(lists: Ragged) -> np.ndarray:
    """int64 (n,): the number of distinct values in each list."""
    span = int(lists.values.max(initial=0)) + 1
    return np.bincount(np.unique(lists.owners * span + lists.values) // span, minlength=lists.n)


def mean(values: Sequence[float]) -> float:
    """Unweighted mean, as M-BEIR averages over tasks."""
    return sum(values) / len(values)


def blocks(table: pa.Table) -> Iterator[pa.Table]:
    """Slices of at most BLOCK rows."""
    return (table.slice(start, BLOCK) for start in range(0, table.num_rows, BLOCK))


def ranks_in(lists: Ragged) -> np.ndarray:
    """int64 (m,): the place of each value in its list."""
    ranks: np.ndarray = np.arange(len(lists.values)) - np.repeat(lists.offsets[:-1], lists.counts)
    return ranks


def _hits_of(ranking: pa.Table, queries: Queries) -> Hits:
    position = np.searchsorted(queries.rows, ranking["query"].to_numpy())
    documents = Ragged.of_arrow(ranking["documents"])
    owners = documents.owners
    relevant = np.flatnonzero(queries.positives.take(position).contains_pairs(owners, documents.values))
    return Hits(position[owners[relevant]], ranks_in(documents)[relevant])
