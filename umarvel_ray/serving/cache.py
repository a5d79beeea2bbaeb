"""Embeddings of items seen before, by content."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

from umarvel_ray.caches import ByteCache

ENTRY_BYTES = 300  # of a key, a tuple and the dict's own, beside the vector


class Embedded(NamedTuple):
    """A unit vector float32 (d,) and the number of tokens it was made from."""

    vector: np.ndarray
    tokens: int


def embedding_cache(max_bytes: int) -> ByteCache[bytes, Embedded]:
    """A cache by `content_key`; a key holds the model's identity, so an update leaves nothing stale."""
    return ByteCache(max_bytes, lambda embedded: embedded.vector.nbytes + ENTRY_BYTES)


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
