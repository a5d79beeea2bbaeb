"""Lists of different lengths as two arrays: positives, exclusions or negatives of many queries."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa


class Ragged(NamedTuple):
    """n lists of integers; list i is `values[offsets[i] : offsets[i + 1]]`.

    Attributes:
        offsets: int64 (n + 1,), ascending from 0.
        values: int64 (m,).
    """

    offsets: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """From Python lists."""
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        values = [np.asarray(list_, np.int64) for list_ in lists]
        return cls(offsets, np.concatenate([np.empty(0, np.int64), *values]))

    @classmethod
    def of_counts(cls, counts: np.ndarray, values: np.ndarray) -> Ragged:
        """From the length of each list and all values in order."""
        return cls(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), np.asarray(values, np.int64))

    @classmethod
    def gathered(cls, parts: deque[tuple[np.ndarray, Ragged]], n: int) -> Ragged:
        """n lists from parts (at, lists), whose list i is number `at[i]`; the others are empty.

        The parts are taken out of the queue one by one, so that they and the result are not in memory together.
        """
        counts = np.zeros(n, np.int64)
        for at, lists in parts:
            counts[at] = lists.counts
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        values = np.empty(offsets[-1], np.int64)
        while parts:
            at, lists = parts.popleft()
            moved = np.repeat(offsets[at] - lists.offsets[:-1], lists.counts)
            values[moved + np.arange(len(moved))] = lists.values
        return cls(offsets, values)

    @classmethod
    def of_arrow(cls, column: pa.ChunkedArray | pa.Array) -> Ragged:
        """From a list column without nulls."""
        column = _one_chunk(column)
        offsets = column.offsets.to_numpy().astype(np.int64)
        return cls(offsets - offsets[0], flat(column).astype(np.int64, copy=False))

    def to_arrow(self) -> pa.LargeListArray:
        """As an Arrow column, large_list<int64>."""
        return self.like(self.values)

    def like(self, values: np.ndarray) -> pa.LargeListArray:
        """Other values (m,) in lists of the same lengths, as an Arrow column."""
        return pa.LargeListArray.from_arrays(pa.array(self.offsets), pa.array(values))

    @property
    def n(self) -> int:
        """The number of lists. (`len` of a named tuple is its number of fields.)"""
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """int64 (n,): the length of each list."""
        return cast(np.ndarray, np.diff(self.offsets))

    @property
    def owners(self) -> np.ndarray:
        """int64 (m,): the list that each value belongs to."""
        return np.repeat(np.arange(self.n), self.counts)

    def at(self, index: int) -> np.ndarray:
        """One list."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def lists(self) -> Iterator[np.ndarray]:
        """All lists in order."""
        return (self.at(index) for index in range(self.n))

    def take(self, indices: np.ndarray) -> Ragged:
        """The lists with these numbers, in this order."""
        return self.spans(self.offsets[:-1][indices], self.offsets[1:][indices])

    def spans(self, first: np.ndarray, last: np.ndarray) -> Ragged:
        """New lists from spans of `values`: list i is `values[first[i] : last[i]]`."""
        counts = last - first
        ends = np.cumsum(counts)
        inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
        return Ragged.of_counts(counts, self.values[np.repeat(first, counts) + inside])

    def placed(self, at: np.ndarray, n: int) -> Ragged:
        """n lists: number `at[i]` is list i, the others are empty."""
        return Ragged.gathered(deque([(at, self)]), n)

    def keep(self, mask: np.ndarray) -> Ragged:
        """Only the values where `mask`, bool (m,), holds."""
        kept = np.concatenate([[0], np.cumsum(mask)])
        return Ragged(kept[self.offsets].astype(np.int64), self.values[mask])

    def contains_pairs(self, owners: np.ndarray, values: np.ndarray) -> np.ndarray:
        """bool, shaped like `values`: whether list `owners[…]` contains `values[…]`; never, if that is negative.

        Args:
            owners: shaped like `values`, or broadcast to it.
        """
        valid = self.values >= 0
        if not valid.any() or not values.size:
            return np.zeros(values.shape, bool)
        span = int(max(self.values.max(), values.max())) + 1
        _, found = find(np.sort((self.owners * span + self.values)[valid]), owners * span + np.maximum(values, 0))
        return cast(np.ndarray, found & (values >= 0))


def find(ascending: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of each value that is asked for in ascending values, and whether it is there at all."""
    if not len(ascending):
        return np.zeros(asked.shape, np.int64), np.zeros(asked.shape, bool)
    places = np.minimum(np.searchsorted(ascending, asked), len(ascending) - 1)
    return places, ascending[places] == asked


def flat(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """All values of a list column without nulls, in order."""
    values: np.ndarray = _one_chunk(column).flatten().to_numpy(zero_copy_only=False)
    return values


def _one_chunk(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return column


class RowsByKey:
    """Rows that can be looked up by a key that several of them may have.

    Args:
        keys, rows: (m,), aligned.
    """

    def __init__(self, keys: np.ndarray, rows: np.ndarray) -> None:
        order = np.argsort(keys, kind="stable")
        self._keys, self._rows = keys[order], rows[order]

    def having(self, keys: np.ndarray) -> Ragged:
        """For each key (n,), the rows that have it, in the order given."""
        first, last = (np.searchsorted(self._keys, keys, side) for side in ("left", "right"))
        return Ragged(np.array([0, len(self._rows)]), self._rows).spans(first, last)
