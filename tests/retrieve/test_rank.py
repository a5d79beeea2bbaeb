"""Rankings and exact search on a small corpus, against plain numpy on the library's own vectors."""

import numpy as np
import pytest

from tests.support.small_dataset import (
    assert_same_ranking,
    embed_all,
    expected_ranking,
    query_rows,
)
from umarvel_ray.errors import UserError
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
def test_rankings_are_exact(embedded, dataset, vectors, scope, tmp_path):
    queries = dataset.queries("test")
    by_row = dict(zip(queries.rows.tolist(), query_rows(dataset, "test"), strict=True))
    ids = dataset.document_ids.to_pylist()
    rows = rank(embedded, dataset, "test", scope, DEPTH, tmp_path).to_pylist()
    assert {row["query"] for row in rows} == set(by_row)
    for row in rows:
        query = by_row[row["query"]]
        pool = dataset.global_pool("test") if scope == "global" else dataset.pool(query["task"], "test")
        expected = expected_ranking(dataset, vectors, query, [ids[number] for number in pool])
        found = [ids[number] for number in row["documents"]]
        assert row["task"] == query["task"]
        assert row["pool_size"] == len(expected)
        assert len(set(found)) == DEPTH
        assert_same_ranking(found, expected, vectors, query)


def test_a_finished_ranking_is_read_back_and_a_changed_pool_is_ranked_again(embedded, dataset, tmp_path, monkeypatch):
    first = rank(embedded, dataset, "test", "local", DEPTH, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(embedded.documents), "topk", None)
        assert rank(embedded, dataset, "test", "local", DEPTH, tmp_path).equals(first)
    pools = {key: pool[:3] if key == ("words_task1", "test") else pool for key, pool in dataset.pools.items()}
    smaller = rank(embedded, dataset.with_pools(pools), "test", "local", DEPTH, tmp_path).to_pylist()
    assert {len(row["documents"]) for row in smaller if row["task"] == "words_task1"} == {3}


@pytest.mark.parametrize("pool", [None, []])
def test_a_task_that_cannot_be_searched_for_is_named_before_anything_is_embedded(dataset, tmp_path, pool):
    pools = {key: rows for key, rows in dataset.pools.items() if key != ("words_task1", "test")}
    if pool is not None:
        pools["words_task1", "test"] = np.array(pool, np.int64)
    with pytest.raises(UserError, match=r"pool (for|of) task 'words_task1'"):
        embed_split(None, dataset.with_pools(pools), "test", None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_pair_scores_are_cosines(embedded, dataset, vectors):
    rows = embedded.documents.rows[[3, 80, 41, 0, 60]]
    queries = np.stack([vectors[f"q{n}"] for n in (3, 4, 8, 9, 13)])
    ids = dataset.document_ids.to_pylist()
    expected = [float(q @ vectors[ids[row]]) for q, row in zip(queries, rows, strict=True)]
    assert np.abs(embedded.documents.pair_scores(queries, rows) - expected).max() < 1e-5
