"""Exact top-k against brute force."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from umarvel_ray.retrieve.topk import merge_topk, topk


def brute_force(queries, documents, k, exclude):
    """Per query: every score, sorted in Python by (−score, index)."""
    expected = []
    for query, forbidden in zip(queries, exclude, strict=True):
        scored = [
            (-sum(float(a) * float(b) for a, b in zip(query, document, strict=True)), index)
            for index, document in enumerate(documents)
            if index not in set(forbidden)
        ]
        expected.append([(index, -score) for score, index in sorted(scored)[:k]])
    return expected


def rows(scores, indices):
    return [
        [(int(i), float(s)) for i, s in zip(line_i, line_s, strict=True) if i >= 0]
        for line_i, line_s in zip(indices, scores, strict=True)
    ]


@st.composite
def problems(draw):
    """Small integer vectors: products are exact in fp32 and ties are many."""
    n, m, d = draw(st.integers(1, 6)), draw(st.integers(1, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries = rng.integers(-2, 3, (n, d)).astype(np.float32)
    documents = rng.integers(-2, 3, (m, d)).astype(np.float32)
    exclude = [rng.choice(m, draw(st.integers(0, m)), replace=False) for _ in range(n)]
    return queries, documents, draw(st.integers(1, 12)), exclude, draw(st.integers(1, 50)), draw(st.integers(1, 7))


@settings(max_examples=200)
@given(problems())
def test_equals_brute_force_with_ties_and_exclusions(problem):
    queries, documents, k, exclude, block, query_block = problem
    found = topk(queries, documents, k, exclude, block=block, query_block=query_block)
    assert found[0].shape == found[1].shape == (len(queries), k)
    assert rows(*found) == brute_force(queries, documents, k, exclude)
    assert np.isneginf(found[0][found[1] < 0]).all()


@settings(max_examples=100)
@given(problems(), st.integers(1, 39))
def test_parts_merge_to_the_whole(problem, cut):
    queries, documents, k, exclude, *_ = problem
    cut = min(cut, len(documents))
    left = topk(queries, documents[:cut], k, exclude)
    right = topk(queries, documents[cut:], k, [np.asarray(rows) - cut for rows in exclude])
    right = (right[0], np.where(right[1] >= 0, right[1] + cut, -1))
    assert rows(*merge_topk([left, right], k)) == brute_force(queries, documents, k, exclude)


def test_real_vectors_agree_with_a_full_sort():
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(50, 64)).astype(np.float32), rng.normal(size=(3000, 64)).astype(np.float32)
    scores, indices = topk(queries, documents, 20, block=700)
    reference = queries.astype(np.float64) @ documents.astype(np.float64).T
    assert np.array_equal(indices, np.argsort(-reference, axis=1, kind="stable")[:, :20])
    assert np.abs(scores - np.take_along_axis(reference, indices, 1)).max() < 1e-4
