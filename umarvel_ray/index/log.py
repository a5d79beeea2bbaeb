"""A write-ahead log: one writer appends commits, each durable when `append` returns; readers follow.

A log is a folder of files `log-N`, N being the number of the first commit in the file; the writer begins a new file to
let the older ones be folded into a snapshot. A commit is one frame, so a crash leaves it whole or not at all:

    magic 4s | length u32 | CRC-32 of the frame before u32 | CRC-32 u32 | payload        (all little-endian)

The CRC-32 covers the frame's place in the file, the two numbers before it and the payload (a copy of a frame inside a
document is no frame). What is not whole at the end of the newest file is a write that a crash cut short; it was never
acknowledged. Anywhere else it is damage: one fsync ends each commit, so nothing valid can follow a torn frame. Each
frame repeats the CRC of the one before, so a reader finds out when a crash of the machine took back what it had read.
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
_MOST = 2**32 - 1
RESTORE = "restore the folder from a backup, or start a new one and add the documents again"


class Damaged(UserError):
    """The log is not what was written, or not what this reader has read of it before."""


class Position(NamedTuple):
    """A place between two commits."""

    sequence: int = 0  # number of the last commit before it; the first commit is 1
    crc: int = 0  # of that commit
    file: int = 1  # number of the file's first commit
    offset: int = 0  # bytes


class _Frame(NamedTuple):
    payload: bytes
    previous: int
    crc: int


def log_path(folder: Path, first: int) -> Path:
    return folder / f"log-{first:012d}"


def log_files(folder: Path) -> list[int]:
    """The number of the first commit of each file, ascending."""
    return sorted(int(name[4:]) for name in os.listdir(folder) if name.startswith("log-"))


def read_log(folder: Path, start: Position) -> Iterator[tuple[Position, bytes]]:
    """The whole commits after a position: the place behind each, and its payload.

    Raises:
        Damaged: a commit is broken or missing (its file may have been folded into a snapshot), or the log was cut
            before `start` and written anew.
    """
    position = start
    while True:
        # Listed before the file is read: if a newer one exists by then, this one is complete.
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
    """Appends to the newest file, from a position on that `read_log` has found to be its end.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, folder: Path, end: Position) -> None:
        self.position = end
        self._folder = folder
        self._file = self._open()

    def append(self, payload: bytes) -> Position:
        """Write one commit; it is on the disk when this returns.

        Raises:
            UserError: it could not be written, and the log is as before; or it is over 4 GiB.
        """
        if len(payload) > _MOST:
            raise UserError(f"a commit of {len(payload):,} bytes is too large; add fewer documents at once")
        sequence, previous, first, offset = self.position
        crc = _crc(offset, previous, payload)
        frame = _HEADER.pack(MAGIC, len(payload), previous, crc) + payload
        try:
            self._file.seek(offset)
            left = memoryview(frame)
            while left:
                left = left[self._file.write(left) :]
            os.fdatasync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # the next commit begins here in any case
                self._file.truncate(offset)
            raise _cannot_write(self._file.name, error) from None
        self.position = Position(sequence + 1, crc, first, offset + len(frame))
        return self.position

    def roll(self) -> None:
        """Begin a new file; the older ones are complete.

        Raises:
            UserError: it cannot be created.
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
            file.truncate(self.position.offset)  # what a crash has cut short
            os.fsync(file.fileno())  # a whole commit that was read here may not have been on the disk yet
            sync_folder(self._folder)
        except OSError as error:
            raise _cannot_write(path, error) from None
        return file


def _cannot_write(path: Path | str, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; free space or choose another folder")


def _crc(offset: int, previous: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_COVERED.pack(offset, len(payload), previous)))


def _frames(file: BinaryIO, path: Path, start: Position) -> Iterator[_Frame]:
    """The whole frames of one file from a position on."""
    size = os.fstat(file.fileno()).st_size
    offset, crc = start.offset, start.crc
    if size < offset:
        raise Damaged(f"{path}: shorter than it was; {RESTORE}")
    while frame := _frame_at(file, offset, size):
        if frame.previous != crc:
            raise Damaged(f"{path}, byte {offset}: a commit that does not follow the one before; {RESTORE}")
        yield frame
        offset, crc = offset + _HEADER.size + len(frame.payload), frame.crc
    if _frame_beyond(file, offset, size):
        raise Damaged(f"{path}, byte {offset}: damaged, and whole commits follow; {RESTORE}")


def _frame_at(file: BinaryIO, offset: int, size: int) -> _Frame | None:
    """The frame at an offset, if it is whole."""
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
    """Whether a whole frame stands anywhere behind an offset."""
    file.seek(offset)
    rest = file.read(size - offset)
    at = rest.find(MAGIC, 1)
    while at >= 0:
        if _frame_at(file, offset + at, size):
            return True
        at = rest.find(MAGIC, at + 1)
    return False
