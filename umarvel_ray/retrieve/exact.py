"""Exact search over embedding shards, distributed over the embedding actors.

Each actor holds a slice of the corpus in its node's object store, queries arrive in blocks, and the driver merges the
partial results. There is no approximation, and the corpus never passes through the driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray

from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.inference.embeddings import vectors_of
from umarvel_ray.inference.shards import read_manifest, read_shard
from umarvel_ray.retrieve.topk import TopK, merge_topk, topk_of_rows

QUERY_BLOCK = 4096


class ExactSearch:
    """Exact search over the documents embedded in `folder`, by row number; `ids[row]` is the document id of a row.

    Raises:
        UserError: the folder holds no finished embed job.
    """

    def __init__(self, embedders: EmbedderGroup, folder: str | Path) -> None:
        folder = Path(folder)
        columns = [
            read_shard(folder, index, ["id"])["id"].to_pylist() for index in range(read_manifest(folder)["shards"])
        ]
        self.ids: list[str] = [id_ for ids in columns for id_ in ids]
        self.row_of = {id_: row for row, id_ in enumerate(self.ids)}
        self._embedders = embedders
        starts = np.concatenate([[0], np.cumsum([len(ids) for ids in columns])])
        actors = embedders.actors
        shards = [part.tolist() for part in np.array_split(np.arange(len(columns)), len(actors)) if len(part)]
        self._slices = [
            (actor, int(starts[numbers[0]]), actor.call.remote(_read_vectors, folder, numbers))
            for actor, numbers in zip(actors, shards, strict=False)
        ]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The ascending row numbers of ids; quarantined documents have none and are skipped."""
        return np.array(sorted(self.row_of[id_] for id_ in ids if id_ in self.row_of), np.int64)

    def topk(
        self,
        queries: np.ndarray,
        k: int,
        rows: np.ndarray | None = None,
        exclude: Sequence[np.ndarray] | None = None,
    ) -> TopK:
        """Scores float32 (n, k) and row numbers int64 (n, k), equal to those of `topk` over the whole corpus.

        Args:
            queries: float32 (n, d).
            rows: ascending row numbers to search among; None for all.
            exclude: per query, row numbers that must not be returned.
        """
        calls = []
        for first in range(0, len(queries), QUERY_BLOCK):
            inside = slice(first, first + QUERY_BLOCK)
            block = ray.put(queries[inside])
            excluded = None if exclude is None else list(exclude[inside])
            calls.append(
                [
                    actor.call.remote(topk_of_rows, block, vectors, start, k, rows, excluded, self._embedders.device)
                    for actor, start, vectors in self._slices
                ]
            )
        merged = [merge_topk(self._embedders.get(refs), k) for refs in calls]
        scores, found = zip(*merged, strict=True)
        return np.concatenate(scores), np.concatenate(found)

    def pair_scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Cosines float32 (n,) of query i with row `rows[i]`, for queries (n, d) and row numbers (n,)."""
        scores = np.empty(len(rows), np.float32)
        stops = [*(start for _, start, _ in self._slices[1:]), len(self.ids)]
        for (actor, start, vectors), stop in zip(self._slices, stops, strict=True):
            inside = np.flatnonzero((rows >= start) & (rows < stop))
            ref = actor.call.remote(_pair_scores, vectors, queries[inside], rows[inside] - start)
            scores[inside] = self._embedders.get(ref)
        return scores


def _read_vectors(folder: Path, shards: Sequence[int]) -> np.ndarray:
    return np.concatenate([vectors_of(read_shard(folder, index)) for index in shards])


def _pair_scores(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    scores: np.ndarray = np.einsum("nd,nd->n", queries, vectors[rows])
    return scores
