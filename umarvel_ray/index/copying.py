"""Copies the documents of an index into a store: those of a folder of embeddings, then what clients have changed.

Documents that the store already has as they are are skipped, so an interrupted copy is resumed by the same call, and a
second one changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from umarvel_ray.data.content import KEY_COLUMNS
from umarvel_ray.data.stored import StoredTable
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.errors import UserError
from umarvel_ray.index.corpus import rows_of
from umarvel_ray.index.faiss_index import is_saved
from umarvel_ray.index.labels import LABELS, NOT_LABELS, Value
from umarvel_ray.index.log import read_log
from umarvel_ray.index.records import Add, Delete, Record, decode
from umarvel_ray.index.snapshot import batches_of, document_at, open_snapshot
from umarvel_ray.index.store import Store, digest_of
from umarvel_ray.index.writer import check_index
from umarvel_ray.inference.embeddings import vectors_of
from umarvel_ray.inference.shards import read_manifest, read_shard, read_shards
from umarvel_ray.progress import progress
from umarvel_ray.recipe import Data

ROWS = 256  # of the table, read at a time


def copy_embedded(store: Store, folder: Path, data: Data) -> int:
    """Copy the documents of a finished embed job; returns how many the store did not have.

    Raises:
        UserError: no finished embed job, vectors of another dimension than the store's, or documents that `data` does
            not contain; see also `Store.commit`.
    """
    if (size := embedded_dimension(folder)) != store.dimension:
        raise UserError(f"{folder} has vectors of {size} dimensions, the store of {store.dimension}; name another one")
    total = read_manifest(folder)["written"]
    return _copy(store, _embedded(folder, data), total, f"copy {folder}")


def copy_live(store: Store, folder: Path, identity: str) -> int:
    """Copy the changes of a live index; returns how many the store did not have.

    Args:
        identity: of the checkpoint (see `CheckpointRef`).

    Raises:
        UserError: an index of another model, or a damaged one; see also `Store.commit`.
    """
    if not check_index(folder, identity, store.dimension):
        return 0
    total = sum(1 for _ in _changes(folder, store.dimension))
    return _copy(store, _changes(folder, store.dimension), total, f"copy {folder}")


def embedded_dimension(folder: Path) -> int:
    """The dimension of a finished embed job's vectors. Raises: UserError: there is none."""
    if is_saved(folder):
        raise UserError(f"{folder} is a saved index, whose vectors may be rounded; name the folder of embeddings")
    read_manifest(folder)
    return int(vectors_of(read_shard(folder, 0, ["embedding"]).slice(0, 1)).shape[1])


def _copy(store: Store, records: Iterable[Record], total: int, what: str) -> int:
    """Commit what the store does not have, a batch after the other."""
    changed = 0
    with progress(total, what, "doc") as bar:
        for batch in batches_of(records):
            last = {record.id: record for record in batch}
            there = store.digests(list(last))
            missing = [record for record in last.values() if not _is_there(record, there, store.dimension)]
            if missing:
                store.commit(missing)
            changed += len(missing)
            bar.update(len(batch))
    return changed


def _is_there(record: Record, digests: dict[str, str], dimension: int) -> bool:
    found = digests.get(record.id)
    return found is None if isinstance(record, Delete) else found == digest_of(record, dimension)


def _embedded(folder: Path, data: Data) -> Iterator[Add]:
    documents = open_dataset(data).documents
    rows = rows_of(read_shards(folder, ["id"])["id"], documents, folder, data)
    columns = [name for name in documents.schema.names if name not in KEY_COLUMNS]
    start = 0
    for shard in range(read_manifest(folder)["shards"]):
        vectors = vectors_of(read_shard(folder, shard, ["embedding"]))
        for first in range(0, len(vectors), ROWS):
            part = vectors[first : first + ROWS]
            yield from _additions(documents, rows[start : start + len(part)], columns, part)
            start += len(part)


def _additions(documents: StoredTable, rows: np.ndarray, columns: list[str], vectors: np.ndarray) -> Iterator[Add]:
    for row, vector in zip(documents.rows(rows, columns), vectors, strict=True):
        labels = {name: _label(value) for name, value in row.items() if name not in (*LABELS, *NOT_LABELS)}
        metadata = {name: value for name, value in labels.items() if value is not None}
        media = row.get("image"), row.get("video")
        yield Add(row["id"], vector, row["modality"], row["source"], row["text"], *media, metadata)


def _label(value: Any) -> Value | None:
    """What a column's value can be filtered by, as in `ColumnLabels`; None for nothing."""
    if isinstance(value, float) and value.is_integer():  # how pandas stores whole numbers of which some are missing
        value = int(value)
    fits = type(value) is str or (type(value) is int and -(2**63) <= value < 2**63)
    return value if fits else None


def _changes(folder: Path, dimension: int) -> Iterator[Record]:
    """Every change of a live index that still matters, in order."""
    snapshot = open_snapshot(folder, dimension)
    yield from (Delete(id_) for id_ in sorted(snapshot.deleted))
    for row, vector in enumerate(snapshot.vectors):
        yield Add(vector=vector, **document_at(snapshot, row))
    for _, payload in read_log(folder, snapshot.end):
        yield from (record for record, _ in decode(payload))
