"""Teacher scores and the last row of the ladder, against the library's reranker on one pair at a time."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.evaluate.test_retrieve import make_dataset
from umarvel_ray.data.tables import item_of
from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.checkpoints import evaluate_checkpoint
from umarvel_ray.evaluate.reranked import evaluate_reranked
from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.inference.score import RerankerGroup, score_table
from umarvel_ray.inference.shards import read_manifest, shard_path
from umarvel_ray.model.checkpoint import save_checkpoint
from umarvel_ray.model.reranker import Reranker, RerankerModel
from umarvel_ray.recipe import load_recipe
from umarvel_ray.retrieve.fusion import WEIGHTS


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


@pytest.fixture(scope="module")
def recipe():
    changes = ["evaluate.k=3", "evaluate.k_of={}", "evaluate.rerank_top=6", "cluster.embedders=1"]
    return load_recipe("demo", changes)


@pytest.fixture(scope="module")
def checkpoint(recipe, tiny_base, tmp_path_factory):
    settings = recipe.model.for_reranker(64)
    folder = tmp_path_factory.mktemp("checkpoints") / "reranker"
    save_checkpoint(RerankerModel.from_pretrained(tiny_base, settings), folder, settings, {"phase": "reranker"})
    return folder


@pytest.fixture(scope="module")
def pool(ray_cluster, recipe):
    with RerankerGroup(recipe.cluster, recipe.compute) as pool:
        yield pool


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


def by_hand(checkpoint, dataset, table: pa.Table) -> list[list[float]]:
    reranker = Reranker.from_pretrained(checkpoint)
    rows = dataset.documents.to_pylist() + dataset.queries("test").to_pylist()
    item = {row["id"]: item_of(row) for row in rows}
    return [
        [float(reranker.score(item[row["query_id"]], [item[id_]])[0]) for id_ in row["document_ids"]]
        for row in table.to_pylist()
    ]


def test_scores_are_the_librarys_and_survive_a_restart(pool, dataset, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("umarvel_ray.inference.score.SHARD_QUERIES", 12)
    candidates = candidates_for(dataset, 4)
    scored = score_table(pool, candidates, dataset.queries("test"), dataset.documents, tmp_path, checkpoint)
    assert scored.select(["query_id", "document_ids"]).equals(candidates.select(["query_id", "document_ids"]))
    expected = by_hand(checkpoint, dataset, candidates)
    assert np.abs(np.array(scored["rerank_scores"].to_pylist()) - expected).max() < 1e-5
    assert np.std(expected) > 1e-3
    shard_path(tmp_path, 1).unlink()
    before = shard_path(tmp_path, 0).stat().st_mtime_ns
    again = score_table(pool, candidates, dataset.queries("test"), dataset.documents, tmp_path, checkpoint)
    assert shard_path(tmp_path, 0).stat().st_mtime_ns == before
    assert np.abs(np.array(again["rerank_scores"].to_pylist()) - expected).max() < 1e-5


def test_a_bad_picture_quarantines_its_query_alone(pool, dataset, checkpoint, tmp_path):
    candidates = candidates_for(dataset, 3)
    images = dataset.documents["image"].to_pylist()
    bad = next(row for row in candidates.to_pylist() for id_ in row["document_ids"] if id_.startswith("p"))
    victim = next(id_ for id_ in bad["document_ids"] if id_.startswith("p"))
    images[dataset.row_of[victim]] = b"not a picture"
    place = dataset.documents.column_names.index("image")
    documents = dataset.documents.set_column(place, "image", pa.array(images, pa.binary()))
    scored = score_table(pool, candidates, dataset.queries("test"), documents, tmp_path, checkpoint)
    lost = {row["query_id"] for row in candidates.to_pylist() if victim in row["document_ids"]}
    quarantine = pq.read_table(tmp_path / "quarantine.parquet").to_pylist()
    assert {row["id"] for row in quarantine} == lost
    assert all(victim in row["reason"] for row in quarantine)
    assert set(scored["query_id"].to_pylist()) == set(candidates["query_id"].to_pylist()) - lost
    manifest = read_manifest(tmp_path)
    assert manifest["rows"] == manifest["written"] + manifest["quarantined"] == candidates.num_rows


def test_errors_are_one_line(pool, dataset, checkpoint, tiny_base, tmp_path):
    candidates = candidates_for(dataset, 2)
    queries = dataset.queries("test")
    some = dataset.documents.filter(pa.array([id_ != "t0" for id_ in dataset.documents["id"].to_pylist()]))
    wanting = candidates.set_column(1, "document_ids", pa.array([["t0", "t1"]] * candidates.num_rows))
    with pytest.raises(UserError, match="the document 't0'"):
        score_table(pool, wanting, queries, some, tmp_path / "a", checkpoint)
    with pytest.raises(UserError, match="no candidates"):
        score_table(pool, candidates.slice(0, 0), queries, dataset.documents, tmp_path / "b", checkpoint)
    with pytest.raises(UserError, match="umarvel"):
        score_table(pool, candidates, queries, dataset.documents, tmp_path / "c", tiny_base)


def test_recall_then_rerank(pool, dataset, recipe, checkpoint, tiny_base, tmp_path):
    """Every query's first six documents come in the order of cosine + w · P(yes), with w as noted; the rest stays."""
    with EmbedderGroup(recipe.cluster, recipe.compute) as embedders:
        first, known = (
            evaluate_checkpoint(
                embedders, dataset, recipe, tiny_base, "distillation", tmp_path / split, split, recipe.model
            )
            for split in ("test", "validation")
        )
    result = evaluate_reranked(pool, dataset, recipe, checkpoint, first, known, tmp_path / "rerank")
    for scope in ("local", "global"):
        weight = result.notes[f"weight {scope}"]
        assert weight in WEIGHTS
        head = first.ranking(scope).to_pylist()[::7]
        table = pa.Table.from_pylist([row | {"document_ids": row["document_ids"][:6]} for row in head])
        for row, answers in zip(head, by_hand(checkpoint, dataset, table), strict=True):
            fused = [score + weight * p for score, p in zip(row["scores"], answers, strict=False)]
            found = next(r for r in result.ranking(scope).to_pylist() if r["query_id"] == row["query_id"])
            assert found["scores"][:6] == pytest.approx(sorted(fused, reverse=True), abs=1e-4)
            assert found["document_ids"][6:] == row["document_ids"][6:]
    assert set(result.local) == {*dataset.tasks("test"), "average"}
    assert evaluate_reranked(pool, dataset, recipe, checkpoint, first, known, tmp_path / "rerank") == result
