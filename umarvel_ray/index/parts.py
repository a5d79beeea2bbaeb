"""Parts of a live index: rows that are searched together, exactly or by an index of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np

from umarvel_ray.index.corpus import Corpus
from umarvel_ray.index.faiss_index import bitmap_of
from umarvel_ray.index.labels import LABELS, ColumnLabels, Filters, Labels, RowsByLabel
from umarvel_ray.index.snapshot import Snapshot, document_at, metadata_of

Search = Callable[[np.ndarray, int, np.ndarray], tuple[np.ndarray, np.ndarray]]  # → scores (k',), rows (k',)


@dataclass(frozen=True)
class Part:
    """Rows that are searched together; only those that are alive can be found."""

    search: Search
    document: Callable[[int], dict[str, Any]]
    row_of: dict[str, int]
    labels: Labels
    alive: np.ndarray  # bool (n,)

    def among(self, filters: Filters) -> np.ndarray:
        """The rows that a search with these filters may return, bool (n,)."""
        rows = self.alive
        for name, values in filters.items():
            rows = rows & self.labels.having(name, values, len(rows))
        return rows


def base_part(base: Corpus) -> Part:
    """The documents of a corpus."""

    def search(vector: np.ndarray, k: int, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        [scores], [found] = base.index.search_rows(vector[None], k, among)
        return scores, found

    labels = ColumnLabels(base.documents, base.rows)
    return _whole(search, lambda row: base.read(np.array([row]))[0], base.index.ids, labels)


def snapshot_part(snapshot: Snapshot) -> Part:
    """The documents of a snapshot."""
    labels = RowsByLabel()
    columns = (snapshot.documents[name].to_pylist() for name in (*LABELS, "metadata"))
    for row, (*values, metadata) in enumerate(zip(*columns, strict=True)):
        labels.add(row, {**metadata_of(metadata), **dict(zip(LABELS, values, strict=True))})
    search, ids = partial(search_exactly, snapshot.vectors), snapshot.documents["id"].to_pylist()
    return _whole(search, partial(document_at, snapshot), ids, labels)


def search_exactly(vectors: np.ndarray, vector: np.ndarray, k: int, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 (k',) and rows int64 (k',) of the best inner products, by faiss, without copying the vectors."""
    k = min(k, int(np.count_nonzero(among)))
    scores, rows = np.empty(k, np.float32), np.empty(k, np.int64)
    if k:
        inputs = faiss.swig_ptr(vector), faiss.swig_ptr(vectors), len(vector), 1, len(vectors), k
        faiss.knn_inner_product(*inputs, faiss.swig_ptr(scores), faiss.swig_ptr(rows), bitmap_of(among))
    return scores, rows


def _whole(search: Search, document: Callable[[int], dict[str, Any]], ids: list[str], labels: Labels) -> Part:
    """A part whose rows are all alive."""
    return Part(search, document, {id_: row for row, id_ in enumerate(ids)}, labels, np.ones(len(ids), bool))
