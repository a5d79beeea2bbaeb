"""A cache with a limit in bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

from cachetools import LRUCache

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteCache(Generic[Key, Value]):
    """A thread-safe cache that evicts the least recently used values beyond `max_bytes`.

    Args:
        size: bytes of a value; a value larger than `max_bytes` is not kept.
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
        """The value, which becomes the most recently used; None if it is not cached."""
        with self._lock:
            return self._values.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Add a value; a key that is cached already keeps its value and its place."""
        with self._lock:
            if key not in self._values and self._size(value) <= self._values.maxsize:
                self._values[key] = value

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
