"""What was read so far: every distinct item once, in a file, and who asks for whom, in memory as numbers."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from umarvel_ray.importing.prepare import Prepared, Ready
from umarvel_ray.importing.record import Fault
from umarvel_ray.importing.tasks import BOTH, DEFAULTS, IMAGE, MODALITIES, TEXT, shape_of

BATCH_BYTES, BATCH_ROWS = 8 << 20, 1024  # of items, before they are written
STORED = pa.schema(
    [("id", pa.string()), ("key", pa.binary()), ("text", pa.string()), ("images", pa.list_(pa.large_binary())),
     ("modality", pa.int8())]
)  # fmt: skip


class Links(NamedTuple):
    """Who asks for whom: n items, m queries, c contents.

    A content is a picture by its pixels, or a text that stands alone, by its words. Words beside a picture ("the same
    in blue") say little without it, and recur where the pictures differ.

    Attributes:
        modality: int8 (n,), a number in MODALITIES.
        contents: int64 (k, 2), an item and one of its contents.
        digests: uint64 (c,), of contents.
        asked: int64 (m,), the item that a query is.
        shape: int64 (m,), its task.
        instruction: int64 (m,), a number in `instructions`.
        positives, negatives: int64 (·, 2), a query and an item.
    """

    modality: np.ndarray
    contents: np.ndarray
    digests: np.ndarray
    asked: np.ndarray
    shape: np.ndarray
    instruction: np.ndarray
    instructions: list[str]
    positives: np.ndarray
    negatives: np.ndarray


@dataclass(frozen=True, slots=True)
class _Stored:
    number: int
    modality: str


class Store:
    """Collects records; a context manager that closes the file of items.

    Args:
        path: the file to write, an Arrow stream of STORED.
        instructions: by task, in place of the rows' own and of the defaults.
    """

    def __init__(self, path: Path, instructions: Mapping[int, str]) -> None:
        self._writer = pa.ipc.new_stream(str(path), STORED)
        self._waiting: list[dict[str, Any]] = []
        self._bytes = 0
        self._given = instructions
        self._names: set[str] = set()
        self._items: dict[bytes, _Stored] = {}
        self._contents: dict[bytes, int] = {}
        self._queries: dict[tuple[int, int, int], int] = {}
        self._instructions: dict[str, int] = {}
        self._item_contents, self._positives, self._negatives = array("q"), array("q"), array("q")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()

    def add(self, record: Prepared) -> tuple[list[int], list[Fault]]:
        """Add a record.

        Returns:
            The queries that it is part of, none if it is of no use, and what is wrong with it or with single items.
        """
        sides = (record.queries, record.positives, record.negatives)
        faults = [item for items in sides for item in items if isinstance(item, Fault)]
        queries, positives, negatives = ([item for item in items if isinstance(item, Ready)] for items in sides)
        if not queries or not positives:
            return [], faults or [Fault("no positive" if queries else "no query")]
        asking, found, others = (list(map(self._stored, items)) for items in (queries, positives, negatives))
        links = [self._link(query, found, others, record.instruction) for query in asking]
        if record.both_ways:
            links += [self._link(positive, asking, [], record.instruction) for positive in found]
        made = [number for numbers in links for number in numbers]
        return made, faults if made else [*faults, Fault("the positive is the query itself")]

    def links(self) -> Links:
        """Everything but the items, once all records were added."""
        self._flush()
        contents = np.frombuffer(b"".join(self._contents), ">u8").astype(np.uint64)
        keys = np.array(list(self._queries), np.int64).reshape(-1, 3)
        modality = np.array([MODALITIES.index(item.modality) for item in self._items.values()], np.int8)
        pairs = (self._item_contents, self._positives, self._negatives)
        item_contents, positives, negatives = (np.array(values, np.int64).reshape(-1, 2) for values in pairs)
        asked, shape, instruction = keys.T
        names = list(self._instructions)
        return Links(modality, item_contents, contents, asked, shape, instruction, names, positives, negatives)

    def _stored(self, item: Ready) -> _Stored:
        """The item's number; one that is new is written."""
        if known := self._items.get(item.digest):
            return known
        modality = (BOTH if item.text else IMAGE) if item.images else TEXT
        stored = self._items[item.digest] = _Stored(len(self._items), modality)
        for key in item.contents:
            content = self._contents.setdefault(key[:8], len(self._contents))
            self._item_contents.extend((stored.number, content))
        self._waiting.append(
            {
                "id": self._id(item),
                "key": item.digest[:8],
                "text": item.text or None,
                "images": item.images,
                "modality": MODALITIES.index(modality),
            }
        )
        self._bytes += len(item.text) + sum(map(len, item.images))
        if self._bytes >= BATCH_BYTES or len(self._waiting) == BATCH_ROWS:
            self._flush()
        return stored

    def _id(self, item: Ready) -> str:
        """The item's name, without spaces, which separate the columns of TREC's files; else a digest."""
        name = re.sub(r"\s+", "_", item.name)
        if not name or name in self._names:
            return item.digest[:8].hex()
        self._names.add(name)
        return name

    def _link(self, query: _Stored, positives: list[_Stored], negatives: list[_Stored], own: str | None) -> list[int]:
        """Let a query ask for its positives, in a task of its own for each of their modalities."""
        found: dict[int, int] = {}
        for positive in positives:
            if positive == query:
                continue
            shape = shape_of(query.modality, positive.modality)
            if shape not in found:
                text = self._given.get(shape, DEFAULTS[shape] if own is None else own)
                instruction = self._instructions.setdefault(text, len(self._instructions))
                key = (query.number, shape, instruction)
                found[shape] = self._queries.setdefault(key, len(self._queries))
            self._positives.extend((found[shape], positive.number))
        for negative in negatives:
            for number in found.values():
                self._negatives.extend((number, negative.number))
        return list(found.values())

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._waiting, schema=STORED))
        self._waiting, self._bytes = [], 0


def stored_items(path: Path) -> Iterator[pa.RecordBatch]:
    """What a `Store` has written, in the order of the items' numbers."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        yield from reader
