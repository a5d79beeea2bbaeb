"""A snapshot: all documents added up to a commit, in files that replicas memory-map.

`snapshot-N/` holds `vectors.npy` float32 (n, d), `documents.arrow` (id, text, image, video, modality, source, metadata
as JSON) and `snapshot.json` (the CRC of commit N, and the deleted ids of the base). The folder appears complete, by one
rename.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa

from umarvel_ray.files import sync_folder
from umarvel_ray.index.hits import media_bytes
from umarvel_ray.index.labels import Value
from umarvel_ray.index.log import RESTORE, Damaged, Position
from umarvel_ray.index.names import numbered, numbers
from umarvel_ray.index.records import Add, Record
from umarvel_ray.items.images import one_or_several, pictures_of

PARTIAL = ".snapshot.partial"
ROWS, BYTES = 1024, 16 << 20  # copied at a time
AnyRecord = TypeVar("AnyRecord", bound=Record)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("image", pa.large_list(pa.large_binary())),  # of each document the pictures; none is null
        ("video", pa.large_binary()),
        ("modality", pa.string()),
        ("source", pa.string()),
        ("metadata", pa.string()),
    ]
)


@dataclass(frozen=True)
class Snapshot:
    """The documents as of commit `end`; row i of `vectors`, float32 (n, d), belongs to row i of `documents`."""

    vectors: np.ndarray
    documents: pa.Table
    deleted: frozenset[str]
    end: Position


def empty_snapshot(dimension: int) -> Snapshot:
    """The snapshot before the first commit."""
    return Snapshot(np.empty((0, dimension), np.float32), SCHEMA.empty_table(), frozenset(), Position())


def snapshots(folder: Path) -> list[int]:
    """The number of the last commit in each snapshot, ascending."""
    return numbers(folder, "snapshot")


def snapshot_path(folder: Path, sequence: int) -> Path:
    return folder / numbered("snapshot", sequence)


def open_snapshot(folder: Path, dimension: int) -> Snapshot:
    """The newest snapshot, or an empty one if there is none.

    Raises:
        Damaged: it is not whole, or was removed in the meantime because there is a newer one.
        OSError: it cannot be read now.
    """
    if not (found := snapshots(folder)):
        return empty_snapshot(dimension)
    path = snapshot_path(folder, found[-1])
    try:
        facts = json.loads((path / "snapshot.json").read_text())
        vectors = np.load(path / "vectors.npy", mmap_mode="r")
        documents = pa.ipc.open_file(pa.memory_map(str(path / "documents.arrow"))).read_all()
        end = Position(found[-1], facts["crc"], found[-1] + 1, 0)
        deleted = frozenset(facts["deleted"])
        if len(vectors) != len(documents):
            raise ValueError(f"{len(vectors)} vectors for {len(documents)} documents")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.ENOTDIR):
            raise
        raise Damaged(f"{path}: not readable ({str(error).splitlines()[0]}); {RESTORE}") from None
    if "metadata" not in documents.schema.names:  # written before there was any
        documents = documents.append_column("metadata", pa.nulls(len(documents), pa.string()))
    if documents.schema.field("image").type == pa.large_binary():  # written when a document had one picture
        number = documents.schema.get_field_index("image")
        documents = documents.set_column(number, SCHEMA.field("image"), _lists_of_one(documents["image"]))
    return Snapshot(vectors, documents, deleted, end)


def document_at(snapshot: Snapshot, row: int) -> dict[str, Any]:
    """A document, as `Add.document` gave it."""
    [document] = snapshot.documents.slice(row, 1).to_pylist()
    image = one_or_several(pictures_of(document["image"]))
    return document | {"image": image, "metadata": metadata_of(document["metadata"])}


def metadata_of(text: str | None) -> dict[str, Value]:
    """The metadata in a row of `documents.arrow`."""
    metadata: dict[str, Value] = json.loads(text) if text else {}
    return metadata


def write_snapshot(
    folder: Path,
    old: Snapshot,
    kept: np.ndarray,
    added: Iterable[Add],
    count: int,
    deleted: Iterable[str],
    end: Position,
) -> None:
    """Write the snapshot of commit `end`: the rows of an old one that are kept, and the documents added since.

    Args:
        kept: bool (n,), by row of `old`.
        added: `count` documents; few of them are in memory at a time.
        deleted: ids of the base's documents that are deleted.

    Raises:
        OSError: the disk is full.
    """
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with (
        _durable(partial / "documents.arrow") as documents,
        pa.ipc.new_file(documents, SCHEMA) as arrow,
        _durable(partial / "vectors.npy") as vectors,
    ):
        shape = int(kept.sum()) + count, old.vectors.shape[1]
        np.lib.format.write_array_header_1_0(vectors, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for start in range(0, len(kept), ROWS):
            rows = slice(start, start + ROWS)
            vectors.write(old.vectors[rows][kept[rows]].tobytes())
        start = 0
        for batch in old.documents.to_batches():
            arrow.write_batch(batch.filter(pa.array(kept[start : start + batch.num_rows])))
            start += batch.num_rows
        for records in batches_of(added):
            vectors.write(b"".join(record.vector.tobytes() for record in records))
            arrow.write_batch(pa.RecordBatch.from_pylist([_row(record) for record in records], SCHEMA))
    with _durable(partial / "snapshot.json") as file:
        file.write(json.dumps({"crc": end.crc, "deleted": sorted(deleted)}).encode())
    sync_folder(partial)
    partial.rename(snapshot_path(folder, end.sequence))
    sync_folder(folder)


def batches_of(given: Iterable[AnyRecord]) -> Iterator[list[AnyRecord]]:
    """Records in lists of at most `ROWS` of them and about `BYTES` of media."""
    records: list[AnyRecord] = []
    size = 0
    for record in given:
        records.append(record)
        size += media_bytes(vars(record))
        if len(records) == ROWS or size > BYTES:
            yield records
            records, size = [], 0
    if records:
        yield records


def _row(record: Add) -> dict[str, Any]:
    metadata = json.dumps(dict(record.metadata)) if record.metadata else None
    return record.document | {"image": pictures_of(record.image) or None, "metadata": metadata}


def _lists_of_one(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Each value in a list of its own, without copying it; null stays null."""
    type_ = pa.large_list(column.type)
    lists = [
        pa.LargeListArray.from_arrays(pa.array(range(len(chunk) + 1), pa.int64()), chunk, mask=chunk.is_null())
        for chunk in column.chunks
    ]
    return pa.chunked_array(lists, type_)


@contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
