"""Mining end to end on a small corpus, against plain numpy on the library's own vectors."""

import pytest

from tests.support.small_dataset import (
    assert_same_ranking,
    embed_all,
    expected_ranking,
)
from umarvel_ray.mining.mine import is_false_negative, mine
from umarvel_ray.model.checkpoint import CheckpointRef, save_checkpoint
from umarvel_ray.model.embedding_model import EmbeddingModel


@pytest.fixture(scope="module")
def ref(recipe, tiny_base, tmp_path_factory):
    """The random base as a checkpoint of a run, with its settings."""
    folder = tmp_path_factory.mktemp("checkpoints") / "instruction"
    model = EmbeddingModel.from_pretrained(tiny_base, recipe.model)
    save_checkpoint(model, folder, recipe.model, {"phase": "instruction"})
    return CheckpointRef.of(folder)


@pytest.fixture(scope="module")
def vectors(dataset, recipe, tiny_base):
    return embed_all(dataset, tiny_base, recipe)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("threshold", ["calibrate", 0.9])
def test_mined_negatives(embedders, dataset, recipe, ref, vectors, tmp_path, scope, threshold, capsys):
    change = {"pool": scope, "max_similarity": threshold, "margin": 0.01, "random_mix_of": {"pictures_task4": 1.0}}
    mining = recipe.stage2.mining.model_copy(update=change)
    recipe = recipe.model_copy(update={"stage2": recipe.stage2.model_copy(update={"mining": mining})})
    mined = mine(embedders, dataset, recipe, ref, tmp_path / "embeddings", tmp_path / "mined").to_pylist()
    printed = capsys.readouterr().out
    queries = dataset.queries("train").to_pylist()
    assert [row["query_id"] for row in mined] == [row["id"] for row in queries]
    twin_seen = any(row["query_id"] == "q0" and "twin" in row["document_ids"] for row in mined)
    assert ("false negatives among them" in printed) == twin_seen
    seen, hardest = 0, {"words_task1": [], "pictures_task4": []}
    for row, query in zip(mined, queries, strict=True):
        ids = dataset.global_pool("train") if scope == "global" else dataset.pool(query["task"], "train")
        assert_same_ranking(row["document_ids"], expected_ranking(dataset, vectors, query, ids), vectors, query)
        gold = query["positive_ids"][0]
        positive = float(vectors[query["id"]] @ vectors[gold])
        for id_, score, kept in zip(row["document_ids"], row["scores"], row["kept"], strict=True):
            assert score == pytest.approx(float(vectors[query["id"]] @ vectors[id_]), abs=1e-5)
            if kept:
                assert id_ != gold
                assert (id_, gold) not in {("twin", "t0"), ("t0", "twin")}
                assert score <= positive * 0.99 + 1e-5
                assert threshold == "calibrate" or score <= 0.9 + 1e-5
        assert len(row["negative_ids"]) == len(set(row["negative_ids"])) == recipe.stage2.train.hard_negatives
        own = row["query_id"].replace("s", "p")
        assert not {gold, own, *(["twin"] if gold == "t0" else [])} & set(row["negative_ids"])
        assert set(row["negative_ids"]) <= set(ids)
        seen += len(row["document_ids"])
        passed = [id_ for id_, kept in zip(row["document_ids"], row["kept"], strict=True) if kept]
        best = passed[: recipe.stage2.train.hard_negatives]
        hardest[row["task"]].append(row["negative_ids"][: len(best)] == best)
    assert all(hardest["words_task1"])
    assert not all(hardest["pictures_task4"]), "the negatives of this task are drawn at random"
    again = mine(embedders, dataset, recipe, ref, tmp_path / "embeddings", tmp_path / "mined").to_pylist()
    assert again == mined
    assert capsys.readouterr().out == ""
    assert f"{seen:,} candidates" in printed


def test_what_a_false_negative_is():
    query = {"concept": "fox", "modality": "text"}
    gold = [{"concept": "fox", "modality": "image"}]
    assert is_false_negative(query, {"concept": "fox", "modality": "image"}, gold)
    assert not is_false_negative(query, {"concept": "fox", "modality": "text"}, gold)
    assert not is_false_negative(query, {"concept": "owl", "modality": "image"}, gold)
    assert not is_false_negative(query | {"modality": "image,text"}, {"concept": "fox", "modality": "image"}, gold)
    assert not is_false_negative({"modality": "text"}, {"modality": "image"}, gold)
