"""Ranking metrics with binary relevance, and what a random ranking would score (method section 6).

Recall@k is M-BEIR's: 1 if any relevant document is among the first k, else 0.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from math import comb, log2


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
