"""Exact search over embedding shards, distributed over the embedding actors.

Each actor holds a slice of the corpus, queries arrive in blocks, and the driver merges the partial results. There is no
approximation, and the corpus never passes through the driver. Every call names the files of its slice, so an actor that
was restarted reads them again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import torch

from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.inference.embeddings import vectors_of
from umarvel_ray.inference.held import held_slice
from umarvel_ray.inference.shards import read_manifest, read_shard, shard_path
from umarvel_ray.ragged import Ragged, find
from umarvel_ray.retrieve.topk import TopK, Vectors, merge_topk, topk_of_rows

QUERY_BLOCK = 4096
PAIR_BLOCK = 4096  # pairs whose vectors are gathered at once
SEARCH_BYTES = 4 << 30  # of a GPU, for the blocks of a search


class ExactSearch:
    """Exact search over the documents embedded in `folder`; results are row numbers of the document table.

    Attributes:
        rows: int64 (n,), ascending: the documents that can be found. The search itself counts in positions, the numbers
            of embedded documents, because quarantined documents have no vector.

    Raises:
        UserError: the folder holds no finished embed job.
    """

    def __init__(self, embedders: EmbedderGroup, folder: str | Path) -> None:
        self._embedders, self.folder = embedders, Path(folder)
        manifest = read_manifest(self.folder)
        self._identity = str(manifest["inputs"])
        parts = [read_shard(self.folder, shard, ["row"])["row"].to_numpy() for shard in range(manifest["shards"])]
        self.rows = np.concatenate(parts)
        starts = np.cumsum([0, *map(len, parts)])
        shards = [part for part in np.array_split(np.arange(len(parts)), embedders.count) if len(part)]
        self._slices = [(tuple(part.tolist()), int(starts[part[0]]), int(starts[part[-1] + 1])) for part in shards]

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """The ascending positions of documents; those without a vector are left out."""
        positions, known = find(self.rows, np.unique(rows))
        ascending: np.ndarray = positions[known]
        return ascending

    def topk(
        self, queries: np.ndarray, k: int, pool: ray.ObjectRef[Any] | None = None, exclude: Ragged | None = None
    ) -> Callable[[], TopK]:
        """Start a search; the result is waited for when it is called.

        Args:
            queries: float32 (n, d).
            pool: ascending positions to search in, in the object store; None for all.
            exclude: for each query, documents that must not be returned.

        Returns:
            Scores float32 (n, k) and row numbers int64 (n, k), as of `topk` over the whole corpus.
        """
        blocks = [self._start(queries, k, pool, exclude, first) for first in range(0, len(queries), QUERY_BLOCK)]

        def wait() -> TopK:
            merged = [merge_topk(self._embedders.get(refs), k) for refs in blocks]
            scores, positions = (np.concatenate(parts) for parts in zip(*merged, strict=True))
            return scores, np.where(positions >= 0, self.rows[positions], -1)

        return wait

    def pair_scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Cosines float32 (n,) of query i with document `rows[i]`, which has a vector, for queries (n, d)."""
        scores = np.empty(len(rows), np.float32)
        positions = np.searchsorted(self.rows, rows)
        started = []
        for slice_, actor in zip(self._slices, self._embedders.actors, strict=False):
            inside = np.flatnonzero((positions >= slice_[1]) & (positions < slice_[2]))
            args = (self.folder, self._identity, slice_, queries[inside], positions[inside], self._embedders.device)
            started.append((inside, actor.call.remote(_pair_scores, *args)))
        for inside, ref in started:
            scores[inside] = self._embedders.get(ref)
        return scores

    def list_scores(self, queries: np.ndarray, lists: Ragged) -> Callable[[], np.ndarray]:
        """Start scoring lists of documents; the result is waited for when it is called.

        Args:
            queries: float32 (n, d).
            lists: for each query, positions of documents.

        Returns:
            Cosines float32 (m,) of each query with the documents of its list, in order.
        """
        block, started = ray.put(queries), []
        for slice_, actor in zip(self._slices, self._embedders.actors, strict=False):
            inside = np.flatnonzero((lists.values >= slice_[1]) & (lists.values < slice_[2]))
            pairs = lists.owners[inside], lists.values[inside]
            args = (self.folder, self._identity, slice_, block, *pairs, self._embedders.device)
            started.append((inside, actor.call.remote(_list_scores, *args)))

        def wait() -> np.ndarray:
            scores = np.empty(len(lists.values), np.float32)
            for inside, ref in started:
                scores[inside] = self._embedders.get(ref)
            return scores

        return wait

    def _start(
        self, queries: np.ndarray, k: int, pool: ray.ObjectRef[Any] | None, exclude: Ragged | None, first: int
    ) -> list[ray.ObjectRef[Any]]:
        inside = np.arange(first, min(first + QUERY_BLOCK, len(queries)))
        block, excluded = ray.put(queries[inside]), None
        if exclude is not None:
            own = exclude.take(inside)
            positions, known = find(self.rows, own.values)
            excluded = Ragged(own.offsets, positions).keep(known)
        device = self._embedders.device
        return [
            actor.call.remote(_topk, self.folder, self._identity, slice_, block, k, pool, excluded, device)
            for slice_, actor in zip(self._slices, self._embedders.actors, strict=False)
        ]


Slice = tuple[tuple[int, ...], int, int]  # numbers of shards, and the positions of their vectors: from, and to before


def _topk(
    folder: Path,
    identity: str,
    slice_: Slice,
    queries: np.ndarray,
    k: int,
    pool: np.ndarray | None,
    exclude: Ragged | None,
    device: str,
) -> TopK:
    vectors = _vectors(folder, identity, slice_, device)
    return topk_of_rows(queries, vectors, slice_[1], k, pool, exclude, device)


def _pair_scores(
    folder: Path, identity: str, slice_: Slice, queries: np.ndarray, positions: np.ndarray, device: str
) -> np.ndarray:
    vectors = _vectors(folder, identity, slice_, device)[positions - slice_[1]]
    scores: np.ndarray = np.einsum("nd,nd->n", queries, torch.as_tensor(vectors).cpu().numpy())
    return scores


def _list_scores(
    folder: Path,
    identity: str,
    slice_: Slice,
    queries: np.ndarray,
    owners: np.ndarray,
    positions: np.ndarray,
    device: str,
) -> np.ndarray:
    vectors = torch.as_tensor(_vectors(folder, identity, slice_, device))
    asked = torch.as_tensor(queries).to(vectors.device)
    parts = [np.empty(0, np.float32)]
    for first in range(0, len(owners), PAIR_BLOCK):
        inside = slice(first, first + PAIR_BLOCK)
        pair = asked[owners[inside]], vectors[positions[inside] - slice_[1]]
        parts.append(torch.einsum("nd,nd->n", *pair).cpu().numpy())
    return np.concatenate(parts)


def _vectors(folder: Path, identity: str, slice_: Slice, device: str) -> Vectors:
    """A slice, float32 (n, d), on the device if there is room; held until another one is asked for.

    Args:
        identity: tells reused folders apart.
    """
    return held_slice((folder, identity, slice_), lambda: _read_vectors(folder, slice_, device))


def _read_vectors(folder: Path, slice_: Slice, device: str) -> Vectors:
    shards, start, stop = slice_
    dimension = pq.read_schema(shard_path(folder, shards[0])).field("embedding").type.list_size
    vectors = np.empty((stop - start, dimension), np.float32)
    filled = 0
    for shard in shards:
        part = vectors_of(read_shard(folder, shard, ["embedding"]))
        vectors[filled : filled + len(part)] = part
        filled += len(part)
    if device == "cpu" or not _has_room(device, vectors.nbytes + SEARCH_BYTES):
        return vectors  # the search copies it block by block
    return torch.from_numpy(vectors).to(device)


def _has_room(device: str, size: int) -> bool:
    """Whether a GPU has so many bytes free."""
    return torch.device(device).type != "cuda" or torch.cuda.mem_get_info(device)[0] >= size
