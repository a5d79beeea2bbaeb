"""How well a reranker tells a query's positives from the embedder's other top documents, beside the embedder itself.

The measure is the area under the ROC curve (AUC) of each query's own list: the share of pairs of a positive and another
document that the score puts in the right order, 0.5 by chance. A query counts if its list holds both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from umarvel_ray.data.dataset import Queries
from umarvel_ray.model.distillation import teacher_scores
from umarvel_ray.ragged import Ragged, flat
from umarvel_ray.retrieve.metrics import ranks_in

STANDARD_ERRORS = 1.96  # of a 95 % interval
FEWEST = 20  # queries that allow a judgment


@dataclass(frozen=True)
class Separation:
    """Mean AUC over queries.

    Attributes:
        reranker: of P(yes).
        embedder: of the cosines.
        fused: of α · cosine + (1 − α) · P(yes).
        lowest: the lower end of the 95 % interval of `reranker`.
        queries: how many lists hold a positive and another document; if they are fewer than FEWEST, the rest is None.
    """

    reranker: float | None
    embedder: float | None
    fused: float | None
    lowest: float | None
    queries: int

    @property
    def at_chance(self) -> bool:
        """Whether the reranker may be guessing."""
        return self.lowest is not None and self.lowest <= 0.5

    def __str__(self) -> str:
        if self.reranker is None:
            return f"only {self.queries} queries have a positive among their top documents, too few to examine it"
        return (
            f"AUC in the top documents of {self.queries:,} queries: reranker {self.reranker:.3f}, "
            f"embedder {self.embedder:.3f}, fused {self.fused:.3f}"
        )


def separation(scored: pa.Table, queries: Queries, alpha: float) -> Separation:
    """How well the scores separate positives from others.

    Args:
        scored: columns of `inference.score.SCORED`.
        alpha: of the fused score (`model.distillation.teacher_scores`).
    """
    documents = Ragged.of_arrow(scored["documents"])
    positives = queries.positives.take(np.searchsorted(queries.rows, scored["query"].to_numpy()))
    relevant = positives.contains_pairs(documents.owners, documents.values)
    cosines, answers = (flat(scored[name]).astype(np.float64) for name in ("scores", "rerank_scores"))
    fused = teacher_scores(cosines, answers, alpha)
    of_reranker, of_embedder, of_fused = (auc(documents, scores, relevant) for scores in (answers, cosines, fused))
    known = np.flatnonzero(~np.isnan(of_reranker))
    if len(known) < FEWEST:
        return Separation(None, None, None, None, len(known))
    error = of_reranker[known].std(ddof=1) / np.sqrt(len(known))
    return Separation(
        reranker=float(of_reranker[known].mean()),
        embedder=float(of_embedder[known].mean()),
        fused=float(of_fused[known].mean()),
        lowest=float(of_reranker[known].mean() - STANDARD_ERRORS * error),
        queries=len(known),
    )


def auc(lists: Ragged, scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """AUC of each list, by the Mann–Whitney statistic with half a point for a tie.

    Args:
        scores: float64 (m,), of all values of the lists.
        relevant: bool (m,).

    Returns:
        float64 (n,), NaN for a list without a relevant value or without another.
    """
    order = np.lexsort((scores, lists.owners))
    owners, values = lists.owners[order], scores[order]
    place = ranks_in(lists) + 1.0  # from 1 within the list, ascending scores
    _, tie = np.unique(np.stack([owners, values], axis=1), axis=0, return_inverse=True)
    rank = (np.bincount(tie, place) / np.bincount(tie))[tie]  # equal scores share their mean rank
    positive = relevant[order]
    hits = np.bincount(owners[positive], minlength=lists.n).astype(np.float64)
    above = np.bincount(owners[positive], rank[positive], lists.n) - hits * (hits + 1) / 2
    pairs = hits * (lists.counts - hits)
    found: np.ndarray = np.divide(above, pairs, out=np.full(lists.n, np.nan), where=pairs > 0)
    return found
