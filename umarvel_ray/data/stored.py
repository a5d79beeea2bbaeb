"""A table on disk that is read by row number: one uncompressed Arrow IPC file behind a memory map.

Parquet and JSON have to be decoded in large pieces, so a table in one of these formats is converted once and then read
from here. Processes pass a `StoredTable` around as a path: what a row holds is read where it is used, and stays in the
page cache of that node instead of in anybody's memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_path, write_json

# Rows that share one IPC batch: few enough to find a row quickly, and many enough to scan a column.
BATCH_ROWS, BATCH_BYTES = 256, 16 << 20  # at most; how large a row is, the first ones tell
FIRST_ROWS = 16
CHUNK_BATCHES = 1024  # batches in a chunk of a column


class StoredTable:
    """A table that `write_stored` wrote.

    Args:
        path: the Arrow file; `path` with the suffix `.json` holds its number of rows and its digest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[type[StoredTable], tuple[str]]:
        return StoredTable, (self.path,)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        with _on_this_node(self.path):
            facts: dict[str, Any] = json.loads(_facts_path(self.path).read_text())
        return facts

    @property
    def num_rows(self) -> int:
        return int(self._facts["rows"])

    @property
    def digest(self) -> str:
        """Equal for tables with the same columns and values."""
        return str(self._facts["digest"])

    @property
    def schema(self) -> pa.Schema:
        return self._batches.schema

    def column(self, name: str) -> pa.ChunkedArray:
        """One column in full, copied into memory; do not ask for a column of pictures or texts."""
        # `IpcReadOptions.included_fields` would allocate the other columns too.
        mapped = self._map(mmap.MADV_NORMAL)
        reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped)))
        index = reader.schema.get_field_index(name)
        chunks = []
        for first in range(0, reader.num_record_batches, CHUNK_BATCHES):
            numbers = range(first, min(first + CHUNK_BATCHES, reader.num_record_batches))
            chunks.append(pa.concat_arrays([reader.get_batch(number).column(index) for number in numbers]))
            mapped.madvise(mmap.MADV_DONTNEED)  # what has been copied no longer counts as this process's memory
        return pa.chunked_array(chunks, reader.schema.field(index).type)

    def fetch(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows by number, in the order given; numbers may repeat."""
        wanted = np.asarray(rows, np.int64)
        names = [name for name in self.schema.names if columns is None or name in columns]
        schema = pa.schema([self.schema.field(name) for name in names])
        if not len(wanted):
            return schema.empty_table()
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        size = self.batch_rows
        starts = np.flatnonzero(np.diff(ordered // size, prepend=-1))
        parts = [
            _pick(self._batches.get_batch(int(part[0]) // size).select(names), part % size)
            for part in np.split(ordered, starts[1:])
        ]
        table = pa.Table.from_batches(parts, schema)
        if np.array_equal(order, np.arange(len(order))):
            return table
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return table.combine_chunks().take(pa.array(back))

    def rows(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """`fetch`, as one dict for each row."""
        found: list[dict[str, Any]] = self.fetch(rows, columns).to_pylist()
        return found

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of rows."""
        found: list[str] = self.fetch(rows, ["id"])["id"].to_pylist()
        return found

    def encoded(self, name: str) -> tuple[np.ndarray, pa.Array]:
        """A column as numbers: int32 (n,), −1 for null, and the value of each number."""
        encoded = pc.dictionary_encode(self.column(name)).unify_dictionaries()
        numbers = pa.chunked_array([chunk.indices for chunk in encoded.chunks], pa.int32()).fill_null(-1).to_numpy()
        return numbers, encoded.chunk(0).dictionary if encoded.num_chunks else pa.array([], encoded.type.value_type)

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A column of few distinct strings as numbers: int64 (n,), −1 for null, and the string of each number."""
        numbers, values = self.encoded(name)
        return numbers.astype(np.int64), values.to_pylist()

    def find(self, ids: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """Row numbers int64 (n,) of ids; −1 for an unknown id. Each call reads the whole `id` column."""
        values = joined_strings(self.column("id"))
        rows: np.ndarray = pc.index_in(ids.cast(values.type), value_set=values).fill_null(-1).to_numpy()
        return rows.astype(np.int64)

    @cached_property
    def batch_rows(self) -> int:
        """The rows of each batch but the last."""
        return int(self._batches.get_batch(0).num_rows)

    @cached_property
    def _batches(self) -> pa.ipc.RecordBatchFileReader:
        return pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map(mmap.MADV_RANDOM))))

    def _map(self, advice: int) -> mmap.mmap:
        with _on_this_node(self.path), open(self.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(advice)
        return mapped


def joined_strings(column: pa.ChunkedArray) -> pa.Array:
    """A column of strings as one array, which may be larger than 2 GiB."""
    return column.cast(pa.large_string()).combine_chunks()


def is_stored(path: Path) -> bool:
    """Whether the table was written to its end, and is still whole."""
    try:
        return bool(path.stat().st_size == json.loads(_facts_path(path).read_text())["bytes"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return False


def remove_stored(path: Path) -> None:
    """Remove a table."""
    _facts_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def write_stored(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], check: Callable[[StoredTable], None] | None = None
) -> StoredTable:
    """Write record batches of any size; the table appears whole and checked, or not at all.

    Args:
        check: looks at the written rows, and raises if the table must not appear.

    Raises:
        UserError: the file cannot be written.
    """
    rows = 0
    try:
        with atomic_path(path) as partial:
            with partial.open("wb") as file:
                sink = _DigestingFile(file)
                with pa.ipc.new_file(pa.PythonFile(sink, "w"), schema) as writer:
                    for batch in _rebatch(batches, schema):
                        writer.write_batch(batch)
                        rows += batch.num_rows
            if check:
                check(StoredTable(partial))
        facts = {"rows": rows, "bytes": path.stat().st_size, "digest": sink.digest.hexdigest()}
        write_json(_facts_path(path), facts)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space, or set data.cache=DIR") from None
    return StoredTable(path)


@contextmanager
def _on_this_node(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: not found on this node; set data.cache to a folder that all nodes share") from None


class _DigestingFile:
    """A file that computes the digest of what is written to it."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()


def _facts_path(path: str | Path) -> Path:
    return Path(path).with_suffix(".json")


def _pick(batch: pa.RecordBatch, rows: np.ndarray) -> pa.RecordBatch:
    """Ascending rows of one batch, without a copy if they follow each other."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and (np.diff(rows) == 1).all():
        return batch.slice(first, len(rows))
    return batch.take(pa.array(rows))


def _rebatch(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Batches of equally many rows, whatever those given were; the last one may be shorter."""
    source = iter(batches)
    head: list[pa.RecordBatch] = []
    while sum(batch.num_rows for batch in head) < FIRST_ROWS and (batch := next(source, None)) is not None:
        head.append(batch)
    size = _rows_per_batch(pa.Table.from_batches(head, schema).slice(0, FIRST_ROWS).to_batches(), schema)
    waiting: list[pa.RecordBatch] = []
    count = 0
    for batch in chain(head, source):
        start = 0
        while start < batch.num_rows:
            part = batch.slice(start, size - count)
            start += part.num_rows
            count += part.num_rows
            waiting.append(part)
            if count == size:
                yield _joined(waiting, schema)
                waiting, count = [], 0
    if waiting:
        yield _joined(waiting, schema)


def _rows_per_batch(first: list[pa.RecordBatch], schema: pa.Schema) -> int:
    """What fits into BATCH_BYTES if all rows are as large as the first ones."""
    if not first:
        return BATCH_ROWS
    rows = _joined(first, schema)
    size: int = BATCH_BYTES * rows.num_rows // max(1, rows.nbytes)
    return max(1, min(BATCH_ROWS, size))


def _joined(parts: list[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    """One batch, equal to the byte for equal rows: `take` leaves out what lies under nulls and between values."""
    batch = parts[0] if len(parts) == 1 else pa.Table.from_batches(parts, schema).combine_chunks().to_batches()[0]
    return batch.take(pa.array(np.arange(batch.num_rows)))
