"""A write-ahead log: one writer appends commits, each durable when `append` returns; readers follow.

A log is a folder of files `log-N`, where N is the number of the first commit in the file. The writer starts a new file
so that older ones can be compacted into a snapshot. Each commit is one frame, so that a crash leaves all or none of it:

    magic 4s | length u32 | CRC-32 of the previous frame u32 | CRC-32 u32 | payload      (all little-endian)

The CRC-32 covers the frame's offset in the file, the length, the previous CRC and the payload; a copy of a frame inside
a document is therefore not mistaken for a frame. An incomplete frame at the end of the newest file is a write that a
crash interrupted, and was never acknowledged. Anywhere else it is damage: every commit ends with an fsync, so nothing
valid can follow a torn frame. Each frame repeats the previous frame's CRC, so that a reader notices if a machine crash
has undone a commit it had already read.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from umarvel_ray.errors import UserError
from umarvel_ray.files import sync_folder

MAGIC = b"UMWL"
_HEADER = struct.Struct("<4sIII")
_COVERED = struct.Struct("<QII")
_MAX_PAYLOAD = 2**32 - 1
RESTORE = "restore the folder from a backup, or start a new one and add the documents again"


class Damaged(UserError):
    """The log differs from what was written, or from what this reader has already read."""


class Position(NamedTuple):
    """A position between two commits."""

    sequence: int = 0  # number of the last commit before it; the first commit is 1
    crc: int = 0  # of that commit
    file: int = 1  # number of the first commit in its file
    offset: int = 0  # bytes from the start of the file


class _Frame(NamedTuple):
    payload: bytes
    previous: int
    crc: int


def log_path(folder: Path, first: int) -> Path:
    return folder / f"log-{first:012d}"


def log_files(folder: Path) -> list[int]:
    """The number of the first commit in each file, ascending."""
    return sorted(int(name[4:]) for name in os.listdir(folder) if name.startswith("log-"))


def read_log(folder: Path, start: Position) -> Iterator[tuple[Position, bytes]]:
    """The complete commits after a position: the position after each one, and its payload.

    Raises:
        Damaged: a commit is broken or missing (its file may have been compacted into a snapshot), or the log was
            truncated before `start` and rewritten.
    """
    position = start
    while True:
        # List the files before reading this one: if a newer file exists by now, this one is complete.
        following = next((first for first in log_files(folder) if first > position.file), None)
        path = log_path(folder, position.file)
        try:
            file = path.open("rb")
        except FileNotFoundError:
            raise Damaged(f"{path}: missing; {RESTORE}") from None
        with file:
            for frame in _frames(file, path, position):
                offset = position.offset + _HEADER.size + len(frame.payload)
                position = Position(position.sequence + 1, frame.crc, position.file, offset)
                yield position, frame.payload
        if following is None:
            return
        if position.sequence + 1 != following:
            raise Damaged(
                f"{path}: ends after commit {position.sequence}, but the next file begins with {following}; {RESTORE}"
            )
        position = position._replace(file=following, offset=0)


class LogWriter:
    """Appends to the newest file, from the end position that `read_log` has found.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, folder: Path, end: Position) -> None:
        self.position = end
        self._folder = folder
        self._file = self._open()

    def append(self, payload: bytes) -> Position:
        """Write one commit; it is on disk when this returns.

        Raises:
            UserError: the commit exceeds 4 GiB or cannot be written; the log is unchanged.
        """
        if len(payload) > _MAX_PAYLOAD:
            raise UserError(f"a commit of {len(payload):,} bytes is too large; add fewer documents at once")
        sequence, previous, first, offset = self.position
        crc = _crc(offset, previous, payload)
        frame = _HEADER.pack(MAGIC, len(payload), previous, crc) + payload
        try:
            self._file.seek(offset)
            remaining = memoryview(frame)
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
            os.fdatasync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # the next commit overwrites it in any case
                self._file.truncate(offset)
            raise _cannot_write(self._file.name, error) from None
        self.position = Position(sequence + 1, crc, first, offset + len(frame))
        return self.position

    def roll(self) -> None:
        """Start a new file; the older ones are complete.

        Raises:
            UserError: the file cannot be created.
        """
        if self.position.offset:
            old, self.position = self.position, self.position._replace(file=self.position.sequence + 1, offset=0)
            try:
                file = self._open()
            except UserError:
                self.position = old
                raise
            self._file.close()
            self._file = file

    def close(self) -> None:
        self._file.close()

    def _open(self) -> BinaryIO:
        path = log_path(self._folder, self.position.file)
        try:
            path.touch()
            file = path.open("r+b", buffering=0)
            file.truncate(self.position.offset)  # drops a commit that a crash interrupted
            os.fsync(file.fileno())  # a complete commit that was read here may not be on disk yet
            sync_folder(self._folder)
        except OSError as error:
            raise _cannot_write(path, error) from None
        return file


def _cannot_write(path: Path | str, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; free space or choose another folder")


def _crc(offset: int, previous: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_COVERED.pack(offset, len(payload), previous)))


def _frames(file: BinaryIO, path: Path, start: Position) -> Iterator[_Frame]:
    """The complete frames of one file, starting at a position."""
    size = os.fstat(file.fileno()).st_size
    offset, crc = start.offset, start.crc
    if size < offset:
        raise Damaged(f"{path}: damaged, shorter than when it was last read; {RESTORE}")
    while frame := _frame_at(file, offset, size):
        if frame.previous != crc:
            raise Damaged(f"{path}, byte {offset}: this commit does not follow the previous one; {RESTORE}")
        yield frame
        offset, crc = offset + _HEADER.size + len(frame.payload), frame.crc
    if _frame_beyond(file, offset, size):
        raise Damaged(f"{path}, byte {offset}: damaged, and complete commits follow; {RESTORE}")


def _frame_at(file: BinaryIO, offset: int, size: int) -> _Frame | None:
    """The frame at an offset, if it is complete."""
    file.seek(offset)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    magic, length, previous, crc = _HEADER.unpack(header)
    if magic != MAGIC or offset + _HEADER.size + length > size:
        return None
    payload = file.read(length)
    return _Frame(payload, previous, crc) if _crc(offset, previous, payload) == crc else None


def _frame_beyond(file: BinaryIO, offset: int, size: int) -> bool:
    """Whether there is a complete frame anywhere after an offset."""
    file.seek(offset)
    rest = file.read(size - offset)
    found = rest.find(MAGIC, 1)
    while found >= 0:
        if _frame_at(file, offset + found, size):
            return True
        found = rest.find(MAGIC, found + 1)
    return False
