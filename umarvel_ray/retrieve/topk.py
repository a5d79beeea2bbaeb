"""Exact top-k by inner product: blocked fp32 matmul, per-query exclusions, ties broken by the lower index.

A corpus can be searched in parts, on different machines: merging the parts' results with `merge_topk` gives the result
for the whole corpus.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

TopK = tuple[np.ndarray, np.ndarray]  # scores float32 (n, k), descending, and indices int64 (n, k)


def topk(
    queries: np.ndarray,
    documents: np.ndarray,
    k: int,
    exclude: Sequence[np.ndarray] | None = None,
    block: int = 65536,
    query_block: int = 1024,
    device: str = "cpu",
) -> TopK:
    """The k documents with the largest inner product with each query.

    For each block of documents and queries: (1) compute all scores, (2) mask excluded documents, (3) take the block's
    top k, (4) merge it into the best found so far.

    Args:
        queries: float32 (n, d).
        documents: float32 (m, d).
        exclude: per query, the indices of documents that must not be returned.
        block, query_block: the largest score matrix held in memory is (query_block, block).

    Returns:
        scores float32 (n, k), descending, and indices int64 (n, k). If fewer than k documents are available, the tail
        has score -inf and index -1.
    """
    best_scores = np.full((len(queries), k), -np.inf, np.float32)
    best_indices = np.full((len(queries), k), -1, np.int64)
    for start in range(0, len(documents), block):
        part = _tensor(documents[start : start + block], device)  # (block, d)
        for first in range(0, len(queries), query_block):
            rows = slice(first, min(first + query_block, len(queries)))
            scores = _tensor(queries[rows], device) @ part.T  # 1. (query_block, block)
            if exclude is not None:
                _mask(scores, exclude[rows], start)  # 2.
            found = _block_topk(scores, k, start)  # 3.
            so_far = best_scores[rows], best_indices[rows]
            best_scores[rows], best_indices[rows] = merge_topk([so_far, found], k)  # 4.
    return best_scores, best_indices


def merge_topk(parts: Sequence[TopK], k: int) -> TopK:
    """Merge top-k results over disjoint parts of a corpus; indices refer to the whole corpus."""
    scores = np.concatenate([part[0] for part in parts], axis=1)
    indices = np.concatenate([part[1] for part in parts], axis=1)
    missing = k - scores.shape[1]
    if missing > 0:
        scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
        indices = np.pad(indices, ((0, 0), (0, missing)), constant_values=-1)
    order = np.lexsort((indices, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1)


def _tensor(vectors: np.ndarray, device: str) -> torch.Tensor:
    # Copied: arrays from Ray's object store are read-only, and torch has no read-only tensors.
    return torch.tensor(vectors, dtype=torch.float32, device=device)


def _mask(scores: torch.Tensor, exclude: Sequence[np.ndarray], start: int) -> None:
    """Set the scores of excluded documents to -inf; column 0 of `scores` is document `start`."""
    counts = [len(indices) for indices in exclude]
    columns = np.concatenate([np.asarray(indices, np.int64) for indices in exclude]) - start
    rows = np.repeat(np.arange(len(exclude)), counts)
    inside = (columns >= 0) & (columns < scores.shape[1])
    scores[torch.from_numpy(rows[inside]), torch.from_numpy(columns[inside])] = -torch.inf


def _block_topk(scores: torch.Tensor, k: int, start: int) -> TopK:
    """Top k of one block. `torch.topk` breaks ties for the last rank arbitrarily, so rows with such ties are sorted."""
    k = min(k, scores.shape[1])
    values, columns = torch.topk(scores, k, dim=1)
    tied = (scores >= values[:, -1:]).sum(1) > k
    if tied.any():
        ordered = torch.sort(scores[tied], dim=1, descending=True, stable=True)
        values[tied], columns[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    best, indices = values.cpu().numpy(), columns.cpu().numpy() + start
    indices[np.isneginf(best)] = -1
    return best, indices


def topk_of_rows(
    queries: np.ndarray,
    documents: np.ndarray,
    start: int,
    k: int,
    rows: np.ndarray | None,
    exclude: Sequence[np.ndarray] | None,
    device: str = "cpu",
) -> TopK:
    """Top k of one slice of a corpus, optionally restricted to some rows; row numbers refer to the whole corpus.

    Args:
        queries: float32 (n, d).
        documents: float32 (m, d), rows start to start + m − 1 of the corpus.
        rows: ascending row numbers that may be returned, None for all; those outside the slice are ignored.
        exclude: per query, row numbers that must not be returned.

    Returns:
        See `topk`; the indices are row numbers of the corpus.
    """
    stop = start + len(documents)
    rows = np.arange(start, stop) if rows is None else rows[(rows >= start) & (rows < stop)]
    if len(rows) < len(documents):
        documents = documents[rows - start]
    if exclude is not None:
        exclude = [_positions(rows, excluded) for excluded in exclude]
    scores, positions = topk(queries, documents, k, exclude, device=device)
    return scores, np.where(positions >= 0, rows[positions] if len(rows) else -1, -1)


def _positions(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The positions of row numbers within ascending `rows`; numbers that are not among them are dropped."""
    positions = np.asarray(np.searchsorted(rows, numbers))
    inside = positions < len(rows)
    positions, numbers = positions[inside], np.asarray(numbers)[inside]
    return np.asarray(positions[rows[positions] == numbers])
