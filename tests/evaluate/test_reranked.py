"""Recall, then rerank: the last row of the ladder, against the library's reranker on one pair at a time."""

import pyarrow as pa
import pytest

from tests.support.rerankers import score_singly
from umarvel_ray.data.sample import sample_queries
from umarvel_ray.evaluate.checkpoints import evaluate_checkpoint
from umarvel_ray.evaluate.reranked import Calibration, evaluate_reranked
from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.retrieve.fusion import WEIGHTS


@pytest.mark.parametrize("split", ["test", "validation"])
def test_recall_then_rerank(rerankers, dataset, reranking_recipe, reranker_ref, tiny_base, tmp_path, split):
    """The first six documents of a query are ordered by cosine + w · P(yes), with w from the notes; the rest stays.

    The weight is chosen on some of the validation queries, also where all of them are evaluated.
    """
    settings = reranking_recipe.evaluate.model_copy(update={"split": split})
    reranking_recipe = reranking_recipe.model_copy(update={"evaluate": settings})
    embedder = CheckpointRef.of(tiny_base, reranking_recipe.model)
    with EmbedderGroup(reranking_recipe.cluster, reranking_recipe.compute) as embedders:
        some = dataset.with_queries("validation", sample_queries(dataset.queries("validation"), 5, seed=0))
        first, few = (
            evaluate_checkpoint(embedders, data, reranking_recipe, embedder, "distillation", tmp_path / name, on)
            for name, data, on in (("all", dataset, split), ("few", some, "validation"))
        )
    known = Calibration(some, few)
    result = evaluate_reranked(rerankers, dataset, reranking_recipe, reranker_ref, first, known, tmp_path / "rerank")
    for scope in ("local", "global"):
        weight = result.notes[f"weight {scope}"]
        assert weight in WEIGHTS
        head = first.ranking(scope).to_pylist()[::7]
        table = pa.Table.from_pylist([row | {"documents": row["documents"][:6]} for row in head])
        for row, answers in zip(head, score_singly(reranker_ref, dataset, table, split), strict=True):
            fused = [score + weight * p for score, p in zip(row["scores"], answers, strict=False)]
            found = next(r for r in result.ranking(scope).to_pylist() if r["query"] == row["query"])
            assert found["scores"][:6] == pytest.approx(sorted(fused, reverse=True), abs=1e-4)
            assert found["documents"][6:] == row["documents"][6:]
    assert set(result.local) == {*dataset.tasks(split), "average"}
    assert (
        evaluate_reranked(rerankers, dataset, reranking_recipe, reranker_ref, first, known, tmp_path / "rerank")
        == result
    )
