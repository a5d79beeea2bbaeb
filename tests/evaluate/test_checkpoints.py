"""The evaluation of a checkpoint: its saved rankings, recall, chance, and the choice of the base's pooling."""

import pytest

from umarvel_ray.evaluate.checkpoints import MIN_DEPTH, evaluate_base, evaluate_checkpoint
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
def test_saved_rankings_are_the_exact_ones(result, embedders, dataset, recipe, ref, scope):
    """tests/retrieve/test_rank.py checks `rank` against numpy."""
    embedded = embed_split(embedders, dataset, "test", ref, result.folder)
    assert result.ranking(scope).to_pylist() == rank(embedded, dataset, "test", scope, MIN_DEPTH).to_pylist()
    ids = {row["query_id"] for row in result.ranking(scope).to_pylist()}
    assert ids == set(dataset.queries("test")["id"].to_pylist())
    for row in result.ranking(scope).to_pylist():
        assert len(set(row["document_ids"])) == len(row["document_ids"]) == MIN_DEPTH


def test_own_picture_is_not_retrieved_unless_requested(embedders, result, dataset, recipe, ref, tmp_path):
    own = {f"s{n}": f"p{n}" for n in range(42)}
    for row in result.ranking("global").to_pylist():
        assert own.get(row["query_id"]) not in row["document_ids"]
    keeping = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"drop_query_image": False})})
    other = evaluate_checkpoint(embedders, dataset, keeping, ref, "text", tmp_path)
    rows = [row for row in other.ranking("local").to_pylist() if row["query_id"] in own]
    assert all(row["pool_size"] == 42 for row in rows)
    assert any(own[row["query_id"]] in row["document_ids"] for row in rows)


def test_recall_is_hits_over_queries_averaged_over_tasks(result, dataset):
    rows, positives = result.ranking("local").to_pylist(), {}
    for row in dataset.queries("test").to_pylist():
        positives[row["id"]] = row["positive_ids"][0]
    for task, k in (("words_task1", 3), ("pictures_task4", 5)):
        hits = [positives[row["query_id"]] in row["document_ids"][:k] for row in rows if row["task"] == task]
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
