"""Score fusion for recall-then-rerank: the top documents are reordered by cosine + w · P(yes).

1. `candidates_to_score` collects what the reranker has to read.
2. `inference.score.score_table` scores it, and `answers_of` looks up P(yes) for the documents of a ranking.
3. `calibrate_weight` chooses w on the validation queries; the reference chose it on the test set
   (docs/method.md#weights-chosen-on-test).
4. `fuse_rankings` reorders the rankings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from umarvel_ray.data.dataset import Queries
from umarvel_ray.ragged import Ragged, flat
from umarvel_ray.recipe import Evaluate
from umarvel_ray.retrieve.metrics import BLOCK, blocks, mean, ranks_in, score_ranking

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
CANDIDATES = pa.schema(
    [("query", pa.int64()), ("documents", pa.large_list(pa.int64())), ("scores", pa.large_list(pa.float32()))]
)


def candidates_to_score(rankings: Sequence[pa.Table], top: int) -> pa.Table:
    """The union of each query's first `top` documents over all rankings: the pairs that the reranker has to read.

    Returns:
        Columns of CANDIDATES, one row per query, in order of appearance; scores are cosines.
    """
    queries = pc.unique(pa.chunked_array([ranking["query"].combine_chunks() for ranking in rankings])).to_numpy()
    rows = [_rows_of(queries, ranking) for ranking in rankings]
    tables = [CANDIDATES.empty_table()]
    for start in range(0, len(queries), BLOCK):
        inside = slice(start, start + BLOCK)
        tables.append(_union(queries[inside], rankings, [own[inside] for own in rows], top))
    return pa.concat_tables(tables)


def answers_of(scored: pa.Table, ranking: pa.Table) -> np.ndarray:
    """P(yes) of all documents of a ranking in order, float32 (m,); 0 for a document that was not scored.

    Args:
        scored: what `score_table` returns for `candidates_to_score`.
    """
    rows = _rows_of(ranking["query"].to_numpy(), scored)
    answers = [np.empty(0, np.float32)]
    for number, part in enumerate(blocks(ranking)):
        own = rows[number * BLOCK :][:BLOCK]
        present = np.flatnonzero(own >= 0)
        known = _at(scored, own[present])
        pairs = Ragged.of_arrow(known["documents"])
        documents = Ragged.of_arrow(part["documents"])
        span = int(max(pairs.values.max(initial=0), documents.values.max(initial=0))) + 1
        keys = present[pairs.owners] * span + pairs.values
        answers.append(_look_up(keys, flat(known["rerank_scores"]), documents.owners * span + documents.values))
    return np.concatenate(answers)


def fuse_rankings(ranking: pa.Table, answers: np.ndarray, weight: float, top: int) -> pa.Table:
    """Reorder each query's first `top` documents by cosine + weight · P(yes) (docs/method.md#score-fusion).

    Ties keep their order; documents beyond `top` do not move.

    Args:
        answers: of `answers_of`. A document that was not scored keeps its cosine.
    """
    tables, start = [ranking.slice(0, 0)], 0
    for part in blocks(ranking):
        stop = start + len(pc.list_flatten(part["documents"]))
        tables.append(_fused(part, answers[start:stop], weight, top))
        start = stop
    return pa.concat_tables(tables)


def calibrate_weight(ranking: pa.Table, answers: np.ndarray, queries: Queries, settings: Evaluate, top: int) -> float:
    """The weight in WEIGHTS with the best average recall of a validation ranking.

    Ties are broken by nDCG@10, then by the smaller weight.
    """

    def quality(weight: float) -> tuple[float, float, float]:
        tasks = score_ranking(fuse_rankings(ranking, answers, weight, top), queries, settings).values()
        return mean([task["recall"] for task in tasks]), mean([task["ndcg@10"] for task in tasks]), -weight

    return max(WEIGHTS, key=quality)


def _rows_of(queries: np.ndarray, table: pa.Table) -> np.ndarray:
    """The row of each query in a table with one row per query: int64 (n,), −1 if it has none."""
    rows = pc.index_in(pa.array(queries, pa.int64()), value_set=table["query"].combine_chunks())
    found: np.ndarray = rows.fill_null(-1).to_numpy().astype(np.int64)
    return found


def _at(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Rows of a table. `take` copies all of a table of many chunks, so it is given only those between the rows."""
    first, last = (int(rows.min()), int(rows.max())) if len(rows) else (0, -1)
    return table.slice(first, last - first + 1).take(pa.array(rows - first))


def _union(queries: np.ndarray, rankings: Sequence[pa.Table], rows: Sequence[np.ndarray], top: int) -> pa.Table:
    """The candidates of some queries, which are in `rows` of each ranking."""
    parts = []
    for ranking, own in zip(rankings, rows, strict=True):
        present = np.flatnonzero(own >= 0)
        table = _at(ranking, own[present])
        documents = Ragged.of_arrow(table["documents"])
        head = ranks_in(documents) < top
        parts.append((present[documents.owners[head]], documents.values[head], flat(table["scores"])[head]))
    owners, values, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    _, first = np.unique(owners * (int(values.max(initial=0)) + 1) + values, return_index=True)
    order = first[np.lexsort((first, owners[first]))]
    documents = Ragged.of_counts(np.bincount(owners[order], minlength=len(queries)), values[order])
    return pa.table([pa.array(queries), documents.to_arrow(), documents.like(scores[order])], schema=CANDIDATES)


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The value of each key that is asked for; 0 if it is not among `keys`."""
    if not len(keys):
        return np.zeros(len(asked), values.dtype)
    order = np.argsort(keys)
    place = order[np.minimum(np.searchsorted(keys, asked, sorter=order), len(keys) - 1)]
    return np.where(keys[place] == asked, values[place], 0)


def _fused(ranking: pa.Table, answers: np.ndarray, weight: float, top: int) -> pa.Table:
    documents, scores = Ragged.of_arrow(ranking["documents"]), flat(ranking["scores"]).copy()
    head = np.flatnonzero(ranks_in(documents) < top)
    fused = scores[head].astype(np.float64) + weight * answers[head].astype(np.float64)
    order = np.lexsort((-fused, documents.owners[head]))  # stable
    values = documents.values.copy()
    values[head], scores[head] = documents.values[head[order]], fused[order]
    for name, column in (
        ("documents", Ragged(documents.offsets, values).to_arrow()),
        ("scores", documents.like(scores)),
    ):
        ranking = ranking.set_column(ranking.schema.get_field_index(name), name, column)
    return ranking
