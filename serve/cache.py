"""Embeddings of items seen before, by content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

ENTRY_BYTES = 300  # of a key, a tuple and the dict's own, beside the vector


class Embedded(NamedTuple):
    """A unit vector float32 (d,) and the number of tokens it was made from."""

    vector: np.ndarray
    tokens: int


class EmbeddingCache:
    """The least recently used make room; a key holds the model's identity, so an update leaves nothing stale."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity, self._bytes = capacity_bytes, 0
        self._entries: OrderedDict[bytes, Embedded] = OrderedDict()

    def get(self, key: bytes) -> Embedded | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: bytes, embedded: Embedded) -> None:
        if key in self._entries or _size(embedded) > self._capacity:
            return
        self._entries[key] = embedded
        self._bytes += _size(embedded)
        while self._bytes > self._capacity:
            self._bytes -= _size(self._entries.popitem(last=False)[1])


def content_key(identity: str, side: str, item: dict[str, Any]) -> bytes:
    """A digest of what decides an item's vector: the model, the side, and every byte of the item."""
    digest = hashlib.sha256(f"{identity} {side}".encode())
    for name in sorted(item):
        values = item[name] if isinstance(item[name], list) else [item[name]]
        for value in values:
            content = value if isinstance(value, bytes) else value.encode()
            digest.update(f" {name} {len(content)} ".encode())
            digest.update(content)
    return digest.digest()


def _size(embedded: Embedded) -> int:
    return embedded.vector.nbytes + ENTRY_BYTES
