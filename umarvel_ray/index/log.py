"""A write-ahead log: one writer appends commits, each durable when `append` returns; readers follow.

A log is a folder of files `log-N`, where N is the number of the first commit in the file. The writer starts a new file
so that older ones can be compacted into a snapshot. Each commit is one frame (frames.py), so that a crash leaves all or
none of it.

An incomplete frame at the end of the newest file is a write in progress, or one that a crash interrupted and that was
never acknowledged: a reader waits for the rest. Anywhere else it is damage: every commit ends with an fsync, so nothing
valid can follow a torn frame. A machine crash may undo a commit that was not acknowledged yet but had been read: a
reader therefore looks whether the last one it has read is still there.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from umarvel_ray.errors import UserError
from umarvel_ray.files import sync_folder
from umarvel_ray.index.frames import MAX_PAYLOAD, end_of, frame_of, is_damaged, is_frame, read_at, read_frame
from umarvel_ray.index.names import numbered, numbers

RESTORE = "restore the folder from a backup, or start a new one and add the documents again"


class Damaged(UserError):
    """The log differs from what was written, or from what this reader has already read."""


class NoSpace(UserError):
    """The disk, the quota or the file is as full as it may be; nothing was changed."""


class Position(NamedTuple):
    """A position between two commits."""

    sequence: int = 0  # number of the last commit before it; the first commit is 1
    crc: int = 0  # of that commit
    file: int = 1  # number of the first commit in its file
    offset: int = 0  # bytes from the start of the file
    begin: int = 0  # likewise of that commit; equal to `offset` at the start of a file

    def at_start_of(self, file: int) -> Position:
        """The same position as the start of the next file."""
        return self._replace(file=file, offset=0, begin=0)


def log_path(folder: Path, first: int) -> Path:
    return folder / numbered("log", first)


def log_files(folder: Path) -> list[int]:
    """The number of the first commit in each file, ascending."""
    return numbers(folder, "log")


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
        file = LogFile(log_path(folder, position.file))
        for reached, payload in file.commits(position):
            yield reached, payload
            position = reached
        if following is None:
            return
        if position.sequence + 1 != following:
            ends = f"ends after commit {position.sequence}, but the next file begins with {following}"
            raise Damaged(f"{file.path}: {ends}; {RESTORE}")
        position = position.at_start_of(following)


class LogFile:
    """A log file open for reading; it remains readable when the writer removes it.

    Raises:
        Damaged: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise Damaged(f"{path}: missing; {RESTORE}") from None
        weakref.finalize(self, os.close, self._handle)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from an offset, or fewer at the end of the file. Thread-safe."""
        return read_at(self._handle, offset, length)

    def commits(self, position: Position) -> Iterator[tuple[Position, bytes]]:
        """The complete commits after a position in this file. Raises: see `read_log`."""
        sequence, crc, first, offset, begin = position
        if begin < offset and not is_frame(self._handle, begin, crc):
            raise Damaged(f"{self.path}, byte {begin}: not the commit that was read here before; {RESTORE}")
        while (frame := read_frame(self._handle, offset)).payload is not None:
            _, length, previous, frame_crc = frame.fields
            if previous != crc:
                raise Damaged(f"{self.path}, byte {offset}: this commit does not follow the previous one; {RESTORE}")
            sequence, crc, begin, offset = sequence + 1, frame_crc, offset, end_of(offset, length)
            yield Position(sequence, crc, first, offset, begin), frame.payload
        if is_damaged(self._handle, offset, crc, frame):
            raise Damaged(f"{self.path}, byte {offset}: damaged, and later commits follow; {RESTORE}")


class LogWriter:
    """Appends to the newest file, from the end position that `read_log` has found.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, folder: Path, end: Position) -> None:
        newest = max(log_files(folder), default=end.file)  # begun, but without a commit, if it is not the file of `end`
        self.position = end if newest == end.file else end.at_start_of(newest)
        self._folder = folder
        self._file = self._open()

    def append(self, payload: bytes) -> Position:
        """Write one commit; it is on disk when this returns.

        Raises:
            UserError: the commit exceeds 4 GiB or cannot be written; the log is unchanged.
        """
        if len(payload) > MAX_PAYLOAD:
            raise UserError(f"a commit of {len(payload):,} bytes is too large; add fewer documents at once")
        sequence, previous, first, offset, _ = self.position
        frame, crc = frame_of(payload, offset, previous)
        try:
            if os.fstat(self._file.fileno()).st_size > offset:  # of a commit that failed: nothing may follow a frame
                self._file.truncate(offset)
            self._file.seek(offset)
            remaining = memoryview(frame)
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
            os.fdatasync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(offset)
            raise _cannot_write(self._file.name, error) from None
        self.position = Position(sequence + 1, crc, first, offset + len(frame), offset)
        return self.position

    def roll(self) -> None:
        """Start a new file; the older ones are complete.

        Raises:
            UserError: the file cannot be created.
        """
        if self.position.offset:
            old, self.position = self.position, self.position.at_start_of(self.position.sequence + 1)
            try:
                file = self._open()
            except UserError:
                with suppress(OSError):  # a file that begins with the next commit must not be there without it
                    log_path(self._folder, self.position.file).unlink()
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
    kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else UserError
    return kind(f"cannot write {path}: {error.strerror}; free space or choose another folder")
