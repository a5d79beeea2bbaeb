"""Rows of CSV, TSV, JSON, JSON Lines, Parquet and Arrow files as dicts, a few in memory at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from umarvel_ray.data.parquet import open_parquet, rows_at_once
from umarvel_ray.errors import UserError
from umarvel_ray.importing.columns import KNOWN
from umarvel_ray.importing.record import Fault
from umarvel_ray.importing.text import column_name, delimiter_of, encoding_of

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row | Fault]]

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
PEEKED = 100  # rows that show what a text file holds
SLICE = 16  # rows of an Arrow batch that are Python objects at once
LESS = 4  # times fewer bytes than a conversion reads at once, for they are copied to Python objects
LARGEST_FIELD = 1 << 30  # of CSV; the module's own limit is 128 KiB


def rows_of(path: Path) -> Numbered:
    """The rows of a table by number, from 1 (of a text file, the line), with column names in one spelling.

    A line that cannot be parsed is a `Fault`.

    Raises:
        UserError: the file cannot be read, is of no known type, or is no table at all.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            yield from _csv(path)
        elif suffix in (".json", ".jsonl", ".ndjson"):
            yield from _json(path)
        elif suffix == ".parquet":
            yield from _parquet(path)
        else:
            yield from _arrow(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def columns_of(path: Path) -> list[str]:
    """The columns of a table, in one spelling; of a text file, those of its first rows. Raises: see `rows_of`."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        with open_parquet(path, ()) as file:
            names = file.schema_arrow.names
    elif suffix == ".arrow":
        with _arrow_stream(path) as stream:
            names = stream.schema.names
    else:
        rows = (row for _, row in islice(rows_of(path), PEEKED) if not isinstance(row, Fault))
        return list(dict.fromkeys(name for row in rows for name in row))
    return list(map(column_name, names))


def _csv(path: Path) -> Numbered:
    csv.field_size_limit(LARGEST_FIELD)
    with path.open(encoding=encoding_of(path), errors="replace", newline="") as file:
        delimiter = delimiter_of(file.readline(), KNOWN)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter)
        names = [column_name(name) for name in next(reader, [])]
        if not names:
            raise UserError(f"{path}: empty; its first line must name the columns")
        try:
            for cells in reader:
                if not cells:
                    continue
                line = reader.line_num
                if len(cells) == len(names):
                    yield line, dict(zip(names, cells, strict=True))
                else:
                    yield line, Fault("wrong number of cells", f"{len(cells)} under {len(names)} columns")
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: not readable as CSV ({error}); mend the line") from None


def _json(path: Path) -> Numbered:
    """JSON Lines, or one list of objects, which is read whole."""
    with path.open(encoding=encoding_of(path), errors="replace") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            try:
                for number, value in enumerate(json.load(file), 1):
                    yield number, _object(value)
            except ValueError as error:
                raise UserError(f"{path}: not valid JSON ({error}); mend it") from None
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, _object(json.loads(line))
                except (ValueError, RecursionError) as error:
                    yield number, Fault("not valid JSON", str(error))


def _object(value: Any) -> Row | Fault:
    return _named(value) if isinstance(value, dict) else Fault("not a JSON object", type(value).__name__)


def _parquet(path: Path) -> Numbered:
    with open_parquet(path, ()) as file:
        batches = file.iter_batches(max(1, rows_at_once(file.metadata) // LESS))
        yield from enumerate((row for batch in batches for row in _objects(batch)), 1)


def _arrow(path: Path) -> Numbered:
    with _arrow_stream(path) as stream:
        yield from enumerate((row for batch in stream for row in _objects(batch)), 1)


@contextmanager
def _arrow_stream(path: Path) -> Iterator[pa.RecordBatchReader]:
    """A file that `datasets` saved. Its pages stay on disk until they are read."""
    try:
        with pa.memory_map(str(path)) as source:
            yield pa.ipc.open_stream(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not an Arrow stream ({str(error).splitlines()[0]})") from None


def _objects(batch: pa.RecordBatch) -> Iterator[Row]:
    for start in range(0, batch.num_rows, SLICE):
        yield from map(_named, batch.slice(start, SLICE).to_pylist())


def _named(row: dict[str, Any]) -> Row:
    return {column_name(name): value for name, value in row.items()}
