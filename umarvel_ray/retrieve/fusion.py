"""Recall, then rerank: the first `top` documents reordered by cosine + w · P(yes), w chosen on validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import pyarrow as pa

from umarvel_ray.recipe import Evaluate
from umarvel_ray.retrieve.metrics import mean, score_ranking
from umarvel_ray.retrieve.rank import RANKING

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)

Answers = Mapping[tuple[str, str], float]  # P(yes) by query id and document id


def answers_of(scored: pa.Table) -> dict[tuple[str, str], float]:
    """P(yes) of each pair in a table of teacher scores."""
    return {
        (row["query_id"], id_): p
        for row in scored.to_pylist()
        for id_, p in zip(row["document_ids"], row["rerank_scores"], strict=True)
    }


def candidates_to_score(rankings: Sequence[pa.Table], top: int) -> pa.Table:
    """Each query's first `top` documents of every ranking, once each: what the reranker has to read."""
    found: dict[str, dict[str, float]] = {}
    for ranking in rankings:
        for row in ranking.to_pylist():
            pairs = zip(row["document_ids"][:top], row["scores"][:top], strict=True)
            found.setdefault(row["query_id"], {}).update(pairs)
    columns = [list(found), [list(docs) for docs in found.values()], [list(docs.values()) for docs in found.values()]]
    types = [pa.string(), pa.list_(pa.string()), pa.list_(pa.float32())]
    arrays = [pa.array(column, type_) for column, type_ in zip(columns, types, strict=True)]
    return pa.table(arrays, names=["query_id", "document_ids", "scores"])


def fuse_rankings(ranking: pa.Table, answers: Answers, weight: float, top: int) -> pa.Table:
    """Reorder the first `top` of each query by cosine + weight · P(yes); what was not scored keeps its cosine.

    Equal scores keep their order; documents beyond `top` stay where they are.
    """
    rows = []
    for row in ranking.to_pylist():
        head = [
            (score + weight * answers.get((row["query_id"], id_), 0.0), id_)
            for id_, score in zip(row["document_ids"][:top], row["scores"][:top], strict=True)
        ]
        head.sort(key=lambda pair: -pair[0])
        row["document_ids"] = [id_ for _, id_ in head] + row["document_ids"][top:]
        row["scores"] = [score for score, _ in head] + row["scores"][top:]
        rows.append(row)
    return pa.Table.from_pylist(rows, RANKING)


def calibrate_weight(
    ranking: pa.Table, answers: Answers, positives: Mapping[str, Set[str]], settings: Evaluate, top: int
) -> float:
    """The weight of WEIGHTS with the best average recall on validation; on ties the best nDCG@10, then the least."""

    def quality(weight: float) -> tuple[float, float, float]:
        tasks = score_ranking(fuse_rankings(ranking, answers, weight, top), positives, settings, {}).values()
        return mean([task["recall"] for task in tasks]), mean([task["ndcg@10"] for task in tasks]), -weight

    return max(WEIGHTS, key=quality)
