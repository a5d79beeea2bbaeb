"""The one writer of a live index.

    writer = IndexWriter.open("runs/demo/live", identity, dimension, base_ids=corpus.index.ids)
    writer.commit([Add("a", vector, "text", "notes", text="a red car"), Delete("b")])    # → (1, [False, True])

The folder holds `index.json` (whose vectors these are), the log (log.py) and snapshots (snapshot.py). A snapshot named
N stands for the log up to commit N: `compact` begins a new log file, folds what is before it into a snapshot, and its
rename is the one moment that counts, so a crash anywhere loses nothing. The snapshot before and the log after it stay
until the next time, for replicas that are still reading them.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple

import numpy as np

from umarvel_ray.errors import UserError
from umarvel_ray.files import write_json
from umarvel_ray.index.log import RESTORE, Damaged, LogWriter, Position, log_files, log_path, read_log
from umarvel_ray.index.records import Add, Delete, Record, decode, encode
from umarvel_ray.index.snapshot import PARTIAL, Snapshot, open_snapshot, snapshot_path, snapshots, write_snapshot

COMPACT_BYTES = 256 * 2**20  # of log: what a starting replica replays, and what it keeps in memory
FORMAT = 1
_RETRY_S = 0.05


class Committed(NamedTuple):
    """A commit on the disk: its number, and per record whether a document of that id was there before."""

    sequence: int
    existed: list[bool]


class IndexWriter:
    """Appends commits and folds the log. Threads may call it at the same time."""

    def __init__(self, folder: Path, dimension: int, base_ids: Iterable[str], lock: BinaryIO) -> None:
        self._folder, self._dimension, self._lock_file = folder, dimension, lock
        self._base_ids = frozenset(base_ids)
        self._committing, self._compacting = Lock(), Lock()
        snapshot = open_snapshot(folder, dimension)
        self._ids = {*(self._base_ids - snapshot.deleted), *snapshot.documents["id"].to_pylist()}
        end = snapshot.end
        for position, payload in read_log(folder, end):
            for record in decode(payload):
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
        """Create a live index or go on with one; a commit that a crash cut short is taken off the log's end.

        Args:
            identity: the checkpoint's (see `CheckpointRef`).
            base_ids: ids of the documents that the base holds, if any: a deletion of these must outlive the log.
            wait_s: how long to wait for another writer to end.

        Raises:
            UserError: another writer, another model's index, a damaged log, a folder that cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
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
        """Whether the log has become longer than `COMPACT_BYTES`."""
        done = max(snapshots(self._folder), default=0)
        files = [log_path(self._folder, first) for first in log_files(self._folder) if first > done]
        return sum(path.stat().st_size for path in files) > COMPACT_BYTES

    def __len__(self) -> int:
        """Documents, the base's among them."""
        return len(self._ids)

    def commit(self, records: Sequence[Record]) -> Committed:
        """Add, replace and delete documents, in this order, all or none; durable when this returns.

        Raises:
            UserError: a record that cannot be used, or the disk is full; nothing is changed then.
        """
        payload = encode(records, self._dimension)
        with self._committing:
            if records:
                self._log.append(payload)
            return Committed(self.sequence, [self._note(record) for record in records])

    def compact(self) -> int:
        """Fold the log into a snapshot, while commits go on; returns the commit up to which it is folded.

        Raises:
            UserError: the disk is full; the log is as long as before.
        """
        with self._compacting:
            old = open_snapshot(self._folder, self._dimension)
            with self._committing:
                end = self._log.position
                if end.sequence > old.end.sequence:
                    self._log.roll()
            if end.sequence > old.end.sequence:
                try:
                    self._fold(old, end)
                    self._remove_before(old.end)
                except OSError as error:
                    raise UserError(f"cannot compact {self._folder}: {error.strerror}; free space") from None
            return end.sequence

    def close(self) -> None:
        """Let another writer begin."""
        self._log.close()
        self._lock_file.close()

    def _note(self, record: Record) -> bool:
        existed = record.id in self._ids
        (self._ids.add if isinstance(record, Add) else self._ids.discard)(record.id)
        return existed

    def _fold(self, old: Snapshot, end: Position) -> None:
        last: dict[str, Record] = {}
        for position, payload in read_log(self._folder, old.end):
            last |= {record.id: record for record in decode(payload)}
            if position.sequence == end.sequence:
                break
        kept = np.array([id_ not in last for id_ in old.documents["id"].to_pylist()], bool)
        added = [record for record in last.values() if isinstance(record, Add)]
        deleted = {record.id for record in last.values() if isinstance(record, Delete)} & self._base_ids
        write_snapshot(self._folder, old, kept, added, old.deleted | deleted, end)

    def _remove_before(self, end: Position) -> None:
        """Remove what nobody needs who has the snapshot of `end`."""
        for sequence in snapshots(self._folder):
            if sequence < end.sequence:
                shutil.rmtree(snapshot_path(self._folder, sequence))
        for first in log_files(self._folder):
            if first <= end.sequence:
                log_path(self._folder, first).unlink()


def check_index(folder: Path, identity: str, dimension: int) -> bool:
    """Whether the folder holds a live index yet.

    Raises:
        UserError: it does, but of another model or another version of this package.
    """
    path = folder / "index.json"
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise Damaged(f"{path}: not readable; {RESTORE}") from None
    if found["format"] != FORMAT:
        raise UserError(f"{folder}: a live index of format {found['format']}, not {FORMAT}; start a new folder")
    if (found["identity"], found["dimension"]) != (identity, dimension):
        raise UserError(
            f"{folder}: its documents were embedded with another model ({found['identity'][:12]}, dimension "
            f"{found['dimension']}, not {identity[:12]}, {dimension}); serve that model, or choose another folder and "
            "add the documents again"
        )
    return True


def _create(folder: Path, identity: str, dimension: int) -> None:
    log_path(folder, 1).touch()  # before index.json: a replica that sees that one can follow
    facts = {"format": FORMAT, "identity": identity, "dimension": dimension}
    write_json(folder / "index.json", facts, durable=True)


def _locked(folder: Path, wait_s: float) -> BinaryIO:
    """The folder's lock; the system lets go of it when this process ends, however it ends."""
    file = (folder / "lock").open("ab")
    deadline = time.monotonic() + wait_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        if time.monotonic() >= deadline:
            file.close()
            raise UserError(f"{folder}: another writer holds this index; stop it, or wait until it has ended")
        time.sleep(_RETRY_S)
