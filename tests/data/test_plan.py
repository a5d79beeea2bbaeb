"""The batch plan: deterministic, distinct positives per batch, every positive marked, ranks that partition a batch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umarvel_ray.data.plan import (
    QueryRows,
    continue_hard_plan,
    contrastive_plan,
    distillation_plan,
    rank_slice,
    read_plan,
    rerank_plan,
    write_plan,
)
from umarvel_ray.errors import UserError
from umarvel_ray.recipe import Phase, count_steps


def phase_of(size: int, **changes) -> Phase:
    return Phase(queries="train", batch_size=size, learning_rate=1e-3, **changes)


@st.composite
def tables(draw):
    n = draw(st.integers(12, 60))
    documents = draw(st.integers(8, 40))
    positives = st.lists(st.integers(0, documents - 1), min_size=1, max_size=3, unique=True)
    return QueryRows(
        [f"q{i}" for i in range(n)],
        [f"task{draw(st.integers(0, 1))}" for _ in range(n)],
        [[f"d{j}" for j in draw(positives)] for _ in range(n)],
    )


@given(tables(), st.integers(2, 4), st.integers(0, 5), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2))
def test_contrastive_batches(rows, size, seed, homogeneous, per_query):
    negatives = {q: [f"d{(i * 7 + k) % 40}" for k in range(3)] for i, q in enumerate(rows.ids)}
    phase = phase_of(size, max_steps=9, homogeneous=homogeneous)
    try:
        plan = contrastive_plan(rows, phase, seed, negatives, per_query)
    except UserError:  # too few distinct positives, which has a test of its own
        return
    assert [p.step for p in plan] == list(range(9))
    row_of = {q: i for i, q in enumerate(rows.ids)}
    for batch in plan:
        targets = batch.arrays["targets"]
        assert len(batch.query_ids) == len(set(batch.query_ids)) == size
        assert len(set(targets.tolist())) == size
        assert len(batch.document_ids) == len(set(batch.document_ids))
        marked = {tuple(pair) for pair in batch.arrays["relevant"].tolist()}
        listed = {
            (i, j)
            for i, q in enumerate(batch.query_ids)
            for j, d in enumerate(batch.document_ids)
            if d in rows.positives[row_of[q]]
        }
        assert marked == listed
        assert all((i, int(j)) in marked for i, j in enumerate(targets))
        if per_query:
            assert {d for q in batch.query_ids for d in negatives[q][:per_query]} <= set(batch.document_ids)
        if homogeneous == 1:
            assert len({rows.tasks[row_of[q]] for q in batch.query_ids}) == 1
    again = contrastive_plan(rows, phase, seed, negatives, per_query)
    assert [p.query_ids for p in again] == [p.query_ids for p in plan]
    assert [p.document_ids for p in again] == [p.document_ids for p in plan]


def test_an_epoch_uses_each_query_once_where_it_can():
    rows = QueryRows([f"q{i}" for i in range(64)], ["t"] * 64, [[f"d{i}"] for i in range(64)])
    plan = contrastive_plan(rows, phase_of(8), seed=1)
    used = [q for p in plan for q in p.query_ids]
    assert sorted(used) == sorted(rows.ids)
    assert [p.query_ids for p in contrastive_plan(rows, phase_of(8), seed=2)] != [p.query_ids for p in plan]


def test_a_large_task_is_capped_per_epoch_and_resampled_in_the_next():
    rows = QueryRows([f"q{i}" for i in range(120)], ["big"] * 100 + ["small"] * 20, [[f"d{i}"] for i in range(120)])
    assert len(contrastive_plan(rows, phase_of(10, max_per_task=20), seed=0)) == 4
    plan = contrastive_plan(rows, phase_of(10, max_steps=8, max_per_task=20), seed=0)
    epochs = [{q for p in plan[start : start + 4] for q in p.query_ids} for start in (0, 4)]
    for used in epochs:
        assert sum(rows.tasks[int(q[1:])] == "big" for q in used) == 20
        assert sum(rows.tasks[int(q[1:])] == "small" for q in used) == 20
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_batches_from_one_task(share):
    rows = QueryRows(
        [f"q{i}" for i in range(4000)], [f"t{i % 4}" for i in range(4000)], [[f"d{i}"] for i in range(4000)]
    )
    task = dict(zip(rows.ids, rows.tasks, strict=True))
    plan = contrastive_plan(rows, phase_of(20, epochs=1, homogeneous=share), seed=0)
    alike = [len({task[q] for q in batch.query_ids}) == 1 for batch in plan]
    assert abs(sum(alike) / len(plan) - share) < 0.05
    if 0 < share < 1:
        changes = sum(a != b for a, b in pairwise(alike))
        assert changes > share * (1 - share) * len(plan), "both kinds must alternate, not follow each other"


@given(st.integers(0, 50), st.integers(1, 9))
def test_slices_partition(n, world):
    parts = [range(n)[rank_slice(n, rank, world)] for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_too_few_distinct_positives_is_one_clear_line():
    rows = QueryRows(["a", "b", "c"], ["t"] * 3, [["d"], ["d"], ["d"]])
    with pytest.raises(UserError, match="lower batch_size"):
        contrastive_plan(rows, phase_of(2, max_steps=1), seed=0)


def test_distillation_keeps_each_querys_own_candidates():
    candidates = [["a", "b", "c"], ["b", "d"], ["e", "a", "f"]]
    teacher = [[0.9, 0.5, 0.1], [0.7, 0.2], [0.3, 0.2, 0.1]]
    for batch in distillation_plan(["x", "y", "z"], candidates, teacher, phase_of(2, max_steps=5), seed=3):
        for i, query in enumerate(batch.query_ids):
            row = "xyz".index(query)
            columns = batch.arrays["candidates"][i]
            assert [batch.document_ids[j] for j in columns if j >= 0] == candidates[row]
            assert batch.arrays["teacher"][i][: len(candidates[row])] == pytest.approx(teacher[row])


def test_continue_hard_uses_each_querys_own_candidates_as_negatives():
    rows = QueryRows(["x", "y", "z"], ["t"] * 3, [["a", "e"], ["d"], ["g"]])
    candidates = {"x": ["a", "b", "e", "c"], "y": ["b", "d"], "z": ["e", "a", "f"]}
    for batch in continue_hard_plan(rows, candidates, phase_of(2, max_steps=4), seed=1):
        for i, query in enumerate(batch.query_ids):
            own = {batch.document_ids[j] for row, j in batch.arrays["own"] if row == i}
            assert own == {"x": {"b", "c"}, "y": {"b"}, "z": {"e", "a", "f"}}[query]
            assert batch.document_ids[batch.arrays["targets"][i]] in rows.positives["xyz".index(query)]


def test_reranker_pairs_come_as_one_yes_and_one_no():
    rows = QueryRows(["a", "b", "c"], ["t"] * 3, [["p"], ["q", "r"], ["s"]])
    negatives = {"a": ["n1", "n2"], "b": ["n3"], "c": []}
    for batch in rerank_plan(rows, negatives, phase_of(4, max_steps=6), seed=0):
        assert batch.arrays["answers"].tolist() == [1, 0] * 4
        for query, document, answer in zip(batch.query_ids, batch.document_ids, batch.arrays["answers"], strict=True):
            assert document in (rows.positives[rows.ids.index(query)] if answer else negatives[query])
        assert "c" not in batch.query_ids
    with pytest.raises(UserError, match="no query has a mined negative"):
        rerank_plan(rows, {}, phase_of(4, max_steps=1), seed=0)


def test_a_plan_reads_back_as_written(tmp_path):
    rows = QueryRows([f"q{i}" for i in range(20)], ["t"] * 20, [[f"d{i}", f"d{i + 1}"] for i in range(20)])
    plan = contrastive_plan(rows, phase_of(4, max_steps=3), 0, {"q3": ["n"]}, per_query=1, in_batch=False)
    write_plan(plan, tmp_path / "plan.parquet")
    for old, new in zip(plan, read_plan(tmp_path / "plan.parquet"), strict=True):
        assert (old.step, old.query_ids, old.document_ids) == (new.step, new.query_ids, new.document_ids)
        for name in old.arrays:
            assert np.array_equal(old.arrays[name], new.arrays[name])


def test_length_of_a_run():
    assert count_steps(phase_of(10), 105) == 10
    assert count_steps(phase_of(10, epochs=2), 105) == 21
    assert count_steps(phase_of(10, max_steps=7), 105) == 7
    assert count_steps(phase_of(200), 105) == 1
