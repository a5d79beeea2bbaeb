"""A searchable replica that follows the index's writer: an immutable base, the newest snapshot, and later commits.

    replica = LiveIndex.open("runs/demo/live", identity, dimension, base=Corpus.open(...))
    replica.follow()                                             # call periodically: applies new commits
    replica.search(vector, top_k=10, sources=["notes"], filters={"language": ["en", "de"]})

Search is exact over added documents, and as exact as the base's index over the base. `follow` prepares the next view of
the index next to the current one and then swaps them. Searches in other threads therefore take no lock, see only whole
commits and never wait, and no document disappears while the log is compacted into a snapshot.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np

from umarvel_ray.errors import UserError
from umarvel_ray.index.corpus import Corpus
from umarvel_ray.index.hits import Hit
from umarvel_ray.index.labels import Filters
from umarvel_ray.index.log import RESTORE, Damaged, Position, read_log
from umarvel_ray.index.parts import Part, base_part, snapshot_part
from umarvel_ray.index.records import Add, decode
from umarvel_ray.index.snapshot import Snapshot, empty_snapshot, open_snapshot, snapshots
from umarvel_ray.index.tail import Tail
from umarvel_ray.index.writer import check_index

Result = TypeVar("Result")


class LiveIndex:
    """A replica of a live index. `follow` and `search` may be called from any thread."""

    def __init__(self, folder: Path | None, identity: str, dimension: int, base: Corpus | None) -> None:
        self._folder, self._identity, self._dimension = folder, identity, dimension
        self._base = [base_part(base)] if base else []
        self._following = Lock()
        self._rows = _Rows(self._base, empty_snapshot(dimension))
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
            UserError: an index of another model, or a damaged log. Everything read before remains searchable.
            OSError: the files cannot be read now; likewise.
        """
        with self._following:
            if self._folder:
                before = self._rows
                try:
                    self._apply_new(self._folder)
                finally:  # what was read before an error is not held back
                    if self._rows is not before or self._rows.position.sequence > self.sequence:
                        self._view = self._rows.view()
            return self.sequence

    def search(
        self,
        vector: np.ndarray,
        top_k: int,
        modalities: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
        filters: Filters | None = None,
    ) -> list[Hit]:
        """The `top_k` best documents (or all, if there are fewer) for one unit vector float32 (d,), best first.

        Args:
            modalities, sources: restrict the search to these; None for no restriction.
            filters: for each name, the values of which a document must have one: of its metadata, of further columns of
                the base, or "modality" and "source".

        Raises:
            UserError: the dimension of the vector differs from the index's, or a document that was read before is
                damaged.
            OSError: a document cannot be read now.
        """
        if vector.shape != (self._dimension,):
            raise UserError(
                f"the index has dimension {self._dimension}, the query has shape {vector.shape}; embed the query with "
                "the index's own model"
            )
        vector = np.ascontiguousarray(vector, np.float32)
        given = {"modality": modalities, "source": sources}
        wanted = {**(filters or {}), **{name: values for name, values in given.items() if values is not None}}
        return self._from_view(lambda view: view.search(vector, top_k, wanted))

    def documents(self, ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """The documents with these ids, whole; None for one that is not there. Raises: see `search`."""
        return self._from_view(lambda view: [view.document(id_) for id_ in ids])

    def _from_view(self, read: Callable[[_View], Result]) -> Result:
        """What is read from the view, or from its successor if documents are no longer where they were."""
        view = self._view
        try:
            return read(view)
        except (Damaged, OSError):
            self._read_again(view)
            return read(self._view)

    def _apply_new(self, folder: Path) -> None:
        if not check_index(folder, self._identity, self._dimension):
            if self.sequence:
                raise Damaged(f"{folder}: index.json is missing; {RESTORE}")
            return
        try:
            if self._rows.snapshot == _last_snapshot(folder):
                self._rows.catch_up(folder)
                return
        except Damaged:  # or the log was compacted or rewritten since this replica read it
            pass
        self._rows = self._read(folder)

    def _read_again(self, view: _View) -> None:
        """Replace a view whose documents can no longer be read where they were, unless that has been done."""
        with self._following:
            if self._folder and self._view is view:
                self._rows = self._read(self._folder)
                self._view = self._rows.view()

    def _read(self, folder: Path) -> _Rows:
        """Read the newest snapshot and all later commits."""
        while True:
            newest = _last_snapshot(folder)
            try:
                rows = _Rows(self._base, open_snapshot(folder, self._dimension))
                rows.catch_up(folder)
                return rows
            except Damaged:
                if newest == _last_snapshot(folder):  # otherwise it was removed while being read: try again
                    raise


class _View(NamedTuple):
    """What searches see; immutable."""

    parts: list[Part]
    sequence: int

    def search(self, vector: np.ndarray, top_k: int, filters: Filters) -> list[Hit]:
        found = []
        for part in self.parts:
            scores, rows = part.search(vector, top_k, part.among(filters))
            found += [(score, row, part) for score, row in zip(scores.tolist(), rows.tolist(), strict=True)]
        best = heapq.nlargest(top_k, found, key=lambda hit: hit[0])
        return [Hit(part.document(row), score) for score, row, part in best]

    def document(self, id_: str) -> dict[str, Any] | None:
        for part in self.parts:
            row = part.row_of.get(id_)
            if row is not None and row < len(part.alive) and part.alive[row]:  # a later view may have more rows
                return part.document(row)
        return None


class _Rows:
    """The location of every document as of a position in the log. Used by `follow` only."""

    def __init__(self, base: list[Part], snapshot: Snapshot) -> None:
        self.snapshot, self.position = snapshot.end.sequence, snapshot.end
        self._fixed = [replace(part, alive=part.alive.copy()) for part in base]
        self._tail = Tail(snapshot.vectors.shape[1])
        part = snapshot_part(snapshot)
        for id_ in (*part.row_of, *snapshot.deleted):
            self._drop(id_)
        self._fixed.append(part)

    def catch_up(self, folder: Path) -> None:
        """Apply the commits after `position`, each whole or not at all. Raises: see `read_log`."""
        for position, payload in read_log(folder, self.position):
            self._apply(folder, position, payload)
            self.position = position

    def view(self) -> _View:
        parts = [*self._fixed, self._tail.part()]
        return _View([replace(part, alive=part.alive.copy()) for part in parts], self.position.sequence)

    def _apply(self, folder: Path, position: Position, payload: bytes) -> None:
        records, file = list(decode(payload)), self._tail.file(folder, position.file)  # whatever fails, fails here
        start = position.offset - len(payload)
        for record, place in records:
            self._drop(record.id)
            if isinstance(record, Add):
                self._tail.append(record, file, start + place.start, payload[place])

    def _drop(self, id_: str) -> None:
        parts: list[Part | Tail] = [*self._fixed, self._tail]
        for part in parts:
            if (row := part.row_of.get(id_)) is not None:
                part.alive[row] = False


def _last_snapshot(folder: Path) -> int:
    return max(snapshots(folder), default=0)
