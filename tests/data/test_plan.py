"""The batch plan: deterministic, distinct positives per batch, every positive marked, ranks that partition a batch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.synthetic import make_queries
from umarvel_ray.data.plan import (
    PlanStep,
    continue_hard_plan,
    contrastive_plan,
    distillation_plan,
    plan_length,
    rank_slice,
    read_plan,
    rerank_plan,
    write_plan,
)
from umarvel_ray.errors import UserError
from umarvel_ray.ragged import Ragged
from umarvel_ray.recipe import Phase, RerankPhase, count_steps

FIRST = 1000  # position i is row FIRST + 2 i
CONTENT = np.arange(5000)  # every document is different


def phase_of(size: int, **changes) -> Phase:
    return Phase(queries="train", batch_size=size, learning_rate=1e-3, **changes)


def positions(step: PlanStep) -> list[int]:
    """The queries of a step by their positions."""
    assert step.queries.dtype == step.documents.dtype == np.int64
    return ((step.queries - FIRST) // 2).tolist()


def assert_same_plan(one: list[PlanStep], other: list[PlanStep]) -> None:
    for old, new in zip(one, other, strict=True):
        assert old.step == new.step
        assert old.arrays.keys() == new.arrays.keys()
        for name in ("queries", "documents"):
            assert np.array_equal(getattr(old, name), getattr(new, name))
        for name, array in old.arrays.items():
            assert array.dtype == new.arrays[name].dtype
            assert np.array_equal(array, new.arrays[name])


@st.composite
def tables(draw):
    n = draw(st.integers(12, 60))
    documents = draw(st.integers(8, 40))
    positives = st.lists(st.integers(0, documents - 1), min_size=1, max_size=3, unique=True)
    return make_queries([draw(positives) for _ in range(n)], [f"task{draw(st.integers(0, 1))}" for _ in range(n)])


@given(
    tables(),
    st.integers(2, 4),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2),
    st.sampled_from([1, 3]),
)
def test_contrastive_batches(queries, size, seed, homogeneous, per_query, copies):
    content = CONTENT // copies
    mined = [[(i * 7 + k) % 40 for k in range(3)] for i in range(queries.n)]
    phase = phase_of(size, max_steps=9, homogeneous=homogeneous)
    try:
        plan = contrastive_plan(queries, phase, seed, content, Ragged.of(mined), per_query)
    except UserError:  # too few distinct positives, which has a test of its own
        return
    assert [p.step for p in plan] == list(range(9))
    for batch in plan:
        drawn, documents = positions(batch), batch.documents.tolist()
        targets = batch.arrays["targets"]
        assert len(drawn) == len(set(drawn)) == size
        assert len(set(targets.tolist())) == size
        assert len(documents) == len(set(documents))
        marked = {tuple(pair) for pair in batch.arrays["relevant"].tolist()}
        listed = {
            (i, j)
            for i, query in enumerate(drawn)
            for j, document in enumerate(documents)
            if content[document] in content[queries.positives.at(query)]
        }
        assert marked == listed
        assert len(batch.arrays["relevant"]) == len(marked)
        assert all((i, int(j)) in marked for i, j in enumerate(targets))
        added = {document for query in drawn for document in mined[query][:per_query]}
        assert set(documents) == added | {documents[j] for j in targets}
        if homogeneous == 1:
            assert len({queries.task[query] for query in drawn}) == 1
    assert_same_plan(contrastive_plan(queries, phase, seed, content, Ragged.of(mined), per_query), plan)


def test_an_epoch_uses_each_query_once_where_it_can():
    queries = make_queries([[i] for i in range(64)])
    plan = contrastive_plan(queries, phase_of(8), 1, CONTENT)
    assert sorted(query for p in plan for query in positions(p)) == list(range(64))
    other = contrastive_plan(queries, phase_of(8), 2, CONTENT)
    assert [positions(p) for p in other] != [positions(p) for p in plan]


def test_a_large_task_is_capped_per_epoch_and_resampled_in_the_next():
    queries = make_queries([[i] for i in range(120)], ["big"] * 100 + ["small"] * 20)
    assert len(contrastive_plan(queries, phase_of(10, max_per_task=20), 0, CONTENT)) == 4
    plan = contrastive_plan(queries, phase_of(10, max_steps=8, max_per_task=20), 0, CONTENT)
    epochs = [{query for p in plan[start : start + 4] for query in positions(p)} for start in (0, 4)]
    for used in epochs:
        assert sum(query < 100 for query in used) == 20
        assert sum(query >= 100 for query in used) == 20
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_batches_from_one_task(share):
    queries = make_queries([[i] for i in range(4000)], [f"t{i % 4}" for i in range(4000)])
    plan = contrastive_plan(queries, phase_of(20, epochs=1, homogeneous=share), 0, CONTENT)
    alike = [len({query % 4 for query in positions(batch)}) == 1 for batch in plan]
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
    with pytest.raises(UserError, match="lower batch_size"):
        contrastive_plan(make_queries([[5], [5], [5]]), phase_of(2, max_steps=1), 0, CONTENT)


def test_an_epoch_that_happens_to_draw_too_few_positives_is_passed_over():
    """Four queries with the same four positives draw one and the same in every 64th epoch."""
    queries = make_queries([[1, 2, 3, 4]] * 4)
    for phase in (phase_of(2, max_steps=400), phase_of(3, max_steps=100)):
        for step in contrastive_plan(queries, phase, 0, CONTENT):
            assert len(set(step.documents.tolist())) == phase.batch_size


def test_distillation_keeps_each_querys_own_candidates():
    candidates = [[3, 1, 2], [1, 9], [7, 3, 6]]
    teacher = [[0.9, 0.5, 0.1], [0.7, 0.2], [0.3, 0.2, 0.1]]
    flat = np.array([score for own in teacher for score in own], np.float32)
    rows = make_queries(candidates).rows
    for batch in distillation_plan(rows, Ragged.of(candidates), flat, phase_of(2, max_steps=5), seed=3):
        for i, query in enumerate(positions(batch)):
            columns = batch.arrays["candidates"][i]
            assert [batch.documents[j] for j in columns if j >= 0] == candidates[query]
            assert batch.arrays["teacher"][i][: len(candidates[query])] == pytest.approx(teacher[query])
        by_occurrence = [document for query in positions(batch) for document in candidates[query]]
        assert batch.documents.tolist() == list(dict.fromkeys(by_occurrence))


@pytest.mark.parametrize("queries", [1, 3])
def test_distillation_of_fewer_queries_than_a_batch_repeats_them_so_that_no_worker_is_without(queries):
    candidates = Ragged.of([[5], [6], [5]][:queries])
    rows = FIRST + 2 * np.arange(queries)
    plan = distillation_plan(rows, candidates, np.ones(queries, np.float32), phase_of(8, max_steps=3), seed=3)
    for batch in plan:
        assert [len(batch.queries[rank_slice(8, rank, 8)]) for rank in range(8)] == [1] * 8
        counts = [positions(batch).count(query) for query in range(queries)]
        assert max(counts) - min(counts) <= 1
        assert len(batch.documents) == min(queries, 2)


def test_continue_hard_uses_each_querys_own_candidates_as_negatives():
    queries = make_queries([[1, 5], [4], [7]])
    candidates = Ragged.of([[1, 2, 5, 3], [2, 4], [5, 1, 6]])
    for batch in continue_hard_plan(queries, candidates, phase_of(2, max_steps=4), 1, CONTENT):
        for i, query in enumerate(positions(batch)):
            own = {int(batch.documents[j]) for row, j in batch.arrays["own"] if row == i}
            assert own == [{2, 3}, {2}, {5, 1, 6}][query]
            assert batch.documents[batch.arrays["targets"][i]] in queries.positives.at(query)


def rerank_phase(size: int, **changes) -> RerankPhase:
    return RerankPhase(queries="train", batch_size=size, learning_rate=1e-3, **changes)


NO_EASY = Ragged.of([[], [], []])


def test_reranker_pairs_come_as_one_yes_and_one_no():
    queries = make_queries([[5], [6, 7], [8]])
    negatives = [[11, 12], [13], []]
    for batch in rerank_plan(queries, Ragged.of(negatives), NO_EASY, rerank_phase(4, max_steps=6), seed=0):
        assert batch.arrays["answers"].tolist() == [1, 0] * 4
        pairs = zip(positions(batch), batch.documents.tolist(), batch.arrays["answers"], strict=True)
        for query, document, answer in pairs:
            assert document in (queries.positives.at(query) if answer else negatives[query])
            assert query != 2
    with pytest.raises(UserError, match="no query has a mined negative"):
        rerank_plan(queries, Ragged.of([[], [], []]), NO_EASY, rerank_phase(4, max_steps=1), seed=0)


def test_easy_negatives_come_first_and_then_their_share():
    queries = make_queries([[5], [6, 7], [8]])
    mined, easy = [[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]], [[41, 42, 43], [51, 52, 53], [61, 62, 63]]
    phase = rerank_phase(3, max_steps=400, negatives=3, easy_steps=0.25, random_mix=0.4)
    plan = rerank_plan(queries, Ragged.of(mined), Ragged.of(easy), phase, seed=0)
    shares = []
    for batch in plan:
        assert batch.arrays["answers"].tolist() == [1, 0, 0, 0] * 3
        groups = batch.documents.reshape(3, 4).tolist()
        for query, (positive, *negatives) in zip(positions(batch)[::4], groups, strict=True):
            assert positive in queries.positives.at(query)
            assert set(negatives) <= {*mined[query], *easy[query]}
            assert len(set(negatives)) == 3
            shares.append(np.isin(negatives, easy[query]).mean())
    assert set(shares[:300]) == {1.0}
    assert np.mean(shares[300:]) == pytest.approx(0.4, abs=0.05)


def test_where_one_kind_of_negatives_ends_the_other_fills_up():
    queries, mined, easy = make_queries([[5], [6], [7]]), [[11], [12, 13], [14]], [[21], [], [22, 23, 24]]
    phase = rerank_phase(3, max_steps=5, negatives=3, random_mix=0.5)
    for batch in rerank_plan(queries, Ragged.of(mined), Ragged.of(easy), phase, seed=0):
        asked = positions(batch)
        for query in range(3):
            own = [d for q, d, yes in zip(asked, batch.documents, batch.arrays["answers"], strict=True)
                   if q == query and not yes]  # fmt: skip
            assert len(own) == len(set(own)) == min(3, len(mined[query]) + len(easy[query]))
            assert set(own) <= {*mined[query], *easy[query]}


def test_a_plan_reads_back_as_written(tmp_path):
    queries = make_queries([[i, i + 1] for i in range(20)])
    mined = Ragged.of([[50] if i == 3 else [] for i in range(20)])
    candidates = Ragged.of([[1, 2], [3]])
    for number, plan in enumerate(
        (
            contrastive_plan(queries, phase_of(4, max_steps=3), 0, CONTENT),
            contrastive_plan(queries, phase_of(4, max_steps=3), 0, CONTENT, mined, per_query=1, in_batch=False),
            distillation_plan(queries.rows[:2], candidates, np.ones(3, np.float32), phase_of(2, max_steps=3), 0),
            rerank_plan(queries, mined, Ragged.of([[]] * 20), rerank_phase(2, max_steps=3), 0),
        )
    ):
        path = tmp_path / f"{number}.parquet"
        write_plan(plan, path)
        assert plan_length(path) == 3
        assert_same_plan(read_plan(path), plan)
        assert_same_plan(read_plan(path, 2), plan[2:])
        assert read_plan(path, 3) == []


def test_length_of_a_run():
    assert count_steps(phase_of(10), 105) == 10
    assert count_steps(phase_of(10, epochs=2), 105) == 21
    assert count_steps(phase_of(10, max_steps=7), 105) == 7
    assert count_steps(phase_of(200), 105) == 1
