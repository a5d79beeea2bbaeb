"""The paper's tables, and measured rows beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from umarvel_ray.data.writing import AVERAGE
from umarvel_ray.evaluate.measured import Measured

FILE = Path(__file__).with_name("published.yaml")
PAPER = "arXiv 2507.14902"
PUBLISHED, MEASURED = "published", "measured"


@dataclass(frozen=True)
class Column:
    """What a number is of."""

    label: str
    benchmark: str
    scope: str
    task: str
    metric: str


@dataclass(frozen=True)
class Row:
    """Numbers in percent, one for each column; None where there is none.

    Attributes:
        origin: "published" or "measured".
    """

    model: str
    origin: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Table:
    """One table of the paper; `rows` holds its numbers in percent by model."""

    title: str
    source: str
    columns: tuple[Column, ...]
    rows: Mapping[str, Sequence[float | None]]

    def beside(self, results: Sequence[Measured]) -> list[Row]:
        """The published rows, then one for each measured model that has a number in this table; [] if none has."""
        by_model: dict[str, list[Measured]] = {}
        for result in results:
            by_model.setdefault(result.model, []).append(result)
        measured = [Row(model, MEASURED, self._values(own)) for model, own in by_model.items()]
        measured = [row for row in measured if any(value is not None for value in row.values)]
        published = [Row(model, PUBLISHED, tuple(values)) for model, values in self.rows.items()]
        return [*published, *measured] if measured else []

    def _values(self, results: Sequence[Measured]) -> tuple[float | None, ...]:
        return tuple(self._value(column, results) for column in self.columns)

    def _value(self, column: Column, results: Sequence[Measured]) -> float | None:
        own = [result for result in results if result.benchmark == column.benchmark]
        values = [result.value(column.scope, column.task, column.metric) for result in own]
        found = next((value for value in values if value is not None), None)
        if found is None or (column.task == AVERAGE and not self._complete(column, results)):
            return None
        return 100 * found

    def _complete(self, average: Column, results: Sequence[Measured]) -> bool:
        """Whether all tasks that the table averages over were measured: else the averages could not be compared."""
        parts = [column for column in self.columns if column.task != AVERAGE and _alike(column, average)]
        return all(self._value(column, results) is not None for column in parts)


def _alike(column: Column, other: Column) -> bool:
    return (column.benchmark, column.scope) == (other.benchmark, other.scope)


@cache
def published_tables() -> tuple[Table, ...]:
    """The paper's Tables 7 to 10."""
    return tuple(
        Table(
            table["title"],
            f"{table['source']} of {PAPER}",
            tuple(Column(**column) for column in table["columns"]),
            table["rows"],
        )
        for table in yaml.safe_load(FILE.read_text(encoding="utf-8"))
    )
