"""The stream of a rank: its share of every step, in plan order, equal to encoding the rows directly."""

from __future__ import annotations

import pickle
import threading
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import ray

from umarvel_ray.data.dataset import item_of
from umarvel_ray.data.plan import PlanStep
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.items.pair_encoder import PairEncoder
from umarvel_ray.train import stream
from umarvel_ray.train.stream import BLOCK_ITEMS, PhaseTables, begin, open_stream

SIZES = [(1, 1), (3, 2), (2, 9), (7, 7)]  # queries and documents of each step


@pytest.fixture(scope="module")
def tables(dataset, recipe, tiny_base) -> PhaseTables:
    return PhaseTables(dataset.queries("train").table, dataset.documents, str(tiny_base), recipe.model)


@pytest.fixture(scope="module")
def encoded(tables):
    """Encodes rows without a stream."""
    items = ItemEncoder.from_pretrained(tables.processor, tables.settings)
    pairs = PairEncoder.from_pretrained(tables.processor, tables.settings, tables.settings.max_text_tokens)

    def item(side: str, row: int) -> Any:
        [own] = (tables.queries if side == "query" else tables.documents).rows([row])
        return items.encode(item_of(own), side)

    def pair(query: int, document: int, answer: int) -> Any:
        [[first], [second]] = tables.queries.rows([query]), tables.documents.rows([document])
        return pairs.encode(item_of(first), item_of(second), bool(answer))

    return {"item": item, "pair": pair}


@pytest.fixture
def blocks(monkeypatch) -> list[int]:
    """The number of items in each block that a stream receives."""
    sizes: list[int] = []
    real = ray.data.Dataset.iter_batches

    def iter_batches(self, **options):
        for block in real(self, **options):
            sizes.append(block.num_rows)
            yield block

    monkeypatch.setattr(ray.data.Dataset, "iter_batches", iter_batches)
    return sizes


def make_plan(tables: PhaseTables, sizes: list[tuple[int, int]]) -> list[PlanStep]:
    rng = np.random.default_rng(0)
    return [
        PlanStep(
            number,
            rng.integers(0, tables.queries.num_rows, queries),
            rng.integers(0, tables.documents.num_rows, documents),
            {"answers": rng.integers(0, 2, queries, np.int32)},
        )
        for number, (queries, documents) in enumerate(sizes)
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other)
        assert same(astuple(one), astuple(other))


@pytest.mark.parametrize("task_items", [1, 4, 128])
def test_ranks_share_each_step(ray_cluster, tables, encoded, monkeypatch, task_items):
    monkeypatch.setattr(stream, "TASK_ITEMS", task_items)
    plan = make_plan(tables, SIZES)
    for world in (1, 3):
        shares = [list(open_stream(plan, tables, rank, world, False, 2, 0.5)) for rank in range(world)]
        for number, step in enumerate(plan):
            parts = [share[number] for share in shares]
            assert all(part.plan is step for part in parts)
            sizes = [(len(part.queries), len(part.documents)) for part in parts]
            assert max(np.ptp(sizes, axis=0)) <= 1
            queries = [item for part in parts for item in part.queries]
            documents = [item for part in parts for item in part.documents]
            assert_same(queries, [encoded["item"]("query", row) for row in step.queries])
            assert_same(documents, [encoded["item"]("document", row) for row in step.documents])
        assert {len(share) for share in shares} == {len(plan)}


@pytest.mark.parametrize("task_items", [2, 128])
def test_ranks_share_the_pairs_of_each_step(ray_cluster, tables, encoded, monkeypatch, task_items):
    monkeypatch.setattr(stream, "TASK_ITEMS", task_items)
    plan = make_plan(tables, [(n, n) for n in (1, 5, 4)])
    shares = [list(open_stream(plan, tables, rank, 2, True, 2, 0.5)) for rank in range(2)]
    for number, step in enumerate(plan):
        pairs = [pair for share in shares for pair in share[number].pairs]
        rows = zip(step.queries, step.documents, step.arrays["answers"], strict=True)
        assert_same(pairs, [encoded["pair"](*row) for row in rows])
    assert [part.plan.step for part in shares[1]] == [0, 1, 2]


def test_no_cell_or_block_holds_a_whole_step(ray_cluster, tables, blocks, monkeypatch):
    """A step of large pictures may exceed the 2 GB that one cell, and one column of a block, can hold."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 40_000)
    [step] = make_plan(tables, [(150, 150)])
    [items] = open_stream([step], tables, 0, 1, False, 2, 0.5)
    assert sum(len(pickle.dumps(item)) for item in items.documents) > 10 * 40_000
    assert (len(items.queries), len(items.documents)) == (150, 150)
    assert sum(blocks) == 300
    assert max(blocks) <= BLOCK_ITEMS


def test_a_long_plan_has_few_tasks(tables, monkeypatch):
    monkeypatch.setattr(stream, "MOST_TASKS", 10)
    found = []
    monkeypatch.setattr(stream.ray.data, "from_items", lambda work, **_: found.extend(work) or pytest.skip("counted"))
    plan = make_plan(tables, [(4000, 4000)])
    with pytest.raises(pytest.skip.Exception):
        next(open_stream(plan, tables, 0, 1, False, 2, 0.5))
    assert len(found) == 10
    assert [row for part in found for row in part["query"]] == plan[0].queries.tolist()
    assert [row for part in found for row in part["document"]] == plan[0].documents.tolist()


def test_an_empty_plan_has_no_stream(tables):
    assert list(open_stream([], tables, 0, 1, False, 2, 0.5)) == []


def test_the_first_element_is_made_before_it_is_asked_for():
    made = threading.Event()

    def numbers():
        made.set()
        yield from range(3)

    stream = begin(numbers())
    assert made.wait(10)
    assert list(stream) == [0, 1, 2]
    assert list(begin(iter([]))) == []


def test_an_error_in_the_first_element_reaches_who_asks_for_it():
    def broken():
        raise ValueError("no such row")
        yield

    stream = begin(broken())
    with pytest.raises(ValueError, match="no such row"):
        next(stream)
