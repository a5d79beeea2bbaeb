"""Write the tables of a data folder (`data/parquet.py`) from what was stored, item by item."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from umarvel_ray.importing.record import Fault, Place
from umarvel_ray.importing.split import NOWHERE, SPLITS
from umarvel_ray.importing.store import Links, stored_items
from umarvel_ray.importing.tasks import MODALITIES
from umarvel_ray.items.item import readable
from umarvel_ray.ragged import RowsByKey

# The columns of a run's own quarantine (`train/quarantine.py`); here a table is a file of the source.
QUARANTINE = pa.schema([("table", pa.string()), ("row", pa.int64()), ("id", pa.string()), ("reason", pa.string())])
GROUP_BYTES, GROUP_ROWS = 8 << 20, 4096  # of a table, before they are written


class Pools(NamedTuple):
    """The documents of each task's pools: three aligned arrays, int64 (p,), without repetitions, in order."""

    shape: np.ndarray
    split: np.ndarray
    item: np.ndarray


class Table:
    """A Parquet file that is written in row groups of limited size; a context manager."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> Table:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def add(self, row: dict[str, Any], size: int = 0) -> None:
        """Add a row that has about so many bytes."""
        self._rows.append(row)
        self._bytes += size
        if self._bytes >= GROUP_BYTES or len(self._rows) == GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._bytes = [], 0


class Quarantine:
    """The rows that cannot be used, in `quarantine/import.parquet`, which is there if any are; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "quarantine" / "import.parquet"
        self._table: Table | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def add(self, place: Place, fault: Fault) -> None:
        """Set a row, or a part of it, aside."""
        if self._table is None:
            self._path.parent.mkdir()
            self._table = self._stack.enter_context(Table(self._path, QUARANTINE))
        self._table.add({"table": place.file, "row": place.row, "id": place.id, "reason": readable(str(fault))})


def pools_of(links: Links, query_split: np.ndarray, item_split: np.ndarray) -> Pools:
    """Each task's positives and negatives by split; a negative that belongs to another split is in no pool of this one.

    Args:
        query_split, item_split: from `split_queries`.
    """
    pairs = np.concatenate([links.positives, links.negatives])
    query, item = pairs.T
    inside = query_split[query] == item_split[item]
    rows = np.stack([links.shape[query], query_split[query], item], axis=1)[inside]
    return Pools(*np.unique(rows, axis=0).T)


def write_tables(
    folder: Path, items: Path, links: Links, query_split: np.ndarray, item_split: np.ndarray, pools: Pools, name: str
) -> None:
    """Write `documents.parquet`, `pools.parquet` and a table of queries per split.

    Args:
        items: what a `Store` wrote.
        name: of the data: its documents' source, and the beginning of its tasks' names.
    """
    ids, several = _ids_of(items)
    document = _schema(several)
    query = pa.schema(
        [*document, ("instruction", pa.string()), ("positive_ids", pa.list_(pa.string())), ("task", pa.string())]
    )
    in_pool = np.zeros(len(ids), bool)
    in_pool[pools.item] = True
    queries_of = RowsByKey(links.asked, np.arange(len(links.asked))).having(np.arange(len(ids)))
    positives_of = RowsByKey(links.positives[:, 0], links.positives[:, 1]).having(np.arange(len(links.asked)))
    with ExitStack() as stack:
        documents = stack.enter_context(Table(folder / "documents.parquet", document))
        tables = [stack.enter_context(Table(folder / f"{split}.parquet", query)) for split in SPLITS]
        number = 0
        for batch in stored_items(items):
            for stored in range(batch.num_rows):
                key, row, size = _row(batch.slice(stored, 1), several, name)
                if in_pool[number] and item_split[number] != NOWHERE:
                    documents.add(row, size)
                for asked in queries_of.at(number).tolist():
                    shape, said = int(links.shape[asked]), links.instructions[links.instruction[asked]]
                    positives = dict.fromkeys(ids[item] for item in positives_of.at(asked).tolist())
                    own = {"id": query_id(key, shape, said), "instruction": said or None}
                    own |= {"positive_ids": list(positives), "task": task_name(name, shape)}
                    tables[query_split[asked]].add(row | own, size)
                number += 1
    _write_pools(folder / "pools.parquet", pools, ids, name)


def task_name(name: str, shape: int) -> str:
    """The name of a task of this data; the report recognizes the number."""
    return f"{name}_task{shape}"


def query_id(key: bytes, shape: int, instruction: str) -> str:
    """The id of a query, which is the same whenever the same is asked: 16 hexadecimal digits."""
    return hashlib.blake2b(key + f" {shape} {instruction}".encode(), digest_size=8).hexdigest()


def _ids_of(items: Path) -> tuple[list[str], bool]:
    """The id of each item, and whether one has several pictures."""
    ids: list[str] = []
    several = False
    for batch in stored_items(items):
        ids += batch["id"].to_pylist()
        several = several or bool((np.diff(batch["images"].offsets.to_numpy()) > 1).any())
    return ids, several


def _schema(several: bool) -> pa.Schema:
    image = pa.list_(pa.binary()) if several else pa.binary()
    return pa.schema(
        [("id", pa.string()), ("text", pa.string()), ("image", image), ("modality", pa.string()),
         ("source", pa.string())]
    )  # fmt: skip


def _row(batch: pa.RecordBatch, several: bool, name: str) -> tuple[bytes, dict[str, Any], int]:
    """The key and the row of a stored item, and the row's size."""
    [stored] = batch.to_pylist()
    images = stored["images"]
    image = (images or None) if several else (images[0] if images else None)
    row = {"id": stored["id"], "text": stored["text"], "image": image, "source": name}
    size = len(stored["text"] or "") + sum(map(len, images))
    return stored["key"], row | {"modality": MODALITIES[stored["modality"]]}, size


def _write_pools(path: Path, pools: Pools, ids: list[str], name: str) -> None:
    schema = pa.schema([("task", pa.string()), ("split", pa.string()), ("document_ids", pa.list_(pa.string()))])
    with Table(path, schema) as table:
        for shape in np.unique(pools.shape).tolist():
            for number, split in enumerate(SPLITS):
                own = pools.item[(pools.shape == shape) & (pools.split == number)]
                if len(own):
                    members = [ids[item] for item in own.tolist()]
                    table.add({"task": task_name(name, shape), "split": split, "document_ids": members})
