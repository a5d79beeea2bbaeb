"""A corpus with its pools and query tables.

The tables stay on disk (`data/stored.py`). In memory are row numbers: a query's positives and a task's pool are row
numbers of the document table, so that no id has to be looked up after a table has been read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.data.content import digest_of
from umarvel_ray.data.stored import StoredTable, joined_strings
from umarvel_ray.errors import UserError
from umarvel_ray.ragged import Ragged

ITEM_COLUMNS = ("text", "image", "video", "instruction")

Pools = Mapping[tuple[str, str], np.ndarray]  # rows of documents, int64 (n,), by task and split


def item_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The item in a row of a document or query table: whichever of text, image, video and instruction are set."""
    return {key: row[key] for key in ITEM_COLUMNS if row.get(key) is not None}


@dataclass(frozen=True)
class Selection:
    """Some rows of a table, by number: int64 (n,)."""

    table: StoredTable
    rows: np.ndarray

    @classmethod
    def whole(cls, table: StoredTable) -> Selection:
        """All rows of a table."""
        return cls(table, np.arange(table.num_rows))

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        """Equal for the same rows of equal tables."""
        return digest_of(self.table.digest, self.rows)

    def part(self, start: int, stop: int) -> Selection:
        """The rows from position `start` to before `stop`."""
        return Selection(self.table, self.rows[start:stop])

    def parts(self, size: int) -> Iterator[Selection]:
        """`size` rows after the other; the last part may be smaller."""
        return (self.part(start, start + size) for start in range(0, self.n, size))

    def items(self) -> list[dict[str, Any]]:
        """One dict per row: its id, and the columns of its item."""
        return self.table.rows(self.rows, ("id", *ITEM_COLUMNS))


@dataclass(frozen=True)
class Queries:
    """Some rows of a query table, in table order.

    Attributes:
        table: the columns of a query table, `picture_key` and `positive_rows`.
        rows: int64 (n,), ascending row numbers.
        positives: rows of the document table, at least one for each query.
        tasks: the names of all tasks in the table.
        task: int64 (n,), the number of each query's task in `tasks`.
        galleries: rows of the only documents that each query is ranked against; None: its task's pool.
    """

    table: StoredTable
    rows: np.ndarray
    positives: Ragged
    tasks: tuple[str, ...]
    task: np.ndarray
    galleries: Ragged | None = None

    @classmethod
    def of(cls, table: StoredTable) -> Queries:
        """All rows of a table that was stored with its positives."""
        task, names = table.codes("task")
        positives = Ragged.of_arrow(table.column("positive_rows"))
        given = "gallery_rows" in table.schema.names
        galleries = Ragged.of_arrow(table.column("gallery_rows")) if given else None
        return cls(table, np.arange(table.num_rows), positives, tuple(names), task, galleries)

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        return digest_of(self.table.digest, self.rows, self.positives.offsets, self.positives.values)

    @property
    def selection(self) -> Selection:
        return Selection(self.table, self.rows)

    def by_task(self) -> Selection:
        """The rows task by task, in the order of `tasks`."""
        return Selection(self.table, self.rows[np.argsort(self.task, kind="stable")])

    def take(self, indices: np.ndarray) -> Queries:
        """The queries at these positions."""
        galleries = self.galleries and self.galleries.take(indices)
        positives, task = self.positives.take(indices), self.task[indices]
        return replace(self, rows=self.rows[indices], positives=positives, task=task, galleries=galleries)

    def ids(self) -> list[str]:
        return self.table.ids(self.rows)

    def of_task(self, name: str) -> np.ndarray:
        """The positions of a task's queries."""
        return np.flatnonzero(self.task == self.tasks.index(name)) if name in self.tasks else np.empty(0, np.int64)


class Dataset:
    """A corpus with its pools and its query tables, which are opened on first use.

    Args:
        root: the folder, for error messages.
        read_queries: opens a query table by name; raises UserError for an unknown name.
    """

    def __init__(
        self, root: Path, documents: StoredTable, pools: Pools, read_queries: Callable[[str], Queries]
    ) -> None:
        self.root = root
        self.documents = documents
        self.pools = pools
        self.queries = lru_cache(read_queries)

    @cached_property
    def document_ids(self) -> Any:
        """The id of each document, as an Arrow array."""
        return joined_strings(self.documents.column("id"))

    def content(self) -> np.ndarray:
        """int64 (m,): a number for each document, equal for the same text, pictures and videos."""
        numbers: np.ndarray = self.documents.column("content_key").to_numpy().view(np.int64)
        return numbers

    def with_queries(self, name: str, queries: Queries) -> Dataset:
        """The same corpus with the query table `name` replaced."""
        return Dataset(
            self.root, self.documents, self.pools, lambda other: queries if other == name else self.queries(other)
        )

    def with_pools(self, pools: Pools) -> Dataset:
        """The same corpus and queries with other pools."""
        return Dataset(self.root, self.documents, pools, self.queries)

    def tasks(self, split: str) -> list[str]:
        """The tasks with a pool in the split, in the order of the pools table."""
        return [task for task, of_split in self.pools if of_split == split]

    def pool(self, task: str, split: str) -> np.ndarray:
        """A task's own (local) pool: row numbers of documents, in the order of the pools table.

        Raises:
            UserError: no such pool, or it is empty.
        """
        rows = self.pools.get((task, split))
        if rows is None:
            raise UserError(f"{self.root}: no pool for task '{task}' in split '{split}'; add it to the pools")
        if not len(rows):
            raise UserError(f"{self.root}: the pool of task '{task}', split '{split}', is empty; add its documents")
        return rows

    def global_pool(self, split: str) -> np.ndarray:
        """The union of the split's pools: ascending row numbers of documents."""
        found = np.zeros(self.documents.num_rows, bool)
        for task in self.tasks(split):
            found[self.pool(task, split)] = True
        return np.flatnonzero(found)

    def check_pools(self, split: str) -> None:
        """Make sure that the queries of a split can be searched for.

        Raises:
            UserError: a task without a pool, or an empty pool.
        """
        queries = self.queries(split)
        for code in np.unique(queries.task):
            self.pool(queries.tasks[code], split)

    def digest_of_pools(self, split: str) -> str:
        return digest_of(*(part for task in self.tasks(split) for part in (task, self.pool(task, split))))

    def validate(self, name: str) -> None:
        """Open the query table `name` and look at its pools; queries that cannot find a positive there are counted.

        Raises:
            UserError: see `open_dataset`; an empty pool.
        """
        queries = self.queries(name)
        for task in self.tasks(name):
            pool = self.pool(task, name)
            own = queries.take(queries.of_task(task))
            outside = ~np.isin(own.positives.values, pool)
            lost = np.unique(own.positives.owners[outside])
            if len(lost):
                [query] = own.take(lost[:1]).ids()
                print(
                    f"{self.root}: {name}: {len(lost):,} of {own.n:,} queries of task '{task}' have a positive outside "
                    f"their pool, where a search cannot find it; the first is '{query}'"
                )
