"""Exact top-k against brute force."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umarvel_ray.ragged import Ragged
from umarvel_ray.retrieve.topk import merge_topk, topk, topk_of_rows

DEVICES = ("cpu", "cpu:0")  # the second takes the way of every device but "cpu"


def brute_force(queries, documents, k, exclude, rows=None):
    """Scores and indices, both padded: a full sort by (−score, index) in float64."""
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    if rows is not None:
        scores[:, np.setdiff1d(np.arange(len(documents)), rows)] = -np.inf
    if exclude is not None:
        scores[exclude.owners, exclude.values] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, order, 1)
    missing = ((0, 0), (0, k - scores.shape[1]))
    indices = np.pad(np.where(np.isneginf(scores), -1, order), missing, constant_values=-1)
    return np.pad(scores, missing, constant_values=-np.inf).astype(np.float32), indices


def assert_same(found, expected):
    assert [part.dtype for part in found] == [np.float32, np.int64]
    assert np.array_equal(found[1], expected[1])
    assert np.array_equal(found[0], expected[0])


@st.composite
def problems(draw):
    """Small integer vectors, so that products are exact in fp32 and ties are many; read-only as from Ray."""
    n, m, d = draw(st.integers(0, 9)), draw(st.integers(0, 90)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    largest = draw(st.sampled_from([0, 1, 3, 100]))
    queries, documents = (rng.integers(-largest, largest + 1, (count, d)).astype(np.float32) for count in (n, m))
    order = draw(st.sampled_from(["random", "ascending", "descending"]))  # every block better than all before, or none
    if n and order != "random":
        documents = documents[np.argsort(documents @ queries[0] * (1 if order == "ascending" else -1))]
    for vectors in (queries, documents):
        vectors.flags.writeable = False
    sizes = [draw(st.sampled_from([0, 1, m // 2, m])) for _ in range(n)]
    exclude = Ragged.of([rng.choice(m, min(size, m), replace=False) for size in sizes])
    blocks = draw(st.integers(1, 100)), draw(st.integers(1, 10))
    return queries, documents, draw(st.integers(0, 30)), draw(st.sampled_from([None, exclude])), blocks


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_equals_brute_force_with_ties_and_exclusions(device, problem):
    queries, documents, k, exclude, blocks = problem
    assert_same(topk(queries, documents, k, exclude, device, blocks), brute_force(queries, documents, k, exclude))


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_few_or_many_queries_equal_brute_force(problem):
    """The way over faiss."""
    queries, documents, k, exclude, _ = problem
    assert_same(topk(queries, documents, k, exclude), brute_force(queries, documents, k, exclude))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=150, deadline=None)
@given(problem=problems(), data=st.data())
def test_slices_restricted_to_rows_merge_to_the_whole(device, problem, data):
    queries, documents, k, exclude, blocks = problem
    m = len(documents)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, m), max_size=2))), m]
    chosen = data.draw(st.sampled_from(["all", "range", "some", "none"]))
    first, last = sorted(data.draw(st.tuples(st.integers(0, m), st.integers(0, m))))
    rows = {"all": None, "range": np.arange(first, last), "some": np.arange(first, m, 3), "none": np.arange(0)}[chosen]
    blocks = data.draw(st.sampled_from([blocks, None]))
    parts = [
        topk_of_rows(queries, documents[start:stop], start, k, rows, exclude, device, blocks)
        for start, stop in pairwise(cuts)
    ]
    expected = brute_force(queries, documents, k, exclude, rows)
    assert_same(merge_topk(parts, k), expected)
    assert_same(merge_topk(parts[::-1], k), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_real_vectors_agree_with_a_full_sort(device):
    rng = np.random.default_rng(0)
    queries, documents = (rng.normal(size=(count, 64)).astype(np.float32) for count in (600, 9000))  # several blocks
    scores, indices = topk(queries, documents, 20, device=device, blocks=(2000, 256))
    expected = brute_force(queries, documents, 20, None)
    assert (
        indices == expected[1]
    ).mean() > 0.9999  # float32 may swap two scores that differ by less than its precision
    assert np.abs(scores - expected[0]).max() < 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_scores_that_are_not_finite(device):
    """NaN and -inf are never returned, also where a finite score lies beside them; inf comes first."""
    documents = np.arange(100, dtype=np.float32)[:, None]
    documents[[3, 98]], documents[[7, 97]], documents[5] = np.nan, -np.inf, np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = topk(np.ones((1, 1), np.float32), documents, 100, device=device, blocks=(32, 1))[1][0]
    assert found[:4].tolist() == [5, 99, 96, 95]
    assert sorted(found) == [-1] * 4 + [row for row in range(100) if row not in (3, 98, 7, 97)]


def test_scores_of_zero_tie_whatever_their_sign():
    documents = np.array([[-0.0], [0.0], [-0.0], [0.0]], np.float32)
    found = [topk(np.ones((1, 1), np.float32), documents, 3, device=device)[1][0].tolist() for device in DEVICES]
    assert found == [[0, 1, 2]] * 2
    parts = [(np.array([[score]], np.float32), np.array([[row]])) for row, score in enumerate([-0.0, 0.0])]
    assert merge_topk(parts, 2)[1].tolist() == [[0, 1]]


@pytest.mark.parametrize("device", DEVICES)
def test_read_only_vectors_are_taken_without_a_warning(device):
    documents = np.ones((50, 4), np.float32)
    documents.flags.writeable = False
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch warns once per process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for n in (2, 30):
                assert topk(documents[:n], documents, 3, device=device)[1].tolist() == [[0, 1, 2]] * n
    finally:
        torch.set_warn_always(before)
