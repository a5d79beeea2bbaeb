"""`evaluate.checkpoint`: a model from elsewhere on a recipe's data, by its preset, and reranked."""

import json

import numpy as np
import pytest

from tests.support.small_dataset import document_rows, query_rows
from umarvel_ray.data.dataset import item_of
from umarvel_ray.errors import UserError
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.pipeline import Actors, evaluate
from umarvel_ray.recipe import load_recipe
from umarvel_ray.retrieve.rank import read_ranking
from umarvel_ray.runs import Run


def test_a_published_model_is_evaluated_and_reranked(embedders, rerankers, dataset, tiny_base, tmp_path):
    given = [f"evaluate.checkpoint={tiny_base}", "evaluate.preset=lamra-ret", f"evaluate.reranker={tiny_base}"]
    size = ["evaluate.rerank_top=4", "evaluate.rerank_weight=1", "evaluate.reranker_preset=lamra-rank"]
    recipe = load_recipe("demo", [f"output={tmp_path / 'run'}", f"data.root={dataset.root}", *given, *size])
    run = Run.open(recipe)
    evaluate(run, Actors(embedders, rerankers, None))
    metrics = json.loads((run.dir / "report-lamra-ret" / "metrics.json").read_text())
    assert [row["step"] for row in metrics["ladder"]] == ["lamra-ret", "recall+rerank"]
    assert not (run.dir / "report").exists()
    folder = run.dir / "evaluation" / "given" / "lamra-ret"
    query = next(row for row in query_rows(dataset, "test") if row["text"])
    rows, numbers = document_rows(dataset), dataset.queries("test").rows.tolist()
    number = numbers[dataset.queries("test").ids().index(query["id"])]
    embedder = Embedder.from_pretrained(tiny_base, preset="lamra-ret")
    asked = embedder.encode_query(item_of(query))
    found = next(r for r in read_ranking(folder / "embedder" / "ranking-local").to_pylist() if r["query"] == number)
    shown = [item_of(rows[row]) for row in found["documents"][:4]]
    cosines = embedder.encode_document(shown) @ asked
    np.testing.assert_allclose(found["scores"][:4], cosines, atol=1e-4)
    fused = cosines + Reranker.from_pretrained(tiny_base, preset="lamra-rank").score(item_of(query), shown)
    found = next(r for r in read_ranking(folder / "rerank" / "ranking-local").to_pylist() if r["query"] == number)
    np.testing.assert_allclose(found["scores"][:4], np.sort(fused)[::-1], atol=1e-4)


@pytest.mark.parametrize(
    ("preset", "message"), [("gmee", "unknown preset 'gmee'"), ("lamra-rank", "is for a reranker")]
)
def test_a_wrong_preset_is_refused_before_anything_runs(dataset, tiny_base, tmp_path, preset, message):
    given = [f"evaluate.checkpoint={tiny_base}", f"evaluate.preset={preset}"]
    run = Run.open(load_recipe("demo", [f"output={tmp_path / 'run'}", f"data.root={dataset.root}", *given]))
    with pytest.raises(UserError, match=message):
        evaluate(run, None)
