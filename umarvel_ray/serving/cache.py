"""An in-memory cache of embeddings, by the content of the item."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

from umarvel_ray.caches import ByteCache

ENTRY_BYTES = 300  # per entry beside the vector: the key, the tuple and the dict's overhead


class Embedded(NamedTuple):
    """A unit vector, float32 (d,), and the number of tokens it was computed from."""

    vector: np.ndarray
    tokens: int


def embedding_cache(max_bytes: int) -> ByteCache[bytes, Embedded]:
    """A cache keyed by `content_key`, which includes the model's identity: a model update leaves nothing stale."""
    return ByteCache(max_bytes, lambda embedded: embedded.vector.nbytes + ENTRY_BYTES)


def content_key(identity: str, side: str, item: dict[str, Any]) -> bytes:
    """A digest of everything that determines an item's vector: the model, the side, and every byte of the item."""
    digest = hashlib.sha256(f"{identity} {side}".encode())
    for name in sorted(item):
        values = item[name] if isinstance(item[name], list) else [item[name]]
        for value in values:
            content = value if isinstance(value, bytes) else value.encode()
            digest.update(f" {name} {len(content)} ".encode())
            digest.update(content)
    return digest.digest()
