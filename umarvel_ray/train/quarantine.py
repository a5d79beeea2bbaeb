"""Quarantine before training: open every item that a query table needs, and set aside the rows that are unusable.

A batch plan is fixed before any picture is decoded, so bad pictures must be known by then. Unusable rows are written to
`quarantine/NAME.parquet` (table, id, reason); the file's existence also marks the check as done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from umarvel_ray.data.tables import Dataset, item_of
from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_path
from umarvel_ray.items.images import open_image
from umarvel_ray.items.item import check_item
from umarvel_ray.items.videos import open_video

Row = dict[str, Any]

ROWS_PER_TASK = 4096
QUARANTINE = pa.schema([("table", pa.string()), ("id", pa.string()), ("reason", pa.string())])


def without_unusable(dataset: Dataset, name: str, folder: Path) -> Dataset:
    """The dataset with query table `name` reduced to rows that can be trained on.

    Unusable positives are removed from their queries. A query is dropped if it is unusable itself or has no positive
    left.

    Raises:
        UserError: no query is left.
    """
    file = folder / f"{name}.parquet"
    queries = dataset.queries(name)
    first_check = not file.exists()
    if first_check:
        _write(_unusable(dataset, name, queries), file)
    bad = pq.read_table(file)
    if not bad.num_rows:
        return dataset
    bad_documents = set(bad.filter(pc.equal(bad["table"], "documents"))["id"].to_pylist())
    bad_queries = set(bad.filter(pc.equal(bad["table"], name))["id"].to_pylist())
    kept, positives = [], []
    for row, (id_, ids) in enumerate(zip(queries["id"].to_pylist(), queries["positive_ids"].to_pylist(), strict=True)):
        usable = [document for document in ids if document not in bad_documents]
        if usable and id_ not in bad_queries:
            kept.append(row)
            positives.append(usable)
    if first_check:
        print(f"{name}: {len(bad_queries):,} of {queries.num_rows:,} queries set aside; reasons in {file}")
    if not kept:
        raise UserError(f"{dataset.root}: no usable query in '{name}'; reasons in {file}")
    clean = queries.take(pa.array(kept))
    column = clean.column_names.index("positive_ids")
    return dataset.with_queries(name, clean.set_column(column, "positive_ids", pa.array(positives)))


def reason_against(row: Row, where: str) -> str | None:
    """Why a row of a document or query table cannot be embedded; None if it can."""
    try:
        item = check_item(item_of(row), where)
        images = item.get("image") or []
        for image in images if isinstance(images, list) else [images]:
            open_image(image, where)
        if "video" in item:
            open_video(item["video"], 1, where)
    except UserError as error:
        return str(error)
    return None


def _unusable(dataset: Dataset, name: str, queries: pa.Table) -> list[Row]:
    """A {"table", "id", "reason"} for every unusable query and positive."""
    wanted = pc.unique(pc.list_flatten(queries["positive_ids"])).to_pylist()
    documents = dataset.documents.take(pa.array([dataset.row_of[id_] for id_ in wanted], pa.int64()))
    found: list[Row] = []
    for table, rows in (("documents", documents), (name, queries)):
        shared = ray.put(rows)
        starts = range(0, rows.num_rows, ROWS_PER_TASK)
        found += [bad for part in ray.get([_check.remote(shared, start, table) for start in starts]) for bad in part]
    bad_documents = {row["id"] for row in found if row["table"] == "documents"}
    bad_queries = {row["id"] for row in found if row["table"] == name}
    for row in queries.select(["id", "positive_ids"]).to_pylist() if bad_documents else []:
        if row["id"] not in bad_queries and bad_documents.issuperset(row["positive_ids"]):
            found.append({"table": name, "id": row["id"], "reason": "none of its positives can be used"})
    return found


@ray.remote(num_cpus=0.5)
def _check(rows: pa.Table, start: int, table: str) -> list[Row]:
    reasons = (
        (row["id"], reason_against(row, f"{table} {row['id']}")) for row in rows.slice(start, ROWS_PER_TASK).to_pylist()
    )
    return [{"table": table, "id": id_, "reason": reason} for id_, reason in reasons if reason]


def _write(found: list[Row], file: Path) -> None:
    with atomic_path(file) as partial:
        pq.write_table(pa.Table.from_pylist(found, QUARANTINE), partial)
