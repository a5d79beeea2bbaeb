"""A searchable replica that follows the index's writer: an immutable base, the newest snapshot, and later commits.

    replica = LiveIndex.open("runs/demo/live", identity, dimension, base=Corpus.open(...))
    replica.follow()                                             # call periodically: applies new commits
    replica.search(vector, top_k=10, modalities=["image"], sources=["notes"])

Search is exact over added documents, and as exact as the base's index over the base. `follow` prepares the next view of
the index next to the current one and then swaps them. Searches in other threads therefore take no lock, see only whole
commits and never wait, and no document disappears while the log is compacted into a snapshot.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import faiss
import numpy as np

from umarvel_ray.errors import UserError
from umarvel_ray.index.corpus import Corpus, Hit
from umarvel_ray.index.faiss_index import bitmap_of
from umarvel_ray.index.log import Damaged, read_log
from umarvel_ray.index.records import Add, Record, decode
from umarvel_ray.index.snapshot import Snapshot, empty_snapshot, open_snapshot, snapshots
from umarvel_ray.index.writer import check_index

_FIRST_ROWS = 1024

LABELS = ("modality", "source")  # of a document, by which searches can be filtered
Codes = tuple[dict[str, int], dict[str, int]]  # a number for each modality and for each source


class LiveIndex:
    """A replica of a live index. `follow` and `search` may be called from any thread."""

    def __init__(self, folder: Path | None, identity: str, dimension: int, base: Corpus | None) -> None:
        self._folder, self._identity, self._dimension = folder, identity, dimension
        self._codes: Codes = ({}, {})
        self._base = [_base_part(base, self._codes)] if base else []
        self._following = Lock()
        self._rows = _Rows(self._base, empty_snapshot(dimension), self._codes)
        self._view = self._rows.view()

    @classmethod
    def open(cls, folder: str | Path | None, identity: str, dimension: int, base: Corpus | None = None) -> LiveIndex:
        """Open the index at its latest commit; a folder that does not exist yet is an index without commits.

        Args:
            folder: the writer's folder; None if nothing is ever added.
            identity: of the checkpoint (see `CheckpointRef`).
            base: documents that are searched too; its own folder is never modified.

        Raises:
            UserError: an index of another model, a base whose dimension or index type does not fit, or a damaged log.
        """
        if base is not None:
            if base.index.dimension != dimension:
                raise UserError(
                    f"the base index has dimension {base.index.dimension}, the model {dimension}; embed the base again"
                )
            # Fail now, not after the first deletion, if the index cannot filter rows.
            base.index.search_rows(np.zeros((1, dimension), np.float32), 1, np.arange(len(base.index)) > 0)
        index = cls(Path(folder) if folder else None, identity, dimension, base)
        index.follow()
        return index

    @property
    def sequence(self) -> int:
        """Number of the last commit that is visible to `search`."""
        return self._view.sequence

    def __len__(self) -> int:
        """Number of documents that `search` can find."""
        return sum(int(np.count_nonzero(part.alive)) for part in self._view.parts)

    def follow(self) -> int:
        """Apply new commits, if any, and return `sequence`.

        Raises:
            UserError: an index of another model, or a damaged log. Earlier commits remain searchable.
        """
        with self._following:
            folder = self._folder
            if folder and check_index(folder, self._identity, self._dimension):
                rows = self._rows
                try:
                    current = rows.snapshot == _last_snapshot(folder)
                    if current:
                        rows.catch_up(folder)
                except Damaged:  # or the log was compacted or rewritten since this replica read it
                    current = False
                if not current:
                    rows = self._read(folder)
                if rows is not self._rows or rows.position.sequence > self.sequence:
                    self._rows, self._view = rows, rows.view()
            return self.sequence

    def search(
        self,
        vector: np.ndarray,
        top_k: int,
        modalities: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
    ) -> list[Hit]:
        """The `top_k` best documents (or all, if there are fewer) for one unit vector float32 (d,), best first.

        Args:
            modalities, sources: restrict the search to these; None for no restriction.

        Raises:
            UserError: the dimension of the vector differs from the index's.
        """
        if vector.shape != (self._dimension,):
            raise UserError(
                f"the index has dimension {self._dimension}, the query has shape {vector.shape}; embed the query with "
                "the index's own model"
            )
        vector = np.ascontiguousarray(vector, np.float32)
        found = []
        for part in self._view.parts:
            scores, rows = part.search(vector, top_k, part.among(self._codes, (modalities, sources)))
            found += [(score, row, part) for score, row in zip(scores.tolist(), rows.tolist(), strict=True)]
        best = heapq.nlargest(top_k, found, key=lambda hit: hit[0])
        return [Hit(part.document(row), score) for score, row, part in best]

    def _read(self, folder: Path) -> _Rows:
        """Read the newest snapshot and all later commits."""
        while True:
            newest = _last_snapshot(folder)
            try:
                rows = _Rows(self._base, open_snapshot(folder, self._dimension), self._codes)
                rows.catch_up(folder)
                return rows
            except Damaged:
                if newest == _last_snapshot(folder):  # otherwise it was removed while being read: try again
                    raise


@dataclass(frozen=True)
class _Part:
    """Rows that are searched together; only those that are alive can be found."""

    search: Callable[[np.ndarray, int, np.ndarray], tuple[np.ndarray, np.ndarray]]  # scores (k',), rows (k',)
    document: Callable[[int], dict[str, Any]]
    row_of: dict[str, int]
    labels: np.ndarray  # int32 (n, 2): codes of modality and source
    alive: np.ndarray  # bool (n,)

    def among(self, codes: Codes, wanted: tuple[Sequence[str] | None, ...]) -> np.ndarray:
        """The rows that a search with these filters may return, bool (n,)."""
        rows = self.alive
        for column, code_of, names in zip(self.labels.T, codes, wanted, strict=True):
            if names is not None:
                chosen = np.zeros(len(code_of), bool)
                chosen[[code_of[name] for name in names if name in code_of]] = True
                rows = rows & chosen[column]
        return rows


class _View(NamedTuple):
    """What searches see; immutable."""

    parts: list[_Part]
    sequence: int


class _Rows:
    """The location of every document as of a position in the log. Used by `follow` only."""

    def __init__(self, base: list[_Part], snapshot: Snapshot, codes: Codes) -> None:
        self.snapshot, self.position = snapshot.end.sequence, snapshot.end
        self._codes = codes
        self._fixed = [replace(part, alive=part.alive.copy()) for part in base]
        self._tail = _Tail(snapshot.vectors.shape[1])
        part = _snapshot_part(snapshot, codes)
        for id_ in (*part.row_of, *snapshot.deleted):
            self._drop(id_)
        self._fixed.append(part)

    def catch_up(self, folder: Path) -> None:
        for position, payload in read_log(folder, self.position):
            for record in decode(payload):
                self._apply(record)
            self.position = position

    def view(self) -> _View:
        parts = [*self._fixed, self._tail.part()]
        return _View([replace(part, alive=part.alive.copy()) for part in parts], self.position.sequence)

    def _apply(self, record: Record) -> None:
        self._drop(record.id)
        if isinstance(record, Add):
            self._tail.append(record, [_code(self._codes[0], record.modality), _code(self._codes[1], record.source)])

    def _drop(self, id_: str) -> None:
        parts: list[_Part | _Tail] = [*self._fixed, self._tail]
        for part in parts:
            if (row := part.row_of.get(id_)) is not None:
                part.alive[row] = False


class _Tail:
    """The documents added since the snapshot. Rows are only ever appended, so the rows of a view never change."""

    def __init__(self, dimension: int) -> None:
        self.row_of: dict[str, int] = {}
        self.alive = np.empty(_FIRST_ROWS, bool)
        self._vectors = np.empty((_FIRST_ROWS, dimension), np.float32)
        self._labels = np.empty((_FIRST_ROWS, 2), np.int32)
        self._documents: list[dict[str, Any]] = []

    def append(self, record: Add, labels: list[int]) -> None:
        row = len(self._documents)
        if row == len(self.alive):
            arrays = self.alive, self._vectors, self._labels
            self.alive, self._vectors, self._labels = (np.concatenate([old, np.empty_like(old)]) for old in arrays)
        self.alive[row], self._vectors[row], self._labels[row] = True, record.vector, labels
        self.row_of[record.id] = row
        self._documents.append(record.document)

    def part(self) -> _Part:
        rows = slice(len(self._documents))
        search = partial(_search_exactly, self._vectors[rows])
        return _Part(search, self._documents.__getitem__, self.row_of, self._labels[rows], self.alive[rows])


def _base_part(base: Corpus, codes: Codes) -> _Part:
    def search(vector: np.ndarray, k: int, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        [scores], [found] = base.index.search_rows(vector[None], k, among)
        return scores, found

    labels = [base.documents.column(name).take(base.rows) for name in LABELS]
    return _part(search, lambda row: base.read(np.array([row]))[0], base.index.ids, labels, codes)


def _snapshot_part(snapshot: Snapshot, codes: Codes) -> _Part:
    table = snapshot.documents
    search, labels = partial(_search_exactly, snapshot.vectors), [table[name] for name in LABELS]
    # `take` would combine the chunks of each column, and so copy every picture of the snapshot.
    return _part(search, lambda row: table.slice(row, 1).to_pylist()[0], table["id"].to_pylist(), labels, codes)


def _part(
    search: Callable, document: Callable[[int], dict[str, Any]], ids: list[str], labels: list[Any], codes: Codes
) -> _Part:
    """A part whose rows are all alive; `labels`: an Arrow column for each of LABELS."""
    numbers = np.array(
        [[_code(code_of, name) for name in column.to_pylist()] for code_of, column in zip(codes, labels, strict=True)],
        np.int32,
    )
    rows = {id_: row for row, id_ in enumerate(ids)}
    return _Part(search, document, rows, numbers.T, np.ones(len(ids), bool))


def _code(code_of: dict[str, int], name: str) -> int:
    return code_of.setdefault(name, len(code_of))


def _search_exactly(
    vectors: np.ndarray, vector: np.ndarray, k: int, among: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scores float32 (k',) and rows int64 (k',) of the best inner products, by faiss, without copying the vectors."""
    k = min(k, int(np.count_nonzero(among)))
    scores, rows = np.empty(k, np.float32), np.empty(k, np.int64)
    if k:
        inputs = faiss.swig_ptr(vector), faiss.swig_ptr(vectors), len(vector), 1, len(vectors), k
        faiss.knn_inner_product(*inputs, faiss.swig_ptr(scores), faiss.swig_ptr(rows), bitmap_of(among))
    return scores, rows


def _last_snapshot(folder: Path) -> int:
    return max(snapshots(folder), default=0)
