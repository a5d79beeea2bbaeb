"""Exact top-k by inner product: blocked fp32 matmul, exclusions per query, ties broken by the lower index (rule 7).

The corpus may be searched in parts, on any machines: `merge_topk` of the parts' answers is the answer of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

TopK = tuple[np.ndarray, np.ndarray]


def topk(
    queries: np.ndarray,
    documents: np.ndarray,
    k: int,
    exclude: Sequence[np.ndarray] | None = None,
    block: int = 65536,
    query_block: int = 1024,
    device: str = "cpu",
) -> TopK:
    """The k documents of largest inner product with each query.

    Args:
        queries: float32 (n, d).
        documents: float32 (m, d).
        exclude: per query, the document indices it must not return.
        block, query_block: sizes of the score matrix held at once.

    Returns:
        scores float32 (n, k), descending, and indices int64 (n, k). Where fewer than k documents remain, the tail has
        score -inf and index -1.
    """
    best = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    for start in range(0, len(documents), block):
        part = _tensor(documents[start : start + block], device)
        for first in range(0, len(queries), query_block):
            rows = slice(first, min(first + query_block, len(queries)))
            scores = _tensor(queries[rows], device) @ part.T
            if exclude is not None:
                _forbid(scores, exclude[rows], start)
            so_far = best[0][rows], best[1][rows]
            best[0][rows], best[1][rows] = merge_topk([so_far, _block_topk(scores, k, start)], k)
    return best


def merge_topk(parts: Sequence[TopK], k: int) -> TopK:
    """Join top-k answers over disjoint parts of one corpus, indices already counted in the whole corpus."""
    scores = np.concatenate([part[0] for part in parts], axis=1)
    indices = np.concatenate([part[1] for part in parts], axis=1)
    missing = k - scores.shape[1]
    if missing > 0:
        scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
        indices = np.pad(indices, ((0, 0), (0, missing)), constant_values=-1)
    order = np.lexsort((indices, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1)


def _tensor(vectors: np.ndarray, device: str) -> torch.Tensor:
    # A copy, since arrays from Ray's object store are read-only, which torch cannot express.
    return torch.tensor(vectors, dtype=torch.float32, device=device)


def _forbid(scores: torch.Tensor, exclude: Sequence[np.ndarray], start: int) -> None:
    counts = [len(indices) for indices in exclude]
    columns = np.concatenate([np.asarray(indices, np.int64) for indices in exclude]) - start
    rows = np.repeat(np.arange(len(exclude)), counts)
    inside = (columns >= 0) & (columns < scores.shape[1])
    scores[torch.from_numpy(rows[inside]), torch.from_numpy(columns[inside])] = -torch.inf


def _block_topk(scores: torch.Tensor, k: int, start: int) -> TopK:
    """Top-k of one block. `torch.topk` picks any of the documents tied at the last place, so those rows are sorted."""
    k = min(k, scores.shape[1])
    values, columns = torch.topk(scores, k, dim=1)
    tied = (scores >= values[:, -1:]).sum(1) > k
    if tied.any():
        ordered = torch.sort(scores[tied], dim=1, descending=True, stable=True)
        values[tied], columns[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    values, columns = values.cpu().numpy(), columns.cpu().numpy() + start
    columns[np.isneginf(values)] = -1
    return values, columns


def topk_of_rows(
    queries: np.ndarray,
    documents: np.ndarray,
    start: int,
    k: int,
    rows: np.ndarray | None,
    exclude: Sequence[np.ndarray] | None,
    device: str = "cpu",
) -> TopK:
    """Top-k in one slice of a corpus, among some of its rows only; every row number counts in the whole corpus.

    Args:
        documents: float32 (m, d), rows start … start + m of the corpus.
        rows: ascending row numbers that may be returned, None for all; those outside the slice are ignored.
        exclude: per query, row numbers it must not return.
    """
    stop = start + len(documents)
    rows = np.arange(start, stop) if rows is None else rows[(rows >= start) & (rows < stop)]
    if len(rows) < len(documents):
        documents = documents[rows - start]
    if exclude is not None:
        exclude = [_places(rows, forbidden) for forbidden in exclude]
    scores, places = topk(queries, documents, k, exclude, device=device)
    return scores, np.where(places >= 0, rows[places] if len(rows) else -1, -1)


def _places(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where the wanted row numbers stand in ascending `rows`; those that do not are left out."""
    places = np.searchsorted(rows, wanted)
    inside = places < len(rows)
    places, wanted = places[inside], np.asarray(wanted)[inside]
    return places[rows[places] == wanted]
