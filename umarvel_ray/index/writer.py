"""The one writer of a live index.

    writer = IndexWriter.open("runs/demo/live", identity, dimension, base_ids=corpus.index.ids)
    writer.commit([Add("a", vector, "text", "notes", text="a red car"), Delete("b")])    # → (1, [False, True])

The folder holds `index.json` (which model the vectors are from), the log (log.py) and snapshots (snapshot.py). Snapshot
N replaces the log up to commit N. To compact:

1. Start a new log file.
2. Write a snapshot of everything before it, which takes effect with one rename, so that a crash at any point loses
   nothing.
3. Remove what the previous snapshot had replaced. That snapshot, and the log after it, stay until the next compaction
   for replicas that are still reading them.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple

import numpy as np

from umarvel_ray.errors import UserError
from umarvel_ray.files import write_json
from umarvel_ray.index.log import RESTORE, Damaged, LogWriter, Position, log_files, log_path, read_log
from umarvel_ray.index.records import Add, Record, decode, encode
from umarvel_ray.index.snapshot import PARTIAL, Snapshot, open_snapshot, snapshot_path, snapshots, write_snapshot

COMPACT_BYTES = 256 * 2**20  # log size: what a new replica has to replay
FORMAT = 1
_RETRY_S = 0.05


class Locked(UserError):
    """Another writer holds the index."""


class Committed(NamedTuple):
    """A durable commit: its number, and for each record whether a document with that id existed before."""

    sequence: int
    existed: list[bool]


class IndexWriter:
    """Appends commits and compacts the log. Thread-safe."""

    def __init__(self, folder: Path, dimension: int, base_ids: Iterable[str], lock: BinaryIO) -> None:
        self._folder, self._dimension, self._lock_file = folder, dimension, lock
        self._base_ids = frozenset(base_ids)
        self._committing, self._compacting = Lock(), Lock()
        snapshot = open_snapshot(folder, dimension)
        self._ids = {*(self._base_ids - snapshot.deleted), *snapshot.documents["id"].to_pylist()}
        self._uncompacted = 0  # bytes of commits since the snapshot
        end = snapshot.end
        for position, payload in read_log(folder, snapshot.end):
            self._uncompacted += len(payload)
            for record, _ in decode(payload):
                self._note(record)
            end = position
        self._log = LogWriter(folder, end)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        identity: str,
        dimension: int,
        base_ids: Iterable[str],
        wait_s: float = 0.0,
    ) -> IndexWriter:
        """Create a live index or open an existing one; a commit that a crash interrupted is removed from the log.

        Args:
            identity: of the checkpoint (see `CheckpointRef`).
            base_ids: ids of the base's documents, if there is a base; their deletion must outlive the log.
            wait_s: how long to wait for another writer to exit.

        Raises:
            Locked: another writer.
            UserError: an index of another model, a damaged log, or a folder that cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_index(folder, identity, dimension)  # an index of another model is an error whoever holds it
            lock = _locked(folder, wait_s)
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
            try:
                if not check_index(folder, identity, dimension):
                    _create(folder, identity, dimension)
                return cls(folder, dimension, base_ids, lock)
            except BaseException:
                lock.close()
                raise
        except OSError as error:
            raise UserError(
                f"cannot write to {folder}: {error.strerror}; free space or choose another folder"
            ) from None

    @property
    def sequence(self) -> int:
        """Number of the last commit."""
        return self._log.position.sequence

    @property
    def needs_compaction(self) -> bool:
        """Whether the log has grown beyond `COMPACT_BYTES`."""
        return self._uncompacted > COMPACT_BYTES

    def __len__(self) -> int:
        """Number of documents, including the base's."""
        return len(self._ids)

    def commit(self, records: Sequence[Record]) -> Committed:
        """Apply additions, replacements and deletions in the given order, all or none; durable when this returns.

        Raises:
            UserError: an invalid record, or a full disk; nothing is changed.
        """
        payload = encode(records, self._dimension)
        with self._committing:
            if records:
                self._log.append(payload)
                self._uncompacted += len(payload)
            return Committed(self.sequence, [self._note(record) for record in records])

    def compact(self) -> int:
        """Compact the log into a snapshot while commits continue; returns the last commit in the snapshot.

        Raises:
            UserError: the disk is full; the log is unchanged.
        """
        with self._compacting:
            try:
                return self._compact()
            except OSError as error:
                raise UserError(f"cannot compact {self._folder}: {error.strerror}; free space") from None

    def close(self) -> None:
        """Release the folder to another writer."""
        self._log.close()
        self._lock_file.close()

    def _note(self, record: Record) -> bool:
        existed = record.id in self._ids
        (self._ids.add if isinstance(record, Add) else self._ids.discard)(record.id)
        return existed

    def _compact(self) -> int:
        old = open_snapshot(self._folder, self._dimension)
        with self._committing:
            end, size = self._log.position, self._uncompacted
            if end.sequence == old.end.sequence:
                return end.sequence
            self._log.roll()  # 1.
        self._write_snapshot(old, end)  # 2.
        with self._committing:
            self._uncompacted -= size
        self._remove_before(old.end)  # 3.
        return end.sequence

    def _write_snapshot(self, old: Snapshot, end: Position) -> None:
        last: dict[str, tuple[Position, int]] = {}  # record of each id
        added: set[str] = set()
        for position, number, record in self._records(old.end, end):
            last[record.id] = position, number
            (added.add if isinstance(record, Add) else added.discard)(record.id)
        deleted = (last.keys() - added) & self._base_ids
        kept = np.array([id_ not in last for id_ in old.documents["id"].to_pylist()], bool)
        documents = (
            record
            for position, number, record in self._records(old.end, end)
            if isinstance(record, Add) and last[record.id] == (position, number)
        )
        write_snapshot(self._folder, old, kept, documents, len(added), old.deleted | deleted, end)

    def _records(self, start: Position, end: Position) -> Iterator[tuple[Position, int, Record]]:
        """Each record between two positions, with its commit and its number there."""
        for position, payload in read_log(self._folder, start):
            yield from ((position, number, record) for number, (record, _) in enumerate(decode(payload)))
            if position.sequence == end.sequence:
                return

    def _remove_before(self, end: Position) -> None:
        """Remove the snapshots and log files that the snapshot of `end` replaces."""
        for sequence in snapshots(self._folder):
            if sequence < end.sequence:
                shutil.rmtree(snapshot_path(self._folder, sequence))
        for first in log_files(self._folder):
            if first <= end.sequence:
                log_path(self._folder, first).unlink()


def check_index(folder: Path, identity: str, dimension: int) -> bool:
    """Whether the folder already holds a live index.

    Raises:
        UserError: it does, but from another model or in another format.
    """
    path = folder / "index.json"
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text())
        format_, theirs, size = found["format"], found["identity"], found["dimension"]
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{path}: not readable; {RESTORE}") from None
    if format_ != FORMAT:
        raise UserError(f"{folder}: the live index has format {format_}, not {FORMAT}; start a new folder")
    if (theirs, size) != (identity, dimension):
        raise UserError(
            f"{folder}: its documents were embedded with another model ({theirs[:12]}, dimension {size}, not "
            f"{identity[:12]}, {dimension}); serve that model, or choose another folder and add the documents again"
        )
    return True


def _create(folder: Path, identity: str, dimension: int) -> None:
    log_path(folder, 1).touch()  # before index.json, so that a replica that sees index.json can follow
    facts = {"format": FORMAT, "identity": identity, "dimension": dimension}
    write_json(folder / "index.json", facts, durable=True)


def _locked(folder: Path, wait_s: float) -> BinaryIO:
    """Lock the folder; the operating system releases the lock when this process exits, however it exits."""
    file = (folder / "lock").open("ab")
    deadline = time.monotonic() + wait_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        if time.monotonic() >= deadline:
            file.close()
            raise Locked(f"{folder}: another writer holds this index; stop it, or wait until it exits")
        time.sleep(_RETRY_S)
