"""Recall, then rerank: the last row of the ladder, against the library's reranker on one pair at a time."""

import pyarrow as pa
import pytest

from tests.support.rerankers import make_reranker, score_singly
from tests.support.small_dataset import make_dataset
from umarvel_ray.evaluate.checkpoints import evaluate_checkpoint
from umarvel_ray.evaluate.reranked import evaluate_reranked
from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.inference.score import RerankerGroup
from umarvel_ray.model.checkpoint import CheckpointRef
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
def ref(recipe, tiny_base, tmp_path_factory):
    return make_reranker(tiny_base, recipe, tmp_path_factory.mktemp("checkpoints") / "reranker")


@pytest.fixture(scope="module")
def rerankers(ray_cluster, recipe):
    with RerankerGroup(recipe.cluster, recipe.compute) as rerankers:
        yield rerankers


def test_recall_then_rerank(rerankers, dataset, recipe, ref, tiny_base, tmp_path):
    """The first six documents of a query are ordered by cosine + w · P(yes), with w from the notes; the rest stays."""
    embedder = CheckpointRef.of(tiny_base, recipe.model)
    with EmbedderGroup(recipe.cluster, recipe.compute) as embedders:
        first, known = (
            evaluate_checkpoint(embedders, dataset, recipe, embedder, "distillation", tmp_path / split, split)
            for split in ("test", "validation")
        )
    result = evaluate_reranked(rerankers, dataset, recipe, ref, first, known, tmp_path / "rerank")
    for scope in ("local", "global"):
        weight = result.notes[f"weight {scope}"]
        assert weight in WEIGHTS
        head = first.ranking(scope).to_pylist()[::7]
        table = pa.Table.from_pylist([row | {"document_ids": row["document_ids"][:6]} for row in head])
        for row, answers in zip(head, score_singly(ref, dataset, table), strict=True):
            fused = [score + weight * p for score, p in zip(row["scores"], answers, strict=False)]
            found = next(r for r in result.ranking(scope).to_pylist() if r["query_id"] == row["query_id"])
            assert found["scores"][:6] == pytest.approx(sorted(fused, reverse=True), abs=1e-4)
            assert found["document_ids"][6:] == row["document_ids"][6:]
    assert set(result.local) == {*dataset.tasks("test"), "average"}
    assert evaluate_reranked(rerankers, dataset, recipe, ref, first, known, tmp_path / "rerank") == result
