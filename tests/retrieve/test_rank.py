"""Rankings and exact search on a small corpus, against plain numpy on the library's own vectors."""

import numpy as np
import pytest

from tests.support.small_dataset import (
    assert_same_ranking,
    embed_all,
    expected_ranking,
)
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.retrieve.rank import embed_split, rank

DEPTH = 30


@pytest.fixture(scope="module")
def embedded(embedders, dataset, recipe, tiny_base, tmp_path_factory):
    ref = CheckpointRef.of(tiny_base, recipe.model)
    return embed_split(embedders, dataset, "test", ref, tmp_path_factory.mktemp("embeddings"))


@pytest.fixture(scope="module")
def vectors(dataset, recipe, tiny_base):
    return embed_all(dataset, tiny_base, recipe)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_rankings_are_exact(embedded, dataset, vectors, scope):
    queries = {row["id"]: row for row in dataset.queries("test").to_pylist()}
    rows = rank(embedded, dataset, "test", scope, DEPTH).to_pylist()
    assert {row["query_id"] for row in rows} == set(queries)
    for row in rows:
        query = queries[row["query_id"]]
        ids = dataset.global_pool("test") if scope == "global" else dataset.pool(query["task"], "test")
        expected = expected_ranking(dataset, vectors, query, ids)
        assert row["pool_size"] == len(expected)
        assert len(row["document_ids"]) == DEPTH
        assert_same_ranking(row["document_ids"], expected, vectors, query)
        assert row["document_ids"][:20] == sorted(set(row["document_ids"]), key=row["document_ids"].index)[:20]


def test_pair_scores_are_cosines(embedded, vectors):
    rows = np.array([3, 80, 41, 0, 60])
    queries = np.stack([vectors[f"q{n}"] for n in (3, 4, 8, 9, 13)])
    expected = [float(q @ vectors[embedded.documents.ids[row]]) for q, row in zip(queries, rows, strict=True)]
    assert np.abs(embedded.documents.pair_scores(queries, rows) - expected).max() < 1e-5
