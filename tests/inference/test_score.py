"""Bulk reranking against the library's reranker on one pair at a time."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.rerankers import score_singly
from umarvel_ray.errors import UserError
from umarvel_ray.inference.score import score_table
from umarvel_ray.inference.shards import read_manifest, shard_path
from umarvel_ray.model.checkpoint import CheckpointRef


def candidates_for(dataset, count: int) -> pa.Table:
    """`count` random candidates per test query."""
    rng = np.random.default_rng(0)
    ids = dataset.documents["id"].to_pylist()
    rows = [
        {
            "query_id": query,
            "document_ids": [ids[i] for i in rng.choice(len(ids), count, replace=False)],
            "scores": rng.uniform(0, 1, count).astype(np.float32).tolist(),
        }
        for query in dataset.queries("test")["id"].to_pylist()
    ]
    return pa.Table.from_pylist(rows)


def test_scores_are_the_librarys_and_survive_a_restart(rerankers, dataset, reranker_ref, tmp_path, monkeypatch):
    monkeypatch.setattr("umarvel_ray.inference.score.SHARD_QUERIES", 12)
    candidates = candidates_for(dataset, 4)
    scored = score_table(rerankers, candidates, dataset.queries("test"), dataset.documents, tmp_path, reranker_ref)
    assert scored.select(["query_id", "document_ids"]).equals(candidates.select(["query_id", "document_ids"]))
    expected = score_singly(reranker_ref, dataset, candidates)
    assert np.abs(np.array(scored["rerank_scores"].to_pylist()) - expected).max() < 1e-5
    assert np.std(expected) > 1e-3
    shard_path(tmp_path, 1).unlink()
    before = shard_path(tmp_path, 0).stat().st_mtime_ns
    again = score_table(rerankers, candidates, dataset.queries("test"), dataset.documents, tmp_path, reranker_ref)
    assert shard_path(tmp_path, 0).stat().st_mtime_ns == before
    assert np.abs(np.array(again["rerank_scores"].to_pylist()) - expected).max() < 1e-5


def test_a_bad_picture_quarantines_its_query_alone(rerankers, dataset, reranker_ref, tmp_path):
    candidates = candidates_for(dataset, 3)
    images = dataset.documents["image"].to_pylist()
    bad = next(row for row in candidates.to_pylist() for id_ in row["document_ids"] if id_.startswith("p"))
    victim = next(id_ for id_ in bad["document_ids"] if id_.startswith("p"))
    images[dataset.row_of[victim]] = b"not a picture"
    place = dataset.documents.column_names.index("image")
    documents = dataset.documents.set_column(place, "image", pa.array(images, pa.binary()))
    scored = score_table(rerankers, candidates, dataset.queries("test"), documents, tmp_path, reranker_ref)
    lost = {row["query_id"] for row in candidates.to_pylist() if victim in row["document_ids"]}
    quarantine = pq.read_table(tmp_path / "quarantine.parquet").to_pylist()
    assert {row["id"] for row in quarantine} == lost
    assert all(victim in row["reason"] for row in quarantine)
    assert set(scored["query_id"].to_pylist()) == set(candidates["query_id"].to_pylist()) - lost
    manifest = read_manifest(tmp_path)
    assert manifest["rows"] == manifest["written"] + manifest["quarantined"] == candidates.num_rows


def test_errors_are_one_line(rerankers, dataset, reranking_recipe, reranker_ref, tiny_base, tmp_path):
    candidates = candidates_for(dataset, 2)
    queries = dataset.queries("test")
    without_t0 = dataset.documents.filter(pa.array([id_ != "t0" for id_ in dataset.documents["id"].to_pylist()]))
    naming_t0 = candidates.set_column(1, "document_ids", pa.array([["t0", "t1"]] * candidates.num_rows))
    base = CheckpointRef.of(tiny_base, reranking_recipe.model)
    with pytest.raises(UserError, match="the document 't0'"):
        score_table(rerankers, naming_t0, queries, without_t0, tmp_path / "a", reranker_ref)
    with pytest.raises(UserError, match="no candidates"):
        score_table(rerankers, candidates.slice(0, 0), queries, dataset.documents, tmp_path / "b", reranker_ref)
    with pytest.raises(UserError, match="umarvel"):
        score_table(rerankers, candidates, queries, dataset.documents, tmp_path / "c", base)
