"""Score fusion for recall-then-rerank: the top documents are reordered by cosine + w · P(yes).

1. `candidates_to_score` collects what the reranker has to read.
2. `inference.score.score_table` scores it, and `answers_of` reads P(yes) from its table.
3. `calibrate_weight` chooses w on the validation queries; the reference chose it on the test set
   (docs/method.md#weights-chosen-on-test).
4. `fuse_rankings` reorders the rankings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import pyarrow as pa

from umarvel_ray.recipe import Evaluate
from umarvel_ray.retrieve.metrics import mean, score_ranking
from umarvel_ray.retrieve.rank import RANKING

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)

Answers = Mapping[tuple[str, str], float]  # P(yes) by (query id, document id)


def answers_of(scored: pa.Table) -> dict[tuple[str, str], float]:
    """P(yes) of each pair in a table returned by `score_table`."""
    return {
        (row["query_id"], id_): p
        for row in scored.to_pylist()
        for id_, p in zip(row["document_ids"], row["rerank_scores"], strict=True)
    }


def candidates_to_score(rankings: Sequence[pa.Table], top: int) -> pa.Table:
    """The union of each query's first `top` documents over all rankings: the pairs that the reranker has to read.

    Returns:
        query_id, document_ids[], scores[] (cosines), one row per query.
    """
    scores_of: dict[str, dict[str, float]] = {}  # query id → document id → cosine
    for ranking in rankings:
        for row in ranking.to_pylist():
            pairs = zip(row["document_ids"][:top], row["scores"][:top], strict=True)
            scores_of.setdefault(row["query_id"], {}).update(pairs)
    found = scores_of.values()
    columns = [list(scores_of), [list(scores) for scores in found], [list(scores.values()) for scores in found]]
    types = [pa.string(), pa.list_(pa.string()), pa.list_(pa.float32())]
    arrays = [pa.array(column, type_) for column, type_ in zip(columns, types, strict=True)]
    return pa.table(arrays, names=["query_id", "document_ids", "scores"])


def fuse_rankings(ranking: pa.Table, answers: Answers, weight: float, top: int) -> pa.Table:
    """Reorder each query's first `top` documents by cosine + weight · P(yes) (docs/method.md#score-fusion).

    A document that was not scored keeps its cosine. Ties keep their order; documents beyond `top` do not move.
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
    """The weight in WEIGHTS with the best average recall of a validation ranking.

    Ties are broken by nDCG@10, then by the smaller weight.
    """

    def quality(weight: float) -> tuple[float, float, float]:
        tasks = score_ranking(fuse_rankings(ranking, answers, weight, top), positives, settings, {}).values()
        return mean([task["recall"] for task in tasks]), mean([task["ndcg@10"] for task in tasks]), -weight

    return max(WEIGHTS, key=quality)
