"""A cache that is bounded in bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

from cachetools import LRUCache

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteCache(Generic[Key, Value]):
    """Values by key; the least recently used are dropped beyond `max_bytes`. Threads may share one.

    Args:
        size: bytes of a value; one that exceeds `max_bytes` by itself is not kept.
    """

    def __init__(self, max_bytes: int, size: Callable[[Value], int]) -> None:
        self._values: LRUCache[Key, Value] = LRUCache(max_bytes, size)
        self._size, self._lock = size, Lock()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def nbytes(self) -> int:
        return int(self._values.currsize)

    def get(self, key: Key) -> Value | None:
        with self._lock:
            return self._values.get(key)

    def put(self, key: Key, value: Value) -> None:
        with self._lock:
            if key not in self._values and self._size(value) <= self._values.maxsize:
                self._values[key] = value

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
