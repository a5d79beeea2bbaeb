"""Mining end to end on a small corpus, against plain numpy on the library's own vectors."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.small_dataset import (
    assert_same_ranking,
    embed_all,
    expected_ranking,
    query_rows,
)
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.inference.shards import read_shards
from umarvel_ray.mining.documents import Documents
from umarvel_ray.mining.mine import EASY, candidates_of, easy_of, kept_of, mine, negatives_of
from umarvel_ray.model.checkpoint import CheckpointRef, save_checkpoint
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.ragged import Ragged
from umarvel_ray.recipe import Data


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
    if scope == "local":
        learner = recipe.reranker.train.model_copy(update={"easy_steps": 0.5})
        recipe = recipe.model_copy(update={"reranker": recipe.reranker.model_copy(update={"train": learner})})
    mine(embedders, dataset, recipe, ref, tmp_path / "embeddings", tmp_path / "mined")
    mined = read_mined(dataset, tmp_path / "mined")
    printed = capsys.readouterr().out
    queries = query_rows(dataset, "train")
    assert [row["query_id"] for row in mined] == [row["id"] for row in queries]
    documents = dataset.document_ids.to_pylist()
    twin_seen = any(row["query_id"] == "q0" and "twin" in row["document_ids"] for row in mined)
    assert ("false negatives among them" in printed) == twin_seen
    seen, hardest = 0, {"words_task1": [], "pictures_task4": []}
    for row, query in zip(mined, queries, strict=True):
        pool = dataset.global_pool("train") if scope == "global" else dataset.pool(query["task"], "train")
        ids = [documents[number] for number in pool]
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
            elif id_ != gold and (id_, gold) not in {("twin", "t0"), ("t0", "twin")} and threshold != "calibrate":
                assert score > min(positive * 0.99, 0.9) - 1e-5
        assert len(row["negative_ids"]) == len(set(row["negative_ids"])) == recipe.stage2.train.hard_negatives
        own = row["query_id"].replace("s", "p")
        assert not {gold, own, *(["twin"] if gold == "t0" else [])} & set(row["negative_ids"])
        assert set(row["negative_ids"]) <= set(ids)
        rejected = {id_ for id_, kept in zip(row["document_ids"], row["kept"], strict=True) if not kept}
        allowed = {*ids} - {gold, own, *rejected, *(["twin"] if gold == "t0" else [])}
        wanted = min(EASY, len(allowed)) if scope == "local" else 0
        assert len(row["easy_ids"]) == len(set(row["easy_ids"])) == wanted
        assert set(row["easy_ids"]) <= allowed
        seen += len(row["document_ids"])
        passed = [id_ for id_, kept in zip(row["document_ids"], row["kept"], strict=True) if kept]
        best = passed[: recipe.stage2.train.hard_negatives]
        hardest[row["task"]].append(row["negative_ids"][: len(best)] == best)
    assert all(hardest["words_task1"])
    assert not all(hardest["pictures_task4"]), "the negatives of this task are drawn at random"
    mine(embedders, dataset, recipe, ref, tmp_path / "embeddings", tmp_path / "mined")
    assert read_mined(dataset, tmp_path / "mined") == mined
    queries = dataset.queries("train")
    for lists, column in (
        (negatives_of(tmp_path / "mined", queries), "negative_ids"),
        (kept_of(tmp_path / "mined", queries, 0, 4), "kept_ids"),
    ):
        assert [[documents[number] for number in own] for own in lists.lists()] == [row[column][:4] for row in mined]
    for lists, expected in (
        (kept_of(tmp_path / "mined", queries, 2, 5), [row["kept_ids"][2:5] for row in mined]),
        (easy_of(tmp_path / "mined", queries), [row["easy_ids"] for row in mined]),
    ):
        assert [[documents[number] for number in own] for own in lists.lists()] == expected
    candidates = candidates_of(tmp_path / "mined", queries.rows[[3, 1]], 2).sort_by("query").to_pylist()
    for row, at in zip(candidates, (1, 3), strict=True):
        assert row["query"] == queries.rows[at]
        assert [documents[number] for number in row["documents"]] == mined[at]["document_ids"][:2]
        assert row["scores"] == mined[at]["scores"][:2]
    assert capsys.readouterr().out == ""
    assert f"{seen:,} candidates" in printed


def read_mined(dataset, folder: Path) -> list[dict]:
    """What was mined, by ids and in the order of the queries."""
    ids, queries = dataset.document_ids.to_pylist(), dataset.queries("train").ids()
    rows = sorted(read_shards(folder).to_pylist(), key=lambda row: row["query"])
    return [
        {
            "query_id": queries[row["query"]],
            "task": row["task"],
            "document_ids": [ids[number] for number in row["documents"]],
            "scores": row["scores"],
            "kept": row["kept"],
            "negative_ids": [ids[number] for number in row["negatives"]],
            "easy_ids": [ids[number] for number in row["easy"]],
            "kept_ids": [ids[number] for number, kept in zip(row["documents"], row["kept"], strict=True) if kept],
        }
        for row in rows
    ]


QUERIES = [  # concept, modality, modalities of the positives; what is asked for is a fox
    ("fox", "text", "image"),
    ("fox", "image,text", "image"),
    ("fox", "image,text", "text"),
    (None, "text", "image"),
]


@pytest.mark.parametrize("query", QUERIES)
def test_what_a_false_negative_is(tmp_path, query):
    """A document of the same concept in the modality of a positive; not if a change was asked for."""
    concept, modality, target = query
    shown = [("fox", "image"), ("fox", "text"), ("owl", "image"), (None, "image"), (None, "text")]
    common = {"text": "a", "image": None, "source": "s"}
    documents = [{"id": "gold", "concept": "fox", "modality": target, **common}]
    documents += [{"id": f"d{n}", "concept": own, "modality": kind, **common} for n, (own, kind) in enumerate(shown)]
    asked = {"id": "q", "concept": concept, "modality": modality, "instruction": None, "task": "t", **common}
    pq.write_table(pa.Table.from_pylist(documents), tmp_path / "documents.parquet")
    pq.write_table(pa.Table.from_pylist([asked | {"positive_ids": ["gold"]}]), tmp_path / "train.parquet")
    pools = [{"task": "t", "split": "train", "document_ids": ["gold"]}]
    pq.write_table(pa.Table.from_pylist(pools), tmp_path / "pools.parquet")
    dataset = open_dataset(Data(root=str(tmp_path)), tmp_path / "tables")
    queries = dataset.queries("train")
    candidates = Ragged.of([range(len(documents))])
    found = Documents(dataset, queries).false_negatives(candidates, np.array([0]), queries.positives)
    change = modality == "image,text" and target == "image"
    expected = [own == concept == "fox" and kind == target and not change for own, kind in shown]
    assert found.tolist() == [False, *expected]
