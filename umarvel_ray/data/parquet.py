"""Parquet folders, converted once into tables that are read by row.

A folder holds `documents.parquet` (id, text, image, modality, source …), `pools.parquet` (task, split, document_ids)
and one `NAME.parquet` per query table (the document columns, instruction, positive_ids, task …). An image or a video
(optional column `video`) is encoded bytes, a path relative to the folder, or a list of either. Ids may be integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from umarvel_ray.data.stored import StoredTable
from umarvel_ray.data.writing import (
    document_rows,
    lists_of_ids,
    store_documents,
    store_pools,
    store_queries,
    strings,
)
from umarvel_ray.errors import UserError

DOCUMENT_COLUMNS = ("id", "text", "image", "modality", "source")
QUERY_COLUMNS = (*DOCUMENT_COLUMNS, "instruction", "positive_ids", "task")
POOL_COLUMNS = ("task", "split", "document_ids")
READ_ROWS, READ_BYTES = 4096, 32 << 20  # at once
BUFFER = 1 << 20  # bytes of a file; without one, and with pre-buffering, a row group is read at once


class ParquetFolder:
    """A folder in the layout above."""

    key = ""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self, name: str) -> list[Path]:
        """The files that `name` ("documents", "pools" or a query table) is read from."""
        path = self.root / f"{name}.parquet"
        if not path.is_file():
            raise UserError(f"{path}: not found; create it, or check data.root and the table's name")
        return [path]

    def write_documents(self, path: Path) -> StoredTable:
        """Convert `documents.parquet`. Raises: see `store_documents`."""
        batches = self._batches("documents", DOCUMENT_COLUMNS)
        return store_documents(path, batches, self.root, f"{self.root}: documents")

    def write_pools(self, path: Path, documents: StoredTable) -> StoredTable:
        """Convert `pools.parquet`.

        Raises:
            UserError: a pool names an unknown document; see `store_pools`.
        """
        where = f"{self.root}: pools"
        table = self._table("pools", POOL_COLUMNS, POOL_COLUMNS)
        tasks, splits = (_names(table[name], name, where) for name in ("task", "split"))
        ids = lists_of_ids(table["document_ids"], f"{where}: column 'document_ids'")
        members = document_rows(ids, documents)
        for number, pool in enumerate(members.lists()):
            if (unknown := np.flatnonzero(pool < 0)).size:
                raise UserError(
                    f"{where}, task '{tasks[number]}', split '{splits[number]}': unknown document "
                    f"'{ids[number][int(unknown[0])].as_py()}'; add it to the documents or drop it"
                )
        return store_pools(path, list(zip(tasks, splits, members.lists(), strict=True)), where)

    def write_queries(self, path: Path, name: str, documents: StoredTable) -> StoredTable:
        """Convert a query table. Raises: see `store_queries`."""
        where = f"{self.root}: {name}"
        lists = self._table(name, QUERY_COLUMNS, ("positive_ids",))["positive_ids"]
        positives = lists_of_ids(lists, f"{where}: column 'positive_ids'")
        batches = self._batches(name, QUERY_COLUMNS)
        return store_queries(path, batches, positives, document_rows(positives, documents), self.root, where)

    def _table(self, name: str, needed: tuple[str, ...], columns: tuple[str, ...]) -> pa.Table:
        with self._open(name, needed) as file:
            return file.read(columns)

    def _batches(self, name: str, needed: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
        with self._open(name, needed) as file:
            names = [column for column in file.schema_arrow.names if column != "positive_ids"]
            yield from file.iter_batches(rows_at_once(file.metadata), columns=names)

    @contextmanager
    def _open(self, name: str, needed: tuple[str, ...]) -> Iterator[pq.ParquetFile]:
        """A table's file, which has the columns that are needed."""
        [path] = self.files(name)
        with open_parquet(path, needed) as file:
            yield file


@contextmanager
def open_parquet(path: Path, needed: Sequence[str]) -> Iterator[pq.ParquetFile]:
    """A Parquet file that is read page by page.

    Raises:
        UserError: it cannot be read, now or while the block runs; a column is missing, or occurs twice.
    """
    try:
        with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"{path}: column '{twice[0]}' occurs twice; keep one")
            if missing := [column for column in needed if column not in names]:
                raise UserError(f"{path}: column '{missing[0]}' is missing; add it")
            yield file
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _names(column: pa.ChunkedArray, name: str, where: str) -> list[str]:
    names = strings(column.combine_chunks(), f"{where}: column '{name}'")
    if names.null_count:
        raise UserError(f"{where}: row {pc.index(names.is_null(), True)} has no {name}; give it one")
    return list(names.to_pylist())


def rows_at_once(metadata: pq.FileMetaData) -> int:
    """As many rows as hold READ_BYTES in the row group with the largest rows."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(READ_ROWS, READ_BYTES // max(largest, 1)))
