"""Exact top-k by inner product, with exclusions per query; ties are broken by the lower index.

A corpus can be searched in parts, on different machines: merging the parts' results with `merge_topk` gives the result
for the whole corpus.

A candidate is one int64, its key: the score's bits above the index's, so that ascending keys are descending scores and,
among equal scores, ascending indices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import NamedTuple, Protocol

import numpy as np
import torch

from umarvel_ray.ragged import Ragged, find

Vectors = np.ndarray | torch.Tensor
TopK = tuple[np.ndarray, np.ndarray]  # scores float32 (n, k), descending, and indices int64 (n, k)

# Documents and queries per block. On CPUs a block's scores stay in the cache; other devices want larger products.
CPU_BLOCKS = 4096, 512
DEVICE_BLOCKS = 16384, 4096
# On CPUs faiss is the fastest for fewer queries than FEW, for which it has a kernel of its own, and for at least MANY
# numbers in the queries, when it leaves the product to BLAS.
FEW, MANY = 20, 2**17
GROUP = 16  # documents of which only the largest score is compared at first


def topk(
    queries: np.ndarray,
    documents: Vectors,
    k: int,
    exclude: Ragged | None = None,
    device: str = "cpu",
    blocks: tuple[int, int] | None = None,
) -> TopK:
    """The k documents with the largest inner product with each query.

    Args:
        queries: float32 (n, d).
        documents: float32 (m, d), an array or a tensor on `device`.
        exclude: per query, the indices of documents that must not be returned.
        blocks: documents and queries per block of scores; None chooses, on CPUs also between them and faiss.

    Returns:
        scores float32 (n, k), descending, and indices int64 (n, k). If fewer than k documents are available, the tail
        has score -inf and index -1. A document whose score is NaN or -inf is not available.
    """
    return _search(queries, documents, None, k, exclude, device, blocks)


def topk_of_rows(
    queries: np.ndarray,
    documents: Vectors,
    start: int,
    k: int,
    rows: np.ndarray | None,
    exclude: Ragged | None,
    device: str = "cpu",
    blocks: tuple[int, int] | None = None,
) -> TopK:
    """Top k of one slice of a corpus, optionally restricted to some rows; row numbers refer to the whole corpus.

    Args:
        queries: float32 (n, d).
        documents: float32 (m, d), an array or a tensor on `device`: rows start to start + m − 1 of the corpus.
        rows: ascending row numbers that may be returned, None for all; those outside the slice are ignored.
        exclude: per query, row numbers that must not be returned.

    Returns:
        See `topk`; the indices are row numbers of the corpus.
    """
    if rows is not None:
        rows = rows[slice(*np.searchsorted(rows, [start, start + len(documents)]))]
        first, count = (int(rows[0]), len(rows)) if len(rows) else (start, 0)
        if not count or rows[-1] - first == count - 1:  # a range: a view of the slice
            documents, start, rows = documents[first - start : first - start + count], first, None
    if rows is None:
        exclude = exclude and Ragged(exclude.offsets, exclude.values - start)
        scores, found = _search(queries, documents, None, k, exclude, device, blocks)
        return scores, np.where(found >= 0, found + start, -1)
    if exclude is not None:
        places, known = find(rows, exclude.values)
        exclude = Ragged(exclude.offsets, places).keep(known)
    scores, found = _search(queries, documents, rows - start, k, exclude, device, blocks)
    return scores, np.where(found >= 0, rows[found], -1)


def merge_topk(parts: Sequence[TopK], k: int) -> TopK:
    """Merge top-k results over disjoint parts of a corpus; indices refer to the whole corpus."""
    scores, indices = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    keys = _keys(torch.from_numpy(scores), torch.from_numpy(indices)).numpy()
    return _decoded(np.sort(np.concatenate([keys, _nothing(len(keys), k)], axis=1), axis=1)[:, :k])


def _search(
    queries: np.ndarray,
    documents: Vectors,
    rows: np.ndarray | None,
    k: int,
    exclude: Ragged | None,
    device: str,
    blocks: tuple[int, int] | None,
) -> TopK:
    """See `topk`. With `rows`, an index is the place of a document's row in `rows`."""
    if not k or not len(queries):
        return _decoded(_nothing(len(queries), k))
    by_faiss = len(queries) < FEW or queries.size >= MANY
    if device == "cpu" and blocks is None and rows is None and len(documents) and by_faiss and _is_plain(documents):
        return _search_by_faiss(queries, np.asarray(documents), k, exclude)
    return _search_by_blocks(queries, documents, rows, k, exclude, device, blocks)


def _is_plain(vectors: Vectors) -> bool:
    """Whether faiss can read them where they are."""
    return isinstance(vectors, np.ndarray) and vectors.dtype == np.float32 and vectors.flags.c_contiguous


def _search_by_faiss(queries: np.ndarray, documents: np.ndarray, k: int, exclude: Ragged | None) -> TopK:
    """See `topk`. Some more than k are fetched; then most k-th best surely surpass all others.

    The rest start over: queries with many exclusions or with ties at the last rank.
    """
    spare = 0 if exclude is None else min(k, int(np.quantile(exclude.counts, 0.99)))
    fetch = min(k + spare + 1, len(documents))
    queries = np.ascontiguousarray(queries, np.float32)
    import faiss  # of an extra, and needed by nothing else here

    scores, found = faiss.knn(queries, documents, fetch, metric=faiss.METRIC_INNER_PRODUCT)
    last = scores[:, -1].copy()
    scores[found < 0] = -np.inf
    if exclude is not None:
        scores[exclude.contains_pairs(np.arange(len(found))[:, None], found)] = -np.inf
    best, indices = merge_topk([(scores, found)], k)
    unsure = np.flatnonzero(best[:, -1] <= last) if fetch < len(documents) else np.arange(0)
    own = None if exclude is None else exclude.take(unsure)
    best[unsure], indices[unsure] = _search_by_blocks(queries[unsure], documents, None, k, own, "cpu", None)
    return best, indices


def _search_by_blocks(
    queries: np.ndarray,
    documents: Vectors,
    rows: np.ndarray | None,
    k: int,
    exclude: Ragged | None,
    device: str,
    blocks: tuple[int, int] | None,
) -> TopK:
    """See `_search`."""
    if not len(queries):
        return _decoded(_nothing(0, k))
    on_cpu = device == "cpu"
    block, query_block = blocks or (CPU_BLOCKS if on_cpu else DEVICE_BLOCKS)
    parts = np.array_split(np.arange(len(queries)), max(1, -(-len(queries) // query_block)))
    own = [_Queries.of(queries, part, exclude) for part in parts]
    searches: list[_Search] = [_SearchOnCpu(one, k) if on_cpu else _SearchOnDevice(one, k, device) for one in own]
    # While one thread sifts scores, which takes one core, another computes a product.
    lanes = min(len(searches), torch.get_num_threads()) if on_cpu else 1
    shares = [searches[lane::lanes] for lane in range(lanes)]
    buffers = [np.empty((block + GROUP) * len(parts[0]) if on_cpu else 0, np.float32) for _ in shares]
    with ThreadPoolExecutor(lanes) as pool:
        for start, vectors in _blocks(documents, rows, block):
            if not on_cpu:
                # Once for all searches; an array is copied even to "cpu:0", because torch has no read-only tensors.
                vectors = vectors if isinstance(vectors, torch.Tensor) else torch.tensor(vectors, device=device)
            list(pool.map(_see, shares, repeat(vectors), repeat(start), buffers))
    return _decoded(np.concatenate([search.best() for search in searches]))


def _blocks(documents: Vectors, rows: np.ndarray | None, block: int) -> Iterator[tuple[int, Vectors]]:
    """The documents, or those in `rows`, block by block: the first one's index and vectors float32 (b, d)."""
    for start in range(0, len(documents) if rows is None else len(rows), block):
        inside = slice(start, start + block)
        vectors = documents[inside] if rows is None else documents[rows[inside]]
        yield start, vectors if isinstance(vectors, torch.Tensor) else np.asarray(vectors, np.float32)


class _Queries(NamedTuple):
    """Some queries and what they exclude.

    Attributes:
        vectors: float32 (n, d).
        columns, owners: int64 (e,): query `owners[i]` must not find document `columns[i]`; columns ascend.
    """

    vectors: np.ndarray
    columns: np.ndarray
    owners: np.ndarray

    @classmethod
    def of(cls, queries: np.ndarray, part: np.ndarray, exclude: Ragged | None) -> _Queries:
        """Those of `queries` whose numbers are in `part`."""
        own = Ragged.of([]) if exclude is None else exclude.take(part)
        order = np.argsort(own.values)
        return cls(np.asarray(queries[part], np.float32), own.values[order], own.owners[order])

    def excluded(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The excluded ones of documents start to start + count − 1, counted from `start`, and whose they are."""
        inside = slice(*np.searchsorted(self.columns, [start, start + count]))
        return self.columns[inside] - start, self.owners[inside]


class _Search(Protocol):
    """The best k documents of some queries while blocks of documents pass by."""

    def see(self, documents: Vectors, start: int, buffer: np.ndarray) -> None:
        """Take in documents (b, d), whose indices begin at `start`; `buffer` is memory for their scores."""

    def best(self) -> np.ndarray:
        """Keys int64 (n, k), ascending."""


def _see(searches: Sequence[_Search], documents: Vectors, start: int, buffer: np.ndarray) -> None:
    for search in searches:
        search.see(documents, start, buffer)


class _SearchOnDevice:
    """Everything on a device of torch, without a look at the scores before the top k of the block."""

    def __init__(self, queries: _Queries, k: int, device: str) -> None:
        self._queries = queries
        self._vectors = torch.from_numpy(queries.vectors).to(device)
        self._best = torch.from_numpy(_nothing(len(queries.vectors), k)).to(device)

    def see(self, documents: Vectors, start: int, buffer: np.ndarray) -> None:
        scores = self._vectors @ torch.as_tensor(documents).T  # (n, b)
        columns, owners = (
            torch.from_numpy(part).to(scores.device) for part in self._queries.excluded(start, len(documents))
        )
        scores[owners, columns] = -torch.inf
        keys = _keys(scores, torch.arange(start, start + len(documents), device=scores.device))
        self._best = torch.cat([self._best, keys], 1).topk(self._best.shape[1], largest=False).values

    def best(self) -> np.ndarray:
        return np.sort(self._best.cpu().numpy(), axis=1)


class _SearchOnCpu:
    """For CPUs, where sifting scores costs as much as the product unless almost all are passed over.

    A later document must beat the k-th best score so far. After a few blocks hardly any does, and the largest scores of
    groups of documents tell where. Those that do are collected beside the best, and all are sorted now and then.

    NumPy rather than torch: its threads do not spin between products, which would slow the sifting down.
    """

    def __init__(self, queries: _Queries, k: int) -> None:
        self._queries = queries
        self._k = k
        n = len(queries.vectors)
        self._kept = _nothing(n, 2 * k)  # keys (n, k + room): the best, those found since, and free places
        self._used = np.full(n, k)  # places, by query
        self._floor = np.full(n, np.finfo(np.float32).min)  # the smallest score above the k-th best

    def see(self, documents: Vectors, start: int, buffer: np.ndarray) -> None:
        found, owners, columns = _not_below(self._scores(np.asarray(documents), start, buffer), self._floor, self._k)
        counts = np.bincount(owners, minlength=len(self._used))
        if (self._used + counts).max(initial=0) > self._kept.shape[1]:
            self._sort(room=max(self._k, counts.max()))
        order = np.argsort(owners.astype(np.min_scalar_type(len(counts))), kind="stable")  # 16 bits sort fastest
        owners = owners[order]
        places = np.arange(len(owners)) + (self._used - np.cumsum(counts) + counts)[owners]
        keys = _keys(torch.from_numpy(found[order]), torch.from_numpy(columns[order] + start))
        self._kept[owners, places] = keys.numpy()
        self._used += counts

    def best(self) -> np.ndarray:
        self._sort(room=0)
        return self._kept

    def _scores(self, documents: np.ndarray, start: int, buffer: np.ndarray) -> np.ndarray:
        """Scores (b, n) in `buffer`, -inf for excluded documents and for rows that complete the last group."""
        count, n = len(documents), len(self._queries.vectors)
        whole = -(-count // GROUP) * GROUP
        scores = buffer[: whole * n].reshape(whole, n)
        np.matmul(documents, self._queries.vectors.T, out=scores[:count])
        scores[count:] = -np.inf
        scores[self._queries.excluded(start, count)] = -np.inf
        return scores

    def _sort(self, room: int) -> None:
        best = np.sort(self._kept, axis=1)[:, : self._k]
        self._kept = np.concatenate([best, _nothing(len(best), room)], axis=1)
        self._used[:] = self._k
        self._floor = np.nextafter(_decoded(best[:, -1])[0], np.float32(np.inf))


def _not_below(scores: np.ndarray, floor: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (b, n) that reach floor (n,), with their columns and rows, but for some that k others surpass."""
    groups = scores.reshape(-1, GROUP, scores.shape[1])
    largest = groups.max(1)  # (b / GROUP, n); NaN if the group has one
    hit = ~(largest < floor)
    if np.count_nonzero(hit) > hit.size / 2:
        several = largest if len(largest) >= k else scores  # k groups have k scores that are at least as large
        rank = min(k, len(several))
        floor = np.maximum(floor, np.partition(np.fmax(several, -np.inf).T, -rank)[:, -rank])
        hit = ~(largest < floor)
    group, column = _where(hit)
    values = groups[group, :, column]  # (hits, GROUP)
    which, lane = _where(values >= floor[column, None])
    return values[which, lane], column[which], group[which] * GROUP + lane


def _where(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the true entries of a matrix; faster than `np.nonzero` where they are few."""
    return np.divmod(np.flatnonzero(mask), max(1, mask.shape[1]))


def _keys(scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """int64 keys of float32 scores and int64 indices < 2³²; NaN counts as -inf."""
    # Adding 0 makes -0.0 equal to 0.0; the bits of negative numbers ascend the other way round.
    bits = (torch.nan_to_num(scores, -torch.inf, torch.inf, -torch.inf) + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (~ordered).long() << 32 | indices & 0xFFFFFFFF


def _decoded(keys: np.ndarray) -> TopK:
    """Scores float32 and indices int64 of keys; the index is -1 where the score is -inf."""
    ordered = ~(keys >> 32).astype(np.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(np.float32)
    return scores, np.where(np.isneginf(scores), -1, keys & 0xFFFFFFFF)


def _nothing(n: int, k: int) -> np.ndarray:
    """Keys int64 (n, k) of no document."""
    return np.full((n, k), _keys(torch.tensor(-torch.inf), torch.tensor(-1)).item())
