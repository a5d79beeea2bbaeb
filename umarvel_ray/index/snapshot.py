"""A snapshot: all documents added up to a commit, in files that replicas memory-map.

`snapshot-N/` holds `vectors.npy` float32 (n, d), `documents.arrow` (id, text, image, video, modality, source) and
`snapshot.json` (the CRC of commit N, and the deleted ids of the base). The folder appears complete, by one rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from umarvel_ray.files import sync_folder
from umarvel_ray.index.log import RESTORE, Damaged, Position
from umarvel_ray.index.records import Add

PARTIAL = ".snapshot.partial"
ROWS = 1024  # rows copied at a time
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("image", pa.large_binary()),
        ("video", pa.large_binary()),
        ("modality", pa.string()),
        ("source", pa.string()),
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
    return sorted(int(name[9:]) for name in os.listdir(folder) if name.startswith("snapshot-"))


def snapshot_path(folder: Path, sequence: int) -> Path:
    return folder / f"snapshot-{sequence:012d}"


def open_snapshot(folder: Path, dimension: int) -> Snapshot:
    """The newest snapshot, or an empty one if there is none.

    Raises:
        Damaged: it cannot be read, or was removed in the meantime because there is a newer one.
    """
    if not (found := snapshots(folder)):
        return empty_snapshot(dimension)
    path = snapshot_path(folder, found[-1])
    try:
        facts = json.loads((path / "snapshot.json").read_text())
        vectors = np.load(path / "vectors.npy", mmap_mode="r")
        documents = pa.ipc.open_file(pa.memory_map(str(path / "documents.arrow"))).read_all()
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: not readable ({str(error).splitlines()[0]}); {RESTORE}") from None
    end = Position(found[-1], facts["crc"], found[-1] + 1, 0)
    return Snapshot(vectors, documents, frozenset(facts["deleted"]), end)


def write_snapshot(
    folder: Path, old: Snapshot, kept: np.ndarray, added: Sequence[Add], deleted: Iterable[str], end: Position
) -> None:
    """Write the snapshot of commit `end`: the rows of an old one that are kept, and the documents added since.

    Args:
        kept: bool (n,), by row of `old`.
        deleted: ids of the base's documents that are deleted.

    Raises:
        OSError: the disk is full.
    """
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with _durable(partial / "vectors.npy") as file:
        shape = int(kept.sum()) + len(added), old.vectors.shape[1]
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for start in range(0, len(kept), ROWS):
            rows = slice(start, start + ROWS)
            file.write(old.vectors[rows][kept[rows]].tobytes())
        for record in added:
            file.write(record.vector.tobytes())
    with _durable(partial / "documents.arrow") as file, pa.ipc.new_file(file, SCHEMA) as arrow:
        start = 0
        for batch in old.documents.to_batches():
            arrow.write_batch(batch.filter(pa.array(kept[start : start + batch.num_rows])))
            start += batch.num_rows
        for start in range(0, len(added), ROWS):
            documents = [record.document for record in added[start : start + ROWS]]
            arrow.write_batch(pa.RecordBatch.from_pylist(documents, SCHEMA))
    with _durable(partial / "snapshot.json") as file:
        file.write(json.dumps({"crc": end.crc, "deleted": sorted(deleted)}).encode())
    sync_folder(partial)
    partial.rename(snapshot_path(folder, end.sequence))
    sync_folder(folder)


@contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
