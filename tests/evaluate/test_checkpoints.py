"""The evaluation of a checkpoint: its saved rankings, recall, chance, and the choice of the base's pooling."""

import numpy as np
import pytest

from umarvel_ray.evaluate.checkpoints import MIN_DEPTH, evaluate_base, evaluate_checkpoint
from umarvel_ray.evaluate.results import LadderResult
from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.retrieve.rank import embed_split, rank


@pytest.fixture(scope="module")
def ref(recipe, tiny_base):
    return CheckpointRef.of(tiny_base, recipe.model)


@pytest.fixture(scope="module")
def result(embedders, dataset, recipe, ref, tmp_path_factory):
    return evaluate_checkpoint(embedders, dataset, recipe, ref, "text", tmp_path_factory.mktemp("evaluation"))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_saved_rankings_are_the_exact_ones(result, embedders, dataset, recipe, ref, scope, tmp_path):
    """tests/retrieve/test_rank.py checks `rank` against numpy."""
    embedded = embed_split(embedders, dataset, "test", ref, result.folder)
    rows = result.ranking(scope).to_pylist()
    depth = max(MIN_DEPTH, recipe.evaluate.rerank_top)
    assert rows == rank(embedded, dataset, "test", scope, depth, tmp_path).to_pylist()
    assert {row["query"] for row in rows} == set(dataset.queries("test").rows.tolist())
    for row in rows:
        assert len(set(row["documents"])) == len(row["documents"]) == min(depth, row["pool_size"])


def test_a_result_never_stands_beside_rankings_of_other_settings(embedders, dataset, recipe, ref, tmp_path):
    deeper = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"rerank_top": 20})})
    first = evaluate_checkpoint(embedders, dataset, recipe, ref, "text", tmp_path)
    expected = first.ranking("local")

    def interrupted(self) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LadderResult, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_checkpoint(embedders, dataset, deeper, ref, "text", tmp_path)
    assert not (tmp_path / "result.json").exists()
    assert evaluate_checkpoint(embedders, dataset, recipe, ref, "text", tmp_path).ranking("local").equals(expected)


def own_pictures(dataset) -> dict[int, int]:
    """For each query with a picture, the document that shows it."""
    ids = dataset.document_ids.to_pylist()
    queries = dataset.queries("test")
    return {
        row: ids.index(id_.replace("s", "p"))
        for row, id_ in zip(queries.rows.tolist(), queries.ids(), strict=True)
        if id_.startswith("s")
    }


def test_own_picture_is_not_retrieved_unless_requested(embedders, result, dataset, recipe, ref, tmp_path):
    own = own_pictures(dataset)
    for row in result.ranking("global").to_pylist():
        assert own.get(row["query"]) not in row["documents"]
    keeping = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"drop_query_image": False})})
    other = evaluate_checkpoint(embedders, dataset, keeping, ref, "text", tmp_path)
    rows = [row for row in other.ranking("local").to_pylist() if row["query"] in own]
    assert all(row["pool_size"] == 42 for row in rows)
    assert any(own[row["query"]] in row["documents"] for row in rows)


def test_recall_is_hits_over_queries_averaged_over_tasks(result, dataset):
    rows, queries = result.ranking("local").to_pylist(), dataset.queries("test")
    positives = dict(zip(queries.rows.tolist(), queries.positives.values.tolist(), strict=True))  # one each
    for task, k in (("words_task1", 3), ("pictures_task4", 5)):
        hits = [positives[row["query"]] in row["documents"][:k] for row in rows if row["task"] == task]
        assert result.local[task] == pytest.approx(sum(hits) / len(hits))
    assert result.local["average"] == pytest.approx((result.local["words_task1"] + result.local["pictures_task4"]) / 2)
    assert result.chance("local")["words_task1"] == pytest.approx(3 / 43)  # 42 texts and a twin
    assert result.chance("local")["pictures_task4"] == pytest.approx(5 / 41)  # without the query's own picture


def test_a_finished_evaluation_is_read_back(result, dataset, recipe, ref):
    with EmbedderGroup(recipe.cluster, recipe.compute) as idle:
        again = evaluate_checkpoint(idle, dataset, recipe, ref, "text", result.folder)
        assert idle._actors == []
    assert again == result


def test_base_takes_the_better_pooling(embedders, dataset, recipe, tiny_base, tmp_path):
    best = evaluate_base(embedders, dataset, recipe, tiny_base, tmp_path)
    both = {}
    for pooling in ("mean", "last"):
        ref = CheckpointRef.of(tiny_base, recipe.model.model_copy(update={"pooling": pooling}))
        other = evaluate_checkpoint(embedders, dataset, recipe, ref, "base", tmp_path / pooling)
        both[pooling] = other.local["average"]
    assert best.local["average"] == max(both.values())
    assert both[best.notes["pooling"]] == max(both.values())


def test_an_evaluation_of_other_data_is_not_read_back(embedders, result, dataset, recipe, ref):
    """The queries, and the documents of the pools."""
    queries = dataset.queries("test")
    fewer = dataset.with_queries("test", queries.take(np.arange(queries.n - 1)))
    smaller = dataset.with_pools({key: rows[1:] for key, rows in dataset.pools.items()})
    identities = {
        evaluate_checkpoint(embedders, data, recipe, ref, "text", result.folder).identity
        for data in (fewer, smaller, dataset)
    }
    assert len(identities) == 3
    assert result.identity in identities
