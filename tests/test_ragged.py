"""Lists of different lengths as two arrays, against Python lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umarvel_ray.ragged import Ragged, RowsByKey, flat

LISTS = st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=8)


def as_lists(ragged: Ragged) -> list[list[int]]:
    assert ragged.offsets.dtype == ragged.values.dtype == np.int64
    assert ragged.offsets[0] == 0
    assert ragged.offsets[-1] == len(ragged.values)
    return [own.tolist() for own in ragged.lists()]


@given(LISTS)
def test_lists_come_back(lists):
    ragged = Ragged.of(lists)
    assert as_lists(ragged) == lists
    assert ragged.n == len(lists)
    assert ragged.counts.tolist() == [len(own) for own in lists]
    assert ragged.owners.tolist() == [i for i, own in enumerate(lists) for _ in own]
    assert [ragged.at(i).tolist() for i in range(len(lists))] == lists
    assert as_lists(Ragged.of_counts(ragged.counts, ragged.values)) == lists


@given(LISTS, st.integers(0, 3), st.sampled_from([pa.list_, pa.large_list]))
def test_lists_pass_through_arrow(lists, skip, kind):
    column = pa.array(lists, kind(pa.int64()))
    assert as_lists(Ragged.of_arrow(column.slice(skip))) == lists[skip:]
    assert flat(column.slice(skip)).tolist() == [value for own in lists[skip:] for value in own]
    chunks = pa.chunked_array([column.slice(0, skip), column.slice(skip)])
    assert as_lists(Ragged.of_arrow(chunks)) == lists
    assert as_lists(Ragged.of_arrow(Ragged.of(lists).to_arrow())) == lists
    assert Ragged.of(lists).to_arrow().to_pylist() == lists


@given(LISTS.filter(len), st.data())
def test_lists_are_taken_and_kept(lists, data):
    ragged = Ragged.of(lists)
    chosen = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=9))
    assert as_lists(ragged.take(np.array(chosen, np.int64))) == [lists[i] for i in chosen]
    odd = ragged.values % 2 == 1
    assert as_lists(ragged.keep(odd)) == [[value for value in own if value % 2] for own in lists]
    at = data.draw(st.permutations(range(len(lists) + 3)))[: len(lists)]
    placed = as_lists(ragged.placed(np.array(at), len(lists) + 3))
    assert placed == [lists[at.index(i)] if i in at else [] for i in range(len(lists) + 3)]


@given(LISTS.filter(len), st.data())
def test_membership(lists, data):
    """A negative number stands for nothing, and is nowhere."""
    below = data.draw(st.integers(-30, -1))
    lists = [[*own, below] if len(own) == 2 else own for own in lists]
    ragged = Ragged.of(lists)
    width = data.draw(st.integers(0, 4))
    values = st.lists(st.integers(-20, 12), min_size=width, max_size=width)
    asked = np.array([data.draw(values) for _ in lists], np.int64).reshape(len(lists), width)
    expected = [[value in own and value >= 0 for value in row] for own, row in zip(lists, asked.tolist(), strict=True)]
    rows = np.arange(len(lists))[:, None]
    assert ragged.contains_pairs(rows, asked).tolist() == expected
    owners = np.repeat(np.arange(len(lists)), width)[::-1]
    found = ragged.contains_pairs(owners, asked.reshape(-1))
    assert found.tolist() == [
        value in lists[owner] and value >= 0 for owner, value in zip(owners, asked.reshape(-1).tolist(), strict=True)
    ]


def test_membership_at_the_size_of_mbeir():
    """Row numbers and lists in the millions."""
    lists = Ragged.of_counts(np.ones(2_000_000, np.int64), np.arange(2_000_000) + 5_000_000)
    owners = np.array([0, 1_999_999, 1_999_999, 5])
    values = np.array([5_000_000, 6_999_999, 6_999_998, -1])
    assert lists.contains_pairs(owners, values).tolist() == [True, True, False, False]


@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(-1, 7), max_size=6))
def test_rows_by_key(keys, asked):
    rows = RowsByKey(np.array(keys, np.uint64), np.arange(len(keys)) * 10)
    found = as_lists(rows.having(np.array([max(0, key) for key in asked], np.uint64)))
    assert found == [[10 * i for i, own in enumerate(keys) if own == max(0, key)] for key in asked]


def test_nothing():
    assert as_lists(Ragged.of([])) == []
    assert as_lists(Ragged.of([[], []])) == [[], []]
    assert Ragged.of([[]]).contains_pairs(np.array([[0]]), np.array([[1]])).tolist() == [[False]]
    assert as_lists(Ragged.of([[1]]).take(np.empty(0, np.int64))) == []
    with pytest.raises(IndexError):
        Ragged.of([[1]]).take(np.array([1]))
