"""Bulk reranking against the library's reranker on one pair at a time."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.rerankers import score_singly
from tests.support.small_dataset import document_rows
from umarvel_ray.data.stored import write_stored
from umarvel_ray.errors import UserError
from umarvel_ray.inference.score import SCORED, score_table
from umarvel_ray.inference.shards import read_manifest, shard_path
from umarvel_ray.model.checkpoint import CheckpointRef


def candidates_for(dataset, count: int) -> pa.Table:
    """`count` random candidates per test query."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "query": query,
            "documents": rng.choice(dataset.documents.num_rows, count, replace=False).tolist(),
            "scores": rng.uniform(0, 1, count).astype(np.float32).tolist(),
        }
        for query in dataset.queries("test").rows.tolist()
    ]
    return pa.Table.from_pylist(rows, SCORED).drop_columns(["rerank_scores"])


def test_scores_are_the_librarys_and_survive_a_restart(rerankers, dataset, reranker_ref, tmp_path, monkeypatch):
    monkeypatch.setattr("umarvel_ray.inference.score.SHARD_QUERIES", 12)
    candidates = candidates_for(dataset, 4)
    scored = score_table(rerankers, candidates, dataset.queries("test"), dataset.documents, tmp_path, reranker_ref)
    assert scored.drop_columns(["rerank_scores"]).equals(candidates)
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
    rows = document_rows(dataset)
    victim = next(number for found in candidates["documents"].to_pylist() for number in found if rows[number]["image"])
    rows[victim]["image"] = b"not a picture"
    table = pa.Table.from_pylist(rows, dataset.documents.schema)
    documents = write_stored(tmp_path / "documents.arrow", table.schema, table.to_batches())
    folder = tmp_path / "scores"
    scored = score_table(rerankers, candidates, dataset.queries("test"), documents, folder, reranker_ref)
    lost = {row["query"] for row in candidates.to_pylist() if victim in row["documents"]}
    ids = dict(zip(dataset.queries("test").rows.tolist(), dataset.queries("test").ids(), strict=True))
    quarantine = pq.read_table(folder / "quarantine.parquet").to_pylist()
    assert {row["id"] for row in quarantine} == {ids[number] for number in lost}
    assert all(rows[victim]["id"] in row["reason"] for row in quarantine)
    assert set(scored["query"].to_pylist()) == set(candidates["query"].to_pylist()) - lost
    manifest = read_manifest(folder)
    assert manifest["rows"] == manifest["written"] + manifest["quarantined"] == candidates.num_rows


def test_errors_are_one_line(rerankers, dataset, reranker_ref, run, tmp_path):
    candidates = candidates_for(dataset, 2)
    queries, embedder = dataset.queries("test"), CheckpointRef.of(run / "checkpoints" / "distillation")
    with pytest.raises(UserError, match="no candidates"):
        score_table(rerankers, candidates.slice(0, 0), queries, dataset.documents, tmp_path / "b", reranker_ref)
    with pytest.raises(UserError, match="phase is 'distillation', not 'reranker'"):
        score_table(rerankers, candidates, queries, dataset.documents, tmp_path / "c", embedder)
