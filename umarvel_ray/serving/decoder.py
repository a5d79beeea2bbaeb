"""Decodes untrusted pictures and videos in a process of its own; `decoders.py` starts it and speaks to it.

    python -m umarvel_ray.serving.decoder BYTES

Reads requests from standard input and writes replies to standard output until the input ends. What a decoder does with
hostile bytes (a crash, gigabytes, an endless loop) happens here, where it can be ended. Replies are msgpack, so nothing
that a picture could do to this process reaches its parent as code.
"""

from __future__ import annotations

import os
import pickle
import resource
import struct
import sys
from typing import Any, BinaryIO

import msgpack
import numpy as np

from umarvel_ray.errors import UserError
from umarvel_ray.items.pictures import Picture, read_pictures

LENGTH = struct.Struct("<Q")


def main() -> None:
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.nice(5)  # whoever answers requests comes first
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no reply
    while request := read_message(sys.stdin.buffer):
        write_message(replies, msgpack.packb(_reply(*pickle.loads(request))))


def _reply(item: dict[str, Any], form: Any, where: str) -> dict[str, Any]:
    try:
        return {"pictures": [_packed(picture) for picture in read_pictures(item, form, where)]}
    except UserError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"{where}: decoding takes too much memory"}


def _packed(picture: Picture) -> list[Any]:
    return [picture.pixels.tobytes(), len(picture.pixels), list(picture.grid), picture.key, picture.seconds]


def unpacked(fields: list[Any]) -> Picture:
    """A picture of a reply."""
    pixels, rows, grid, key, seconds = fields
    return Picture(
        np.frombuffer(pixels, np.uint8).reshape(rows, -1), tuple(grid), key, None if seconds is None else tuple(seconds)
    )


def read_message(file: BinaryIO) -> bytes:
    """The next message, or nothing at the end of the input."""
    header = file.read(LENGTH.size)
    return file.read(*LENGTH.unpack(header)) if len(header) == LENGTH.size else b""


def write_message(file: BinaryIO, message: bytes) -> None:
    file.write(LENGTH.pack(len(message)))
    file.write(message)
    file.flush()


if __name__ == "__main__":
    main()
