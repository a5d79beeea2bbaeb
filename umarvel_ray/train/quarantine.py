"""Quarantine before training: open every item that a query table needs, and set aside the rows that are unusable.

A batch plan is fixed before any picture is decoded, so bad pictures must be known by then. Unusable rows are written to
`quarantine/NAME.parquet` (table, row, id, reason), which also marks the check of these tables as done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from umarvel_ray.data.content import digest_of
from umarvel_ray.data.dataset import Dataset, Queries, Selection, item_of
from umarvel_ray.data.stored import StoredTable
from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_path
from umarvel_ray.items.images import open_image
from umarvel_ray.items.item import check_item
from umarvel_ray.items.videos import open_video

DOCUMENTS = "documents"
TASK_ROWS = 4096
READ_ROWS = 64  # rows in a task's memory at once
TASKS_AHEAD = 64  # submitted before the first one is done
NO_POSITIVE = "none of its positives can be used"
INPUTS = b"inputs"  # key of the file's metadata: what was checked
QUARANTINE = pa.schema([("table", pa.string()), ("row", pa.int64()), ("id", pa.string()), ("reason", pa.string())])


def without_unusable(dataset: Dataset, name: str, folder: Path) -> Dataset:
    """The dataset with query table `name` reduced to rows that can be trained on.

    Unusable positives are removed from their queries. A query is dropped if it is unusable itself or has no positive
    left.

    Raises:
        UserError: no query is left.
    """
    file = folder / f"{name}.parquet"
    queries = dataset.queries(name)
    inputs = digest_of(dataset.documents.digest, queries.digest)
    if not _is_check_of(file, inputs) or _some_are_mended(file, dataset.documents, name, queries):
        _write_unusable(dataset.documents, name, queries, file, inputs)
    bad = pq.read_table(file, columns=["table", "row"], partitioning=None)
    if not bad.num_rows:
        return dataset
    kept = _usable(queries, _rows_of(bad, DOCUMENTS), _rows_of(bad, name))
    print(f"{name}: {queries.n - kept.n:,} of {queries.n:,} queries set aside; reasons in {file}")
    if not kept.n:
        raise UserError(f"{dataset.root}: no usable query in '{name}'; reasons in {file}")
    return dataset.with_queries(name, kept)


def reason_against(row: Mapping[str, Any], where: str) -> str | None:
    """Why a row of a document or query table cannot be embedded; None if it can."""
    try:
        item = check_item(item_of(row), where)
        images = item.get("image", [])
        for image in images if isinstance(images, list) else [images]:
            open_image(image, where)
        if "video" in item:
            open_video(item["video"], 1, where)
    except UserError as error:
        return str(error)
    return None


def _usable(queries: Queries, bad_documents: np.ndarray, bad_queries: np.ndarray) -> Queries:
    """The queries that are not bad, and that have a positive which is not; without the bad positives."""
    positives = queries.positives.keep(~np.isin(queries.positives.values, bad_documents))
    good = (positives.counts > 0) & ~np.isin(queries.rows, bad_queries)
    return replace(queries, positives=positives).take(np.flatnonzero(good))


def _is_check_of(file: Path, inputs: str) -> bool:
    return file.exists() and (pq.read_schema(file).metadata or {}).get(INPUTS) == inputs.encode()


def _some_are_mended(file: Path, documents: StoredTable, name: str, queries: Queries) -> bool:
    """Whether a row that was unusable no longer is: its picture, a file of its own, may have been repaired."""
    bad = pq.read_table(file, columns=["table", "row", "reason"], partitioning=None)
    bad = bad.filter(pc.not_equal(bad["reason"], NO_POSITIVE))
    for table, source in ((DOCUMENTS, documents), (name, queries.table)):
        rows = _rows_of(bad, table)
        if sum(found.num_rows for found in _check_all(Selection(source, rows), table)) < len(rows):
            return True
    return False


def _write_unusable(documents: StoredTable, name: str, queries: Queries, file: Path, inputs: str) -> None:
    """Write a row of QUARANTINE for every unusable query and positive, as they are found."""
    schema = QUARANTINE.with_metadata({INPUTS: inputs})
    with atomic_path(file) as partial, pq.ParquetWriter(partial, schema) as writer:
        bad = {}
        positives = Selection(documents, np.unique(queries.positives.values))
        for table, rows in ((DOCUMENTS, positives), (name, queries.selection)):
            numbers = [np.empty(0, np.int64)]
            for found in _check_all(rows, table):
                writer.write_table(found.cast(schema))
                numbers.append(found["row"].to_numpy())
            bad[table] = np.concatenate(numbers)
        usable = _usable(queries, bad[DOCUMENTS], bad[name])
        lost = np.setdiff1d(queries.rows, np.concatenate([usable.rows, bad[name]]))
        ids = queries.table.fetch(lost, ["id"])["id"]
        reasons = pa.repeat(NO_POSITIVE, len(lost))
        writer.write_table(pa.table([pa.repeat(name, len(lost)), lost, ids, reasons], schema))


def _check_all(rows: Selection, table: str) -> Iterator[pa.Table]:
    """Check rows in Ray tasks; what they find comes in order."""
    waiting: deque[ray.ObjectRef] = deque()
    for part in rows.parts(TASK_ROWS):
        waiting.append(_check.remote(part, table))
        if len(waiting) == TASKS_AHEAD:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())


@ray.remote(num_cpus=0.5)
def _check(rows: Selection, table: str) -> pa.Table:
    parts = rows.parts(READ_ROWS)
    numbered = ((number, row) for part in parts for number, row in zip(part.rows.tolist(), part.items(), strict=True))
    reasons = ((number, row["id"], reason_against(row, f"{table} {row['id']}")) for number, row in numbered)
    found = [{"table": table, "row": number, "id": id_, "reason": reason} for number, id_, reason in reasons if reason]
    return pa.Table.from_pylist(found, QUARANTINE)


def _rows_of(bad: pa.Table, table: str) -> np.ndarray:
    rows: np.ndarray = bad.filter(pc.equal(bad["table"], table))["row"].to_numpy()
    return rows
