"""Documents, queries and pools as Arrow tables, whatever format they are stored in.

A Parquet folder holds `documents.parquet` (id, text, image, modality, source …), `pools.parquet` (task, split,
document_ids) and one `NAME.parquet` per query table (the document columns, instruction, positive_ids, task …). An image
or a video (optional column `video`) is encoded bytes, or a path relative to the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from umarvel_ray import demo
from umarvel_ray.data.mbeir import read_mbeir
from umarvel_ray.errors import UserError
from umarvel_ray.recipe import Data

DOCUMENT_COLUMNS = ("id", "text", "image", "modality", "source")
QUERY_COLUMNS = (*DOCUMENT_COLUMNS, "instruction", "positive_ids", "task")
POOL_COLUMNS = ("task", "split", "document_ids")
ITEM_COLUMNS = ("text", "image", "video", "instruction")


def item_of(row: dict[str, Any]) -> dict[str, Any]:
    """The item in a row of a document or query table: whichever of text, image, video and instruction are set."""
    return {key: row[key] for key in ITEM_COLUMNS if row.get(key) is not None}


class Dataset:
    """A corpus with its query tables, which are read on first use.

    Args:
        root: the folder, for error messages.
        documents, pools: tables with the columns listed above.
        read_queries: reads a query table by name; raises UserError for an unknown name.
    """

    def __init__(
        self, root: Path, documents: pa.Table, pools: pa.Table, read_queries: Callable[[str], pa.Table]
    ) -> None:
        self.root = root
        self.documents = documents
        self.pools = pools
        self.queries = lru_cache(read_queries)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row number of each document id."""
        return {name: row for row, name in enumerate(self.documents["id"].to_pylist())}

    def with_queries(self, name: str, table: pa.Table) -> Dataset:
        """The same corpus with the query table `name` replaced."""
        return Dataset(
            self.root, self.documents, self.pools, lambda other: table if other == name else self.queries(other)
        )

    def with_pools(self, pools: pa.Table) -> Dataset:
        """The same corpus and queries with other pools."""
        return Dataset(self.root, self.documents, pools, self.queries)

    def tasks(self, split: str) -> list[str]:
        """The tasks with a pool in the split, in the order of the pools table."""
        tasks: list[str] = self._pools_of(split)["task"].to_pylist()
        return tasks

    def pool(self, task: str, split: str) -> list[str]:
        """The document ids of a task's own (local) pool.

        Raises:
            UserError: no such pool, or it is empty.
        """
        rows = self._pools_of(split)
        found = rows.filter(pc.equal(rows["task"], task))["document_ids"]
        if len(found) == 0:
            raise UserError(f"{self.root}: no pool for task '{task}' in split '{split}'; add it to the pools")
        ids: list[str] = found[0].as_py()
        if not ids:
            raise UserError(f"{self.root}: the pool of task '{task}', split '{split}', is empty; add its documents")
        return ids

    def global_pool(self, split: str) -> list[str]:
        """The union of the split's pools, in their order, without duplicates."""
        return list(dict.fromkeys(name for task in self.tasks(split) for name in self.pool(task, split)))

    def validate(self, name: str) -> None:
        """Check the query table `name` and the pools of the split with that name against the documents.

        Raises:
            UserError: a duplicate id, a query without positives, a positive or pool entry that names an unknown
                document, or an empty pool; the message names the first one with file and row.
        """
        _check_unique(self.documents["id"], f"{self.root}: documents")
        queries = self.queries(name)
        _check_unique(queries["id"], f"{self.root}: {name}")
        known = self.documents["id"]
        counts = pc.fill_null(pc.list_value_length(queries["positive_ids"]), 0)
        if (row := pc.index(counts, pa.scalar(0, counts.type)).as_py()) >= 0:
            query = queries["id"][row].as_py()
            raise UserError(f"{self.root}: {name}, row {row}: query '{query}' has no positive; add one or drop the row")
        if unknown := _first_unknown(queries["positive_ids"], known):
            row, document = unknown
            query = queries["id"][row].as_py()
            raise UserError(
                f"{self.root}: {name}, row {row}: query '{query}' names the unknown document '{document}' as positive; "
                "add it to the documents or drop it"
            )
        for task in self.tasks(name):
            if unknown := _first_unknown(pa.chunked_array([pa.array([self.pool(task, name)])]), known):
                raise UserError(
                    f"{self.root}: pools, task '{task}', split '{name}': unknown document '{unknown[1]}'; "
                    "add it to the documents or drop it"
                )

    def _pools_of(self, split: str) -> pa.Table:
        return self.pools.filter(pc.equal(self.pools["split"], split))


def folder_of(data: Data) -> Path:
    """The folder that `data.root` names."""
    return demo.DATA if data.root == demo.NAME else Path(data.root)


def open_dataset(data: Data) -> Dataset:
    """Open the dataset that a recipe's `data` section names.

    Raises:
        UserError: the folder does not exist, or a file or column is missing or unreadable.
    """
    root = folder_of(data)
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist; set data.root=DIR")
    if data.format == "mbeir":
        return Dataset(root, *read_mbeir(root))
    return Dataset(
        root,
        _read(root, "documents", DOCUMENT_COLUMNS),
        _read(root, "pools", POOL_COLUMNS),
        lambda name: _read(root, name, QUERY_COLUMNS),
    )


def _read(root: Path, name: str, columns: tuple[str, ...]) -> pa.Table:
    path = root / f"{name}.parquet"
    if not path.is_file():
        raise UserError(f"{path}: not found; create it, or check data.root and the table's name")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    if missing := [column for column in columns if column not in table.column_names]:
        raise UserError(f"{path}: column '{missing[0]}' is missing; add it")
    return _absolute_paths(_absolute_paths(table, root, "image"), root, "video")


def _absolute_paths(table: pa.Table, root: Path, column: str) -> pa.Table:
    if column not in table.column_names or not pa.types.is_string(table.schema.field(column).type):
        return table
    paths = table[column]
    joined = pc.binary_join_element_wise(str(root.absolute()), paths, "/")
    whole = pc.if_else(pc.fill_null(pc.match_substring_regex(paths, "^(/|[a-z]+:)"), True), paths, joined)
    return table.set_column(table.column_names.index(column), column, whole)


def _check_unique(ids: pa.ChunkedArray, where: str) -> None:
    if ids.null_count:
        raise UserError(f"{where}: row {pc.index(ids.is_null(), True).as_py()} has no id; give it one")
    if len(pc.unique(ids)) < len(ids):
        counts = ids.value_counts().flatten()
        twice = counts[0].filter(pc.greater(counts[1], 1))[0].as_py()
        raise UserError(f"{where}: id '{twice}' occurs twice; ids must be unique")


def _first_unknown(lists: pa.ChunkedArray, known: pa.ChunkedArray) -> tuple[int, str] | None:
    values, parents = pc.list_flatten(lists), pc.list_parent_indices(lists)
    at = pc.index(pc.is_in(values, value_set=known.combine_chunks()), False).as_py()
    return (parents[at].as_py(), values[at].as_py()) if at >= 0 else None
