"""Exact search over embedding shards, spread over the embedding actors.

Each actor holds a slice of the corpus (the vectors stay in its node's object store), queries stream past in blocks and
the partial top-ks merge; no approximation, and the corpus never passes through the driver.
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
    """The documents embedded in `folder`, searchable by row number; `ids[row]` names a row.

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
        shares = [share.tolist() for share in np.array_split(np.arange(len(columns)), len(actors)) if len(share)]
        self._slices = [
            (actor, int(starts[share[0]]), actor.call.remote(_read_vectors, folder, share))
            for actor, share in zip(actors, shares, strict=False)
        ]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Ascending row numbers of ids; quarantined documents have none and are left out."""
        return np.array(sorted(self.row_of[id_] for id_ in ids if id_ in self.row_of), np.int64)

    def topk(
        self,
        queries: np.ndarray,
        k: int,
        rows: np.ndarray | None = None,
        exclude: Sequence[np.ndarray] | None = None,
    ) -> TopK:
        """Scores float32 (n, k) and row numbers int64 (n, k), as `topk` gives them over the whole corpus.

        Args:
            rows: ascending row numbers to search among; None for all.
            exclude: per query, row numbers it must not get.
        """
        blocks = []
        for first in range(0, len(queries), QUERY_BLOCK):
            some = slice(first, first + QUERY_BLOCK)
            block = ray.put(queries[some])
            forbidden = None if exclude is None else list(exclude[some])
            blocks.append(
                [
                    actor.call.remote(topk_of_rows, block, vectors, start, k, rows, forbidden, self._embedders.device)
                    for actor, start, vectors in self._slices
                ]
            )
        merged = [merge_topk(self._embedders.get(block), k) for block in blocks]
        return tuple(np.concatenate(parts) for parts in zip(*merged, strict=True))

    def pair_scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Cosine of each query with its own row: float32 (n,), for queries (n, d) and row numbers (n,)."""
        scores = np.empty(len(rows), np.float32)
        for (actor, start, vectors), stop in zip(self._slices, [*self._starts()[1:], len(self.ids)], strict=True):
            inside = np.flatnonzero((rows >= start) & (rows < stop))
            ref = actor.call.remote(_pair_scores, vectors, queries[inside], rows[inside] - start)
            scores[inside] = self._embedders.get(ref)
        return scores

    def _starts(self) -> list[int]:
        return [start for _, start, _ in self._slices]


def _read_vectors(folder: Path, shards: Sequence[int]) -> np.ndarray:
    return np.concatenate([vectors_of(read_shard(folder, index)) for index in shards])


def _pair_scores(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", queries, vectors[rows])
