"""Frames: how commits lie in a log file, and how one that is cut short is told from one that is damaged.

    magic 4s | length u32 | CRC-32 of the previous frame u32 | CRC-32 u32 | payload      (all little-endian)

The CRC-32 covers the frame's offset in the file, the length, the previous CRC and the payload; a copy of a frame inside
a document is therefore not mistaken for a frame.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

MAGIC = b"UMWL"
MAX_PAYLOAD = 2**32 - 1
_HEADER = struct.Struct("<4sIII")
_COVERED = struct.Struct("<QII")
_CHUNK = 1 << 20


class Frame(NamedTuple):
    """What is at an offset of a log file; `payload` is None unless the frame there is complete."""

    header: bytes
    payload: bytes | None
    file_size: int  # after the header was read, and before the payload

    @property
    def fields(self) -> tuple[bytes, int, int, int]:
        """Magic, length of the payload, CRC of the previous frame, and CRC."""
        magic, length, previous, crc = _HEADER.unpack(self.header)
        return magic, length, previous, crc


def frame_of(payload: bytes, offset: int, previous: int) -> tuple[bytes, int]:
    """The frame that holds a payload at this offset, and its CRC."""
    crc = _crc(offset, previous, payload)
    return _HEADER.pack(MAGIC, len(payload), previous, crc) + payload, crc


def read_frame(handle: int, offset: int) -> Frame:
    """What is at this offset of an open file; the writer may be writing it."""
    header = read_at(handle, offset, _HEADER.size)
    size = os.fstat(handle).st_size
    if len(header) == _HEADER.size:
        magic, length, previous, crc = _HEADER.unpack(header)
        if magic == MAGIC and end_of(offset, length) <= size:
            payload = read_at(handle, offset + _HEADER.size, length)
            if len(payload) == length and _crc(offset, previous, payload) == crc:
                return Frame(header, payload, size)
    return Frame(header, None, size)


def is_frame(handle: int, offset: int, crc: int) -> bool:
    """Whether the frame with this CRC begins here; its payload is not read."""
    header = read_at(handle, offset, _HEADER.size)
    return len(header) == _HEADER.size and _HEADER.unpack(header)[3] == crc


def end_of(offset: int, length: int) -> int:
    """Where the frame at an offset ends, given the length of its payload."""
    return offset + _HEADER.size + length


def is_damaged(handle: int, offset: int, previous: int, frame: Frame) -> bool:
    """Whether an incomplete frame was complete once; otherwise it is being written, or a crash has cut it short.

    A frame is begun only when the one before it is complete and on disk. Damage is therefore known by a later frame. As
    clients choose the bytes of a payload, bytes that look like a frame are not enough: they must be where this frame
    ends or refer to its CRC, which no client knows. Only if even the header is lost does any complete frame count.

    The bytes that are read are at most a fixed multiple of those after the offset, whatever they are.

    Args:
        previous: CRC of the frame before.
        frame: what `read_frame` has found at the offset.
    """
    if len(frame.header) < _HEADER.size:
        return False
    magic, length, linked, crc = frame.fields
    follows, end = magic == MAGIC and linked == previous, end_of(offset, length)
    if follows and end < frame.file_size and read_at(handle, end, len(MAGIC)) == MAGIC:
        return True
    has_header = follows and end >= frame.file_size
    unchecked = frame.file_size - offset
    for at, length in _headers(handle, offset + 1, frame.file_size, crc if has_header else None):
        if end_of(at, length) <= frame.file_size:
            unchecked -= length
            if unchecked < 0 or read_frame(handle, at).payload is not None:
                return True  # also if there are too many candidates to tell: no commit is dropped on a guess
    return False


def _headers(handle: int, start: int, end: int, previous: int | None) -> Iterator[tuple[int, int]]:
    """Offset and length of what looks like a frame in [start, end): of any, or of those that name a previous CRC."""
    named = b".{4}" if previous is None else re.escape(struct.pack("<I", previous))
    pattern = re.compile(MAGIC + b"(?=(.{4})" + named + b".{4})", re.DOTALL)
    for first in range(start, end, _CHUNK):
        for match in pattern.finditer(read_at(handle, first, min(_CHUNK + _HEADER.size - 1, end - first))):
            yield first + match.start(), int.from_bytes(match[1], "little")


def read_at(handle: int, offset: int, length: int) -> bytes:
    """`length` bytes of an open file from an offset, or fewer at its end."""
    parts = []
    while length and (part := os.pread(handle, length, offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _crc(offset: int, previous: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_COVERED.pack(offset, len(payload), previous)))
