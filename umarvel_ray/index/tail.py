"""The documents added since the snapshot: their vectors and labels in memory, the rest read from the log for a hit."""

from __future__ import annotations

import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from umarvel_ray.index.labels import RowsByLabel
from umarvel_ray.index.log import RESTORE, Damaged, LogFile, log_path
from umarvel_ray.index.parts import Part, search_exactly
from umarvel_ray.index.records import Add, decode_one

_FIRST_ROWS = 1024


class _Place(NamedTuple):
    """Where a record lies in the log."""

    file: LogFile
    offset: int
    size: int
    crc: int  # a crash of the writer's machine may undo a commit, and another one takes its place

    def document(self) -> dict[str, Any]:
        """Raises: Damaged: the log no longer holds this record. OSError: it cannot be read now."""
        data = self.file.read(self.offset, self.size)
        record = decode_one(data) if zlib.crc32(data) == self.crc else None
        if not isinstance(record, Add):
            raise Damaged(f"a document that was read from the log is no longer there; {RESTORE}")
        return record.document


class Tail:
    """Rows are only ever appended, so the rows of a view never change."""

    def __init__(self, dimension: int) -> None:
        self.row_of: dict[str, int] = {}
        self.alive = np.empty(_FIRST_ROWS, bool)
        self._vectors = np.empty((_FIRST_ROWS, dimension), np.float32)
        self._labels = RowsByLabel()
        self._places: list[_Place] = []
        self._newest: tuple[int, LogFile] | None = None

    def file(self, folder: Path, first: int) -> LogFile:
        """The log file whose first commit this is. Raises: see `LogFile`."""
        if self._newest is None or self._newest[0] != first:
            self._newest = first, LogFile(log_path(folder, first))
        return self._newest[1]

    def append(self, record: Add, file: LogFile, offset: int, data: bytes) -> None:
        """Add a document; `data` is its record, which lies at an offset of a log file."""
        row = len(self._places)
        if row == len(self.alive):
            arrays = self.alive, self._vectors
            self.alive, self._vectors = (np.concatenate([old, np.empty_like(old)]) for old in arrays)
        self.alive[row], self._vectors[row] = True, record.vector
        self.row_of[record.id] = row
        self._labels.add(row, record.labels)
        self._places.append(_Place(file, offset, len(data), zlib.crc32(data)))

    def part(self) -> Part:
        rows = slice(len(self._places))
        search = partial(search_exactly, self._vectors[rows])
        return Part(search, self._document, self.row_of, self._labels, self.alive[rows])

    def _document(self, row: int) -> dict[str, Any]:
        return self._places[row].document()
