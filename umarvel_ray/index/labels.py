"""Labels of documents, by which searches are filtered: the modality, the source, and metadata or a table's own columns.

    labels.having("language", ["en", "de"], count)     # → bool (count,): which of the rows have one of these values

A value is a string or a whole number, and equal only to itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from umarvel_ray.data.content import KEY_COLUMNS
from umarvel_ray.data.dataset import ITEM_COLUMNS
from umarvel_ray.data.stored import StoredTable

Value = str | int
Filters = Mapping[str, Sequence[Value]]
LABELS = ("modality", "source")  # that every document has
NOT_LABELS = ("id", *ITEM_COLUMNS, *KEY_COLUMNS)  # columns of the documents table


class Labels(Protocol):
    """The labels of rows."""

    def having(self, name: str, values: Sequence[Value], count: int) -> np.ndarray:
        """Which of the first `count` rows have one of the values under this name, bool (count,)."""


class RowsByLabel:
    """The rows that have each label. Rows are only ever added, in ascending order, so that a search that knows how many
    there were when it began finds the same ones while others are being added.

    How much memory this takes does not depend on how many different names the documents use.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[str, Value], array[int]] = {}

    def add(self, row: int, labels: Mapping[str, Value]) -> None:
        for label in labels.items():
            if label in self._rows:
                self._rows[label].append(row)
            else:
                self._rows[label] = array("i", [row])

    def having(self, name: str, values: Sequence[Value], count: int) -> np.ndarray:
        """See `Labels`."""
        among = np.zeros(count, bool)
        for value in values:
            if (found := self._rows.get((name, value))) is not None:
                rows = np.frombuffer(found[:], np.int32)  # a copy, because `add` may be running
                among[rows[: np.searchsorted(rows, count)]] = True
        return among


class ColumnLabels:
    """The columns of a documents table, each read when it is first asked for.

    Args:
        rows: of the documents, by number.
    """

    def __init__(self, documents: StoredTable, rows: np.ndarray) -> None:
        self._documents, self._rows = documents, rows
        self._columns: dict[str, tuple[np.ndarray, pa.Array]] = {}
        self._reading = Lock()

    def having(self, name: str, values: Sequence[Value], count: int) -> np.ndarray:
        """See `Labels`. Columns of strings and of numbers have values, others none."""
        schema = self._documents.schema
        if name in NOT_LABELS or name not in schema.names or not (wanted := _of_type(values, schema.field(name).type)):
            return np.zeros(count, bool)
        codes, names = self._column(name)
        found = pc.index_in(wanted, names).drop_null().to_numpy(zero_copy_only=False)
        chosen = np.zeros(len(names) + 1, bool)  # the last one is of rows without a value
        chosen[found] = True
        among: np.ndarray = chosen[codes[:count]]
        return among

    def _column(self, name: str) -> tuple[np.ndarray, pa.Array]:
        """The code of each row, int32 (n,), -1 for none; and the value of each code."""
        with self._reading:
            if name not in self._columns:
                codes, values = self._documents.encoded(name)
                self._columns[name] = codes[self._rows], values
            return self._columns[name]


def _of_type(values: Sequence[Value], kind: pa.DataType) -> pa.Array:
    """The values that a column of this type may hold."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.array([value for value in values if isinstance(value, str)], kind)
    numbers = [value for value in values if not isinstance(value, str)]
    if pa.types.is_integer(kind):
        limits = np.iinfo(kind.to_pandas_dtype())
        return pa.array([value for value in numbers if limits.min <= value <= limits.max], kind)
    if kind in (pa.float32(), pa.float64()):  # how pandas stores whole numbers of which some are missing
        return pa.array([float(value) for value in numbers], kind)
    return pa.array([])
