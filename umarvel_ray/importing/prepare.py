"""Items as they are stored: pictures opened, and digests of what is shown and said. In threads, a few rows ahead."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from umarvel_ray.importing.record import BadRow, Fault, Item, Picture, Record, Row
from umarvel_ray.items.images import BadImage, open_image, open_stream
from umarvel_ray.items.item import readable

MOST_THREADS = 4  # whose pictures are in memory
AHEAD = 2  # rows for each thread


class Ready(NamedTuple):
    """An item that can be stored.

    Attributes:
        images: encoded.
        digest: of the item: equal for the same text with the same pixels.
        contents: what it may share with others: a digest of each picture's pixels, or else of its words.
    """

    text: str
    images: list[bytes]
    digest: bytes
    contents: list[bytes]
    name: str


class Prepared(NamedTuple):
    """A `Record` whose items are ready, or unusable."""

    queries: list[Ready | Fault]
    positives: list[Ready | Fault]
    negatives: list[Ready | Fault]
    instruction: str | None
    both_ways: bool


def prepared_ahead(rows: Iterator[Row]) -> Iterator[tuple[Row, Prepared | Fault]]:
    """Prepare rows; they come in order."""
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    waiting: deque[tuple[Row, Future[Prepared | Fault]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for row in rows:
            if not waiting and not _has_pictures(row.found):
                yield row, prepared(row.found)  # sooner done than handed over
                continue
            waiting.append((row, pool.submit(prepared, row.found)))
            if len(waiting) == AHEAD * threads:
                first, done = waiting.popleft()
                yield first, done.result()
        while waiting:
            first, done = waiting.popleft()
            yield first, done.result()


def prepared(found: Record | Fault) -> Prepared | Fault:
    """Open a record's pictures and digest its items; a fault stays one."""
    if isinstance(found, Fault):
        return found
    sides = (found.queries, found.positives, found.negatives)
    queries, positives, negatives = ([_ready(item) for item in items] for items in sides)
    return Prepared(queries, positives, negatives, found.instruction, found.both_ways)


def opened_picture(picture: Picture) -> tuple[bytes, bytes]:
    """A picture's encoded bytes, and the digest of its pixels, which is the same however they are encoded.

    Raises:
        BadRow: it is not there or cannot be opened.
    """
    if isinstance(picture, Path) and not os.path.isfile(picture):  # of a name that is too long, `Path.is_file` raises
        raise BadRow("picture not found", str(picture))
    try:
        content = picture if isinstance(picture, bytes) else open_stream(picture, "picture").getvalue()
        pixels = open_image(content, "picture")
    except (BadImage, OSError) as error:
        raise BadRow("unreadable picture", str(error).removeprefix("picture: ")) from None
    return content, _digest(repr(pixels.size).encode(), pixels.tobytes())


def _ready(item: Item) -> Ready | Fault:
    text = readable(item.text).strip()
    if not text and not item.pictures:
        return Fault("empty text")
    try:
        opened = [opened_picture(picture) for picture in item.pictures]
    except BadRow as error:
        return error.fault
    pixels = [digest for _, digest in opened]
    digest = _digest(text.encode(), *pixels)
    return Ready(
        text, [content for content, _ in opened], digest, pixels or [_digest(_words(text))], readable(item.name)
    )


def _has_pictures(found: Record | Fault) -> bool:
    if isinstance(found, Fault):
        return False
    return any(item.pictures for items in (found.queries, found.positives, found.negatives) for item in items)


def _words(text: str) -> bytes:
    """A text without what does not change what it says: case, spaces, and how its letters are composed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode()


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.digest()
