"""Rows of CSV, TSV, JSON, JSON Lines (gzipped or not), Parquet and Arrow files as dicts, a few in memory at a time."""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from umarvel_ray.data.parquet import open_parquet, rows_at_once
from umarvel_ray.errors import UserError
from umarvel_ray.importing.columns import KNOWN, PICTURE_SUFFIXES, is_known
from umarvel_ray.importing.record import Fault
from umarvel_ray.importing.text import column_name, delimiter_of, encoding_of, open_binary

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row | Fault]]

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
PEEKED = 100  # rows that show what a text file holds
SLICE = 16  # rows of an Arrow batch that are Python objects at once
LESS = 4  # times fewer bytes than a conversion reads at once, for they are copied to Python objects
SEPARATOR = re.compile(r'"?sep=(.)"?\s*')  # Excel's first line, which names the delimiter
# of a text that is not UTF-8, a date out of bounds, a time zone that does not exist
UNREADABLE = (ValueError, OverflowError, LookupError)
ZIP = b"PK\x03\x04"
LARGEST_FIELD = 1 << 30  # of CSV; the module's own limit is 128 KiB


def suffix_of(path: Path) -> str:
    """The suffix of a table's name, in lower case and without the `.gz` of a text table."""
    plain = path.name.lower().removesuffix(".gz")
    suffix = Path(plain).suffix
    return suffix if suffix in TEXT_SUFFIXES else path.suffix.lower()


def rows_of(path: Path) -> Numbered:
    """The rows of a table by number, from 1 (of a text file, the line), with column names in one spelling.

    They have the known columns only. A line that cannot be parsed, or a value that Python cannot hold, is a `Fault`.

    Raises:
        UserError: the file cannot be read, is of no known type, or is no table at all; two known columns have one name.
    """
    suffix = suffix_of(path)
    with _reading(path):
        if suffix in (".csv", ".tsv"):
            yield from _csv(path)
        elif suffix in (".json", ".jsonl", ".ndjson"):
            yield from _json(path)
        elif suffix == ".parquet":
            yield from _parquet(path)
        else:
            yield from _arrow(path)


def columns_of(path: Path) -> list[str]:
    """The columns of a table, in one spelling; of JSON, those of its first rows. Raises: see `rows_of`."""
    suffix = suffix_of(path)
    with _reading(path):
        if suffix in (".csv", ".tsv"):
            with _csv_lines(path) as (lines, delimiter):
                names = next(csv.reader(lines, delimiter=delimiter), [])
        elif suffix == ".parquet":
            with open_parquet(path, ()) as file:
                names = file.schema_arrow.names
        elif suffix == ".arrow":
            with _arrow_stream(path) as stream:
                names = stream.schema.names
        else:
            rows = (row for _, row in islice(_json_objects(path), PEEKED) if not isinstance(row, Fault))
            return list(dict.fromkeys(column_name(name) for row in rows for name in row))
    _known(names, str(path))
    return list(dict.fromkeys(map(column_name, names)))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from None


class _Lines:
    """The lines of a file, of which the last that were taken can be given back."""

    def __init__(self, file: Iterator[str]) -> None:
        self._file, self._back = file, deque[str]()
        self.taken: list[str] = []
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else next(self._file)
        self.taken.append(line)
        self.number += 1
        return line

    def give_back(self, kept: int) -> None:
        """Take all but the first `kept` of `taken` again."""
        self._back.extendleft(reversed(self.taken[kept:]))
        self.number -= len(self.taken) - kept


@contextmanager
def _csv_lines(path: Path) -> Iterator[tuple[_Lines, str]]:
    """The lines of a CSV file from its header on, and its delimiter."""
    csv.field_size_limit(LARGEST_FIELD)
    with open_binary(path) as content:
        if content.read(len(ZIP)) == ZIP:
            raise UserError(f"{path}: a spreadsheet or another packed file, no CSV; save it as CSV")
    with io.TextIOWrapper(open_binary(path), encoding_of(path), errors="replace", newline="") as file:
        lines = _Lines(file)
        header = next(lines, "")
        if named := SEPARATOR.fullmatch(header):
            lines.taken.clear()
            header = next(lines, "")
        lines.give_back(0)
        yield lines, named[1] if named else delimiter_of(header, KNOWN)


def _csv(path: Path) -> Numbered:
    with _csv_lines(path) as (lines, delimiter):
        if delimiter == "\t" and not _quotes_fit(path):
            reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
        names = next(reader, [])
        if not names:
            raise UserError(f"{path}: empty; its first line must name the columns")
        known = _known(names, str(path))
        while True:
            lines.taken.clear()
            line = lines.number + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                lines.give_back(1)
                yield line, Fault("quote that is not closed, or text behind one", "double the quotes inside a cell")
                continue
            if any(_is_row(text, len(names), delimiter) for text in lines.taken[1:]):
                lines.give_back(1)
                yield line, Fault("quote that is not closed", "the cell would hold the next rows")
            elif len(cells) < len(names) or any(cells[len(names) :]):
                if cells:
                    yield line, Fault("wrong number of cells", f"{len(cells)} under {len(names)} columns")
            else:
                yield line, {column: cells[names.index(name)] for name, column in known.items()}


def _quotes_fit(path: Path) -> bool:
    """Whether quotes in a tab-separated file are CSV's, and not those of its texts."""
    with _csv_lines(path) as (lines, delimiter):
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if any("\t" in cell and "\n" in cell for cell in cells):
                    return False
                lines.taken.clear()
        except csv.Error:
            return False
    return True


def _is_row(line: str, columns: int, delimiter: str) -> bool:
    """Whether a line inside a quoted cell looks like a row with a picture."""
    cells = [cell.strip(' "\r\n').lower() for cell in line.split(delimiter)]
    return len(cells) == columns > 1 and any(cell.endswith(PICTURE_SUFFIXES) for cell in cells)


def _json(path: Path) -> Numbered:
    for number, value in _json_objects(path):
        if isinstance(value, Fault):
            yield number, value
        else:
            yield number, {column: value[name] for name, column in _known(list(value), f"{path}, row {number}").items()}


def _json_objects(path: Path) -> Numbered:
    """JSON Lines, or one list of objects, which is read whole."""
    with io.TextIOWrapper(open_binary(path), encoding_of(path), errors="replace") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        if start == "[":
            try:
                for number, value in enumerate(json.load(file), 1):
                    yield number, _object(value)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: not valid JSON ({error}); mend it") from None
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, _object(json.loads(line))
            except (ValueError, RecursionError) as error:
                if number == 1 and line.rstrip().endswith(("{", "[", ",")):
                    raise UserError(
                        f"{path}: not JSON Lines; write each object in a line of its own, without a comma behind it, "
                        f"or a list of objects in [ ]"
                    ) from None
                yield number, Fault("not valid JSON", str(error))


def _object(value: Any) -> Row | Fault:
    return value if isinstance(value, dict) else Fault("not a JSON object", type(value).__name__)


def _parquet(path: Path) -> Numbered:
    with open_parquet(path, ()) as file:
        known = _known(file.schema_arrow.names, str(path))
        batches = file.iter_batches(max(1, rows_at_once(file.metadata) // LESS), columns=list(known))
        yield from enumerate((row for batch in batches for row in _objects(batch, known)), 1)


def _arrow(path: Path) -> Numbered:
    with _arrow_stream(path) as stream:
        known = _known(stream.schema.names, str(path))
        yield from enumerate((row for batch in stream for row in _objects(batch.select(list(known)), known)), 1)


@contextmanager
def _arrow_stream(path: Path) -> Iterator[pa.RecordBatchReader]:
    """A file that `datasets` saved. Its pages stay on disk until they are read."""
    try:
        with pa.memory_map(str(path)) as source:
            yield pa.ipc.open_stream(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not an Arrow stream ({str(error).splitlines()[0]})") from None


def _objects(batch: pa.RecordBatch, known: dict[str, str]) -> Iterator[Row | Fault]:
    for start in range(0, batch.num_rows, SLICE):
        part = batch.slice(start, SLICE)
        try:
            rows: list[Row | Fault] = part.to_pylist()
        except UNREADABLE:
            rows = [_one(part.slice(number, 1)) for number in range(part.num_rows)]
        for row in rows:
            yield row if isinstance(row, Fault) else {column: row[name] for name, column in known.items()}


def _one(row: pa.RecordBatch) -> Row | Fault:
    try:
        [read] = row.to_pylist()
    except UNREADABLE as error:
        return Fault("value that cannot be read", " ".join(str(error).split()))
    return dict(read)


def _known(names: Sequence[str], where: str) -> dict[str, str]:
    """The known ones of a table's columns: their names in one spelling, by those that they have there.

    Raises:
        UserError: two have one name, so that the values of one would be lost.
    """
    found: dict[str, str] = {}
    for name in names:
        column = column_name(name)
        if is_known(column) and column in found.values():
            other = next(other for other, same in found.items() if same == column)
            raise UserError(f"{where}: the columns '{other}' and '{name}' count as one; rename or drop one")
        if is_known(column):
            found[name] = column
    return found
